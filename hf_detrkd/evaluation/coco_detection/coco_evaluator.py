"""COCO's average precision and recall of boxes, accumulated image by image.

Needs numpy and a backend, and nothing of hf_detrkd: `evaluate.load` copies this file beside the metric.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

# pycocotools, cocoeval.py, Params.setDetParams: the largest of maxDets, which counts per class and image.
MAX_DETECTIONS = 100
AREAS = ("all", "small", "medium", "large")

# Backends in the order of preference: name -> module and class of COCOeval, module of COCO.
_BACKENDS = {
    "faster_coco_eval": ("faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.cocoeval", "COCOeval"),
}


class CocoEvaluator:
    """Average precision of the images added so far, as pycocotools' `COCOeval` computes it for ``iouType="bbox"``.

    Keeps what COCO can use of each image, the 100 best detections of every class and the reference boxes, so memory
    grows with the detections and nothing else. Neither the order in which images are added nor the backend changes
    a result (backends agree to 1e-6).

    Args:
        class_names: names by label: a sequence, or a mapping such as `model.config.id2label` (ids may be sparse).
            None: every label that occurs in a reference is a class, named by its number.
        backend: ``"faster_coco_eval"`` (C++), ``"pycocotools"`` (the original), or ``"auto"``: the first installed.

    Raises:
        ValueError: if the backend is unknown or two classes have the same name.
        ImportError: if no backend is installed.
    """

    def __init__(self, class_names: Sequence[str] | Mapping[int, str] | None = None, backend: str = "auto"):
        self.class_names = None if class_names is None else _names_by_label(class_names)
        self.backend, self._coco, self._coco_eval = _load_backend(backend)
        self._images: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Number of images added."""
        return len(self._images)

    def reset(self) -> None:
        """Forgets all images."""
        self._images.clear()

    def add(self, image_id: Hashable, prediction: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
        """Adds one image.

        Args:
            image_id: an id, used once; COCO breaks ties between images by the order of their ids.
            prediction: ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``scores`` (n,), ``labels`` (n,) integers.
            reference: ``boxes`` (m, 4) likewise, ``labels`` (m,); optionally ``iscrowd`` (m,) 0 or 1, by default 0,
                and ``area`` (m,) in pixels, by default that of the box. COCO's own small, medium and large go by the
                area of the segmentation, not of the box.

        Raises:
            ValueError: if the image was added before, or a value is missing, misshapen, not finite or out of range.
        """
        if image_id in self._images:
            raise ValueError(
                f"Image {image_id!r} was added twice: it would count twice. Give every image its own id, and call "
                "`reset()` before evaluating again."
            )
        self._images[image_id] = (
            best_per_class(self._prediction(image_id, prediction)),
            self._reference(image_id, reference),
        )

    def compute(self) -> dict[str, Any]:
        """The metrics of all images added; they stay, so more can be added.

        Returns:
            ``map`` (mean over IoU 0.50 to 0.95), ``map_50``, ``map_75``, ``map_small``, ``map_medium``, ``map_large``
            (area below 32², between, above 96² pixels), ``mar_1``, ``mar_10``, ``mar_100`` (recall with so many
            detections per image and class): floats in [0, 1]. ``map_per_class`` and ``mar_100_per_class``: the same by
            name of the class. NaN where there is nothing to find, where pycocotools says -1: a class or a size
            without a reference box (crowds aside). Such classes don't take part in the means, as in pycocotools.
        """
        images = sorted(self._images)
        detections = _stack([self._images[image][0] for image in images], 6)
        references = _stack([self._images[image][1] for image in images], 7)
        labels = [int(label) for label in np.unique(references[:, 1])] if self.class_names is None else self.class_names
        # COCO never compares classes, so they are taken one by one, each with the images it occurs in: the same
        # numbers, faster, and the backend's dictionaries exist for one class at a time.
        tables = [
            self._tables(detections[detections[:, 1] == label], references[references[:, 1] == label])
            for label in labels
        ]
        # (T, R, K, A, M) and (T, K, A, M): IoU thresholds, recall thresholds, classes, areas, numbers of detections.
        precision = np.stack([table[0] for table in tables], axis=2) if tables else np.full((10, 101, 0, 4, 3), -1.0)
        recall = np.stack([table[1] for table in tables], axis=1) if tables else np.full((10, 0, 4, 3), -1.0)

        names = [str(label) if self.class_names is None else self.class_names[label] for label in labels]
        metrics = {"map": _mean(precision[..., 0, 2])}
        metrics |= {"map_50": _mean(precision[0, ..., 0, 2]), "map_75": _mean(precision[5, ..., 0, 2])}
        metrics |= {f"map_{area}": _mean(precision[..., a, 2]) for a, area in enumerate(AREAS) if area != "all"}
        metrics |= {f"mar_{most}": _mean(recall[..., 0, m]) for m, most in enumerate((1, 10, MAX_DETECTIONS))}
        metrics["map_per_class"] = {name: _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(names)}
        metrics["mar_100_per_class"] = {name: _mean(recall[:, k, 0, 2]) for k, name in enumerate(names)}
        return metrics

    def _prediction(self, image_id: Hashable, prediction: Mapping[str, Any]) -> np.ndarray:
        """(n, 6): label, score, x1, y1, x2, y2."""
        where = f"the prediction of image {image_id!r}"
        boxes, labels = self._boxes_and_labels(where, prediction)
        scores = _column(where, prediction, "scores", len(boxes))
        return np.concatenate([labels[:, None], scores[:, None], boxes], axis=1)

    def _reference(self, image_id: Hashable, reference: Mapping[str, Any]) -> np.ndarray:
        """(m, 7): label, x1, y1, x2, y2, area, iscrowd."""
        where = f"the reference of image {image_id!r}"
        boxes, labels = self._boxes_and_labels(where, reference)
        sizes = boxes[:, 2:] - boxes[:, :2]
        if (sizes < 0).any():
            row = int(np.argwhere(sizes < 0)[0, 0])
            raise ValueError(
                f"{where} has the box {boxes[row].tolist()} in row {row}, which ends before it begins. Boxes are "
                "x1, y1, x2, y2 in pixels; COCO files hold x, y, width, height."
            )
        area = _column(where, reference, "area", len(boxes), default=lambda: sizes.prod(axis=1))
        crowd = _column(where, reference, "iscrowd", len(boxes), default=lambda: np.zeros(len(boxes)))
        if not np.isin(crowd, (0, 1)).all():
            raise ValueError(f"{where} has `iscrowd` {crowd.tolist()}; each must be 0 or 1.")
        return np.concatenate([labels[:, None], boxes, area[:, None], crowd[:, None]], axis=1)

    def _boxes_and_labels(self, where: str, values: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        labels = _column(where, values, "labels")
        boxes = _array(where, values, "boxes")
        boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
        if boxes.shape != (len(labels), 4):
            raise ValueError(f"{where} has `boxes` of shape {boxes.shape} for {len(labels)} labels; (n, 4) is needed.")
        known = labels >= 0 if self.class_names is None else np.isin(labels, list(self.class_names))
        if not known.all() or (labels % 1 != 0).any():
            classes = "whole numbers from 0" if self.class_names is None else f"labels {sorted(self.class_names)}"
            raise ValueError(f"{where} has the label {labels[~known | (labels % 1 != 0)][0]:g}; known are {classes}.")
        return boxes, labels

    def _tables(self, detections: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """COCO's precision (T, R, A, M) and recall (T, A, M) of one class; -1 where there is nothing to find."""
        if len(references) == 0:
            return np.full((10, 101, 4, 3), -1.0), np.full((10, 4, 3), -1.0)
        rows = [(image, score, box, _area(box), 0) for image, _, score, *box in detections.tolist()]
        found = [_annotation(number, *row) for number, row in enumerate(rows, start=1)]
        rows = [(image, 1.0, box, area, crowd) for image, _, *box, area, crowd in references.tolist()]
        wanted = [_annotation(number, *row) for number, row in enumerate(rows, start=1)]
        images = [{"id": image} for image in sorted({row["image_id"] for row in found + wanted})]
        # The backends print their progress; a run's output is the caller's.
        with contextlib.redirect_stdout(io.StringIO()):
            coco_eval = self._coco_eval(self._dataset(images, wanted), self._dataset(images, found), "bbox")
            coco_eval.evaluate()
            coco_eval.accumulate()
        return coco_eval.eval["precision"][:, :, 0], coco_eval.eval["recall"][:, 0]

    def _dataset(self, images: list[dict], annotations: list[dict]):
        dataset = self._coco()
        dataset.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "1"}]}
        dataset.createIndex()
        return dataset


