"""COCO's average precision and recall of boxes, accumulated image by image.

Needs numpy and a backend, and nothing of hf_detrkd: `evaluate.load` copies this file beside the metric.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Tables:
    """COCO's precision and recall before any mean is taken; -1 where there is nothing to find, as in pycocotools.

    T: the 10 IoU thresholds 0.50, 0.55, ..., 0.95. The areas are `AREAS`; the last axis is with 1, 10 and 100 detections of
    each class and image.
    """

    class_names: tuple[str, ...]
    """K names."""
    precision: np.ndarray
    """(T, 101, K, 4, 3) at the recalls 0, 0.01, ..., 1: the best that is reached at this recall or a higher one."""
    recall: np.ndarray
    """(T, K, 4, 3)."""

    def metrics(self) -> dict[str, Any]:
        """The means, as `CocoEvaluator.compute` describes them."""
        precision, recall = self.precision, self.recall
        metrics = {"map": _mean(precision[..., 0, 2])}
        metrics |= {"map_50": _mean(precision[0, ..., 0, 2]), "map_75": _mean(precision[5, ..., 0, 2])}
        metrics |= {f"map_{area}": _mean(precision[..., a, 2]) for a, area in enumerate(AREAS) if area != "all"}
        metrics |= {f"mar_{most}": _mean(recall[..., 0, m]) for m, most in enumerate((1, 10, MAX_DETECTIONS))}
        metrics["map_per_class"] = {name: _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(self.class_names)}
        metrics["mar_100_per_class"] = {name: _mean(recall[:, k, 0, 2]) for k, name in enumerate(self.class_names)}
        return metrics


@dataclass(frozen=True)
class Matches:
    """Which detections of one class found an object: what its AP is accumulated from. I images, n detections, best first."""

    image: np.ndarray
    """(n,) index of the image in the order of the ids."""
    hits: tuple[np.ndarray, ...]
    """At each of the 10 IoU thresholds of `Tables` which of the n, in order."""
    ignored: tuple[np.ndarray, ...]
    """Likewise, those that lie in a crowd region and are neither right nor wrong."""
    objects: np.ndarray
    """(I,) number of objects in each image, crowds aside."""


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

    @property
    def image_ids(self) -> list[Hashable]:
        """Of the images added, in order."""
        return sorted(self._images)

    def __getitem__(self, image_id: Hashable) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Prediction and reference of an image as `add` takes them, without the detections that COCO never looks at."""
        found, wanted = self._images[image_id]
        prediction = {"labels": found[:, 0].astype(int), "scores": found[:, 1], "boxes": found[:, 2:]}
        reference = {"labels": wanted[:, 0].astype(int), "boxes": wanted[:, 1:5]}
        return prediction, reference | {"area": wanted[:, 5], "iscrowd": wanted[:, 6].astype(int)}

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
        return self.tables().metrics()

    def tables(self) -> Tables:
        """Of all images added: what `compute` takes the means of."""
        # COCO never compares classes, so they are taken one by one, each with the images it occurs in: the same
        # numbers, and the backend's dictionaries exist for one class at a time.
        classes = list(self._by_class())
        precision = np.full((10, 101, len(classes), len(AREAS), 3), -1.0)
        recall = np.full((10, len(classes), len(AREAS), 3), -1.0)
        for k, (_, found, wanted) in enumerate(classes):
            if len(wanted):
                evaluation = self._evaluation(self._coco, self._coco_eval, found, wanted)
                with _silence():
                    evaluation.evaluate()
                    evaluation.accumulate()
                precision[:, :, k] = evaluation.eval["precision"][:, :, 0]
                recall[:, k] = evaluation.eval["recall"][:, 0]
        return Tables(tuple(name for name, *_ in classes), precision, recall)

    def matches(self) -> list[Matches]:
        """Of all images added, class by class. It is pycocotools that matches: the faster backend doesn't say what it did."""
        _, coco, coco_eval = _load_backend("pycocotools")
        return [
            self._matches(self._evaluation(coco, coco_eval, found, wanted), wanted)
            for _, found, wanted in self._by_class()
        ]

    def _matches(self, evaluation, references: np.ndarray) -> Matches:
        parameters = evaluation.params
        parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]
        with _silence():
            evaluation.evaluate()
        images = [one for one in evaluation.evalImgs if one is not None]
        scores = np.concatenate([np.zeros(0), *(one["dtScores"] for one in images)])
        order = np.argsort(-scores, kind="stable")
        nothing = np.zeros((10, 0))
        matched, ignored = (
            np.concatenate([nothing, *(one[name] for one in images)], axis=1)[:, order].astype(bool)
            for name in ("dtMatches", "dtIgnore")
        )
        image = np.repeat([one["image_id"] - 1 for one in images], [len(one["dtScores"]) for one in images])
        wanted = references[references[:, 7] == 0, 0].astype(int) - 1
        objects = np.bincount(wanted, minlength=len(self))
        hits, ignored = (tuple(map(np.flatnonzero, rows)) for rows in (matched & ~ignored, ignored))
        return Matches(image.astype(int)[order], hits, ignored, objects)

    def _by_class(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Name, detections and references of every class; first column: the image's number, from 1 in the order of the ids."""
        images = [self._images[image] for image in self.image_ids]
        detections, references = _stack([found for found, _ in images], 6), _stack([wanted for _, wanted in images], 7)
        names = self.class_names
        if names is None:
            names = {int(label): str(int(label)) for label in np.unique(references[:, 1])}
        for label, name in names.items():
            yield name, detections[detections[:, 1] == label], references[references[:, 1] == label]

    def _prediction(self, image_id: Hashable, prediction: Mapping[str, Any]) -> np.ndarray:
        """(n, 6): label, score, x1, y1, x2, y2."""
        where = f"the prediction of image {image_id!r}"
        labels, boxes = self._labels_and_boxes(where, prediction)
        scores = _array(where, prediction, "scores", (len(boxes),))
        return np.concatenate([labels[:, None], scores[:, None], boxes], axis=1)

    def _reference(self, image_id: Hashable, reference: Mapping[str, Any]) -> np.ndarray:
        """(m, 7): label, x1, y1, x2, y2, area, iscrowd."""
        where = f"the reference of image {image_id!r}"
        labels, boxes = self._labels_and_boxes(where, reference)
        sizes = boxes[:, 2:] - boxes[:, :2]
        if (sizes < 0).any():
            row = int(np.argwhere(sizes < 0)[0, 0])
            raise ValueError(
                f"{where} has the box {boxes[row].tolist()} in row {row}, which ends before it begins. Boxes are "
                "x1, y1, x2, y2 in pixels; COCO files hold x, y, width, height."
            )
        defaults = {"area": sizes.prod(axis=1), "iscrowd": np.zeros(len(boxes))}
        given = {key: value for key, value in reference.items() if value is not None}
        area, crowd = (_array(where, defaults | given, key, (len(boxes),)) for key in defaults)
        if not np.isin(crowd, (0, 1)).all():
            raise ValueError(f"{where} has `iscrowd` {crowd.tolist()}; each must be 0 or 1.")
        return np.concatenate([labels[:, None], boxes, area[:, None], crowd[:, None]], axis=1)

    def _labels_and_boxes(self, where: str, values: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        labels = _array(where, values, "labels", (None,))
        wrong = labels < 0 if self.class_names is None else ~np.isin(labels, list(self.class_names))
        wrong |= labels % 1 != 0
        if wrong.any():
            classes = "whole numbers from 0" if self.class_names is None else f"labels {sorted(self.class_names)}"
            raise ValueError(f"{where} has the label {labels[wrong][0]:g}; known are {classes}.")
        return labels, _array(where, values, "boxes", (len(labels), 4))

    def _evaluation(self, coco, coco_eval, detections: np.ndarray, references: np.ndarray):
        """The backend's `COCOeval` of one class, before it has run."""
        found = _annotations(detections[:, 0], detections[:, 3:], score=detections[:, 2])
        wanted = _annotations(
            references[:, 0], references[:, 2:6], area=references[:, 6], iscrowd=references[:, 7].astype(int)
        )
        images = np.union1d(detections[:, 0], references[:, 0])
        with _silence():
            return coco_eval(_dataset(coco, images, wanted), _dataset(coco, images, found), "bbox")


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


def _dataset(coco, images: np.ndarray, annotations: list[dict]):
    """A `COCO` object of one class, made without a file."""
    dataset = coco()
    dataset.dataset = {
        "images": [{"id": int(image)} for image in images],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "the class at hand"}],
    }
    dataset.createIndex()
    return dataset