def best_per_class(detections: np.ndarray) -> np.ndarray:
    """The ``detections`` (n, 6), label first and score second, without those that COCO never looks at.

    COCO takes the 100 best of each class and image, ties in the order given.
    """
    if len(detections) <= MAX_DETECTIONS:
        return detections
    detections = detections[np.lexsort((-detections[:, 1], detections[:, 0]))]
    _, first, counts = np.unique(detections[:, 0], return_index=True, return_counts=True)
    rank = np.arange(len(detections)) - np.repeat(first, counts)
    return detections[rank < MAX_DETECTIONS]


def _load_backend(name: str) -> tuple[str, Any, Any]:
    if name not in ("auto", *_BACKENDS):
        raise ValueError(f"`backend` is {name!r}; it must be one of 'auto', {', '.join(map(repr, _BACKENDS))}.")
    for candidate in _BACKENDS if name == "auto" else (name,):
        module_name, class_name = _BACKENDS[candidate]
        with contextlib.suppress(ImportError):
            module = importlib.import_module(module_name)
            coco = importlib.import_module("pycocotools.coco" if candidate == "pycocotools" else module_name).COCO
            return candidate, coco, getattr(module, class_name)
    raise ImportError(
        f"The COCO metric needs a backend and found none (`backend` is {name!r}). "
        "Install one: `pip install faster-coco-eval` or `pip install pycocotools`."
    )


def _names_by_label(class_names: Sequence[str] | Mapping[int, str]) -> dict[int, str]:
    pairs = class_names.items() if isinstance(class_names, Mapping) else enumerate(class_names)
    names = {int(label): str(name) for label, name in pairs}
    repeated = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if repeated:
        raise ValueError(f"`class_names` has {', '.join(map(repr, repeated))} more than once; results go by name.")
    return names


def _array(where: str, values: Mapping[str, Any], key: str) -> np.ndarray:
    if key not in values:
        raise ValueError(f"{where} has no `{key}`, only {sorted(values)}.")
    try:
        array = np.asarray(values[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has `{key}` that are not an array of numbers: {error}") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{where} has {(~np.isfinite(array)).sum()} values in `{key}` that are NaN or infinite.")
    return array


def _column(
    where: str,
    values: Mapping[str, Any],
    key: str,
    length: int | None = None,
    default: Callable[[], np.ndarray] | None = None,
) -> np.ndarray:
    if default is not None and values.get(key) is None:
        return default()
    array = _array(where, values, key)
    if array.ndim != 1 or length not in (None, len(array)):
        wanted = "(n,)" if length is None else f"({length},)"
        raise ValueError(f"{where} has `{key}` of shape {array.shape}; {wanted} is needed, one per box.")
    return array


def _stack(arrays: list[np.ndarray], width: int) -> np.ndarray:
    """All rows below each other, the number of the array as the first column: (n, 1 + width)."""
    numbers = np.repeat(np.arange(1, len(arrays) + 1), [len(array) for array in arrays])
    return np.concatenate([numbers[:, None], np.concatenate([np.zeros((0, width)), *arrays])], axis=1)


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _annotation(number: int, image: float, score: float, box: list[float], area: float, crowd: float) -> dict:
    """One box as the backends take it. Numbers start at 1: COCOeval reads the id 0 as unmatched."""
    x1, y1, x2, y2 = box
    return {
        "id": number,
        "image_id": int(image),
        "category_id": 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
        "iscrowd": int(crowd),
        "score": score,
    }


def _mean(values: np.ndarray) -> float:
    """pycocotools' mean (cocoeval.py, _summarize): entries of -1 are left out; NaN where nothing is left."""
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")