def _silence() -> contextlib.AbstractContextManager:
    """The backends print their progress; a run's output is the caller's."""
    return contextlib.redirect_stdout(io.StringIO())


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


def _array(where: str, values: Mapping[str, Any], key: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """``values[key]`` as finite numbers of a shape; None in ``shape`` is any length."""
    if key not in values:
        raise ValueError(f"{where} has no `{key}`, only {sorted(values)}.")
    try:
        array = np.asarray(values[key], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} has `{key}` that are not an array of numbers: {error}") from error
    if array.size == 0 and 0 in shape:
        array = array.reshape(shape)  # an empty list has no second axis
    if array.ndim != len(shape) or any(wanted not in (None, n) for n, wanted in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{where} has `{key}` of shape {array.shape}; {shape} is needed, one row per box.")
    if not np.isfinite(array).all():
        raise ValueError(f"{where} has {(~np.isfinite(array)).sum()} values in `{key}` that are NaN or infinite.")
    return array


def _stack(arrays: list[np.ndarray], width: int) -> np.ndarray:
    """All rows below each other, the number of the array as the first column: (n, 1 + width)."""
    numbers = np.repeat(np.arange(1, len(arrays) + 1), [len(array) for array in arrays])
    return np.concatenate([numbers[:, None], np.concatenate([np.zeros((0, width)), *arrays])], axis=1)


def _annotations(images: np.ndarray, boxes: np.ndarray, **columns: np.ndarray) -> list[dict]:
    """Boxes (n, 4) as the backends take them; ``columns`` override the fields of the same name.

    Ids start at 1: COCOeval reads the id 0 as unmatched. Detections have the area of their box, as in `COCO.loadRes`.
    """
    x1, y1, x2, y2 = boxes.T
    table = {
        "id": np.arange(1, len(boxes) + 1),
        "image_id": images.astype(int),
        "category_id": np.ones(len(boxes), dtype=int),
        "bbox": np.stack([x1, y1, x2 - x1, y2 - y1], axis=1),
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": np.zeros(len(boxes), dtype=int),
    } | columns
    return [dict(zip(table, row, strict=True)) for row in zip(*(c.tolist() for c in table.values()), strict=True)]


def _mean(values: np.ndarray) -> float:
    """pycocotools' mean (cocoeval.py, _summarize): entries of -1 are left out; NaN where nothing is left."""
    values = values[values > -1]
    return float(values.mean()) if values.size else float("nan")
