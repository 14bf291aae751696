"""COCO metrics inside `Trainer`: evaluation that streams, for ``TrainingArguments(batch_eval_metrics=True)``.

Detections and references travel as rectangular tensors padded with -100, the shape that Trainer's own padding,
gathering over processes and dropping of repeated images handle rightly; ragged lists of dictionaries they don't.
A prediction step returns ``(loss, pack_detections(results), pack_references(labels))``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction
from transformers.image_transforms import center_to_corners_format

from .coco_detection.coco_evaluator import CocoEvaluator

# What Trainer pads with (Trainer.evaluation_loop, `pad_across_processes(..., pad_index=-100)`). As a class it is no
# class; as the class of a reference row, -1 says that the row only carries the id of an image.
PADDING = -100
_NO_OBJECT = -1


def pack_detections(results: Sequence[Mapping[str, Tensor]], limit: int | None = None) -> Tensor:
    """Post-processed detections as one tensor.

    Args:
        results: per image ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4) as x1, y1, x2, y2 in pixels: the list
            that `image_processor.post_process_object_detection` returns (with ``threshold=0``: AP needs them all).
        limit: keep so many of the best of each image, over all classes. None keeps all, which equals pycocotools on
            the same detections: its 100 count per class.

    Returns:
        (B, n, 6) float32: label, score, x1, y1, x2, y2; n is that of the fullest image and at least 1; rows beyond an
        image's own are -100.
    """
    rows = []
    for result in results:
        labels, scores = result["labels"].float(), result["scores"].float()
        image = torch.cat([labels[:, None], scores[:, None], result["boxes"].float()], dim=1)
        if limit is not None and len(image) > limit:
            image = image[scores.argsort(descending=True, stable=True)[:limit]]
        rows.append(image)
    return _pad(rows)


def pack_references(labels: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The labels of a batch as one tensor, crowds included.

    Args:
        labels: per image ``image_id`` (1,), ``orig_size`` (2,) height and width in pixels, ``class_labels`` (N,),
            ``boxes`` (N, 4) as (cx, cy, w, h) in [0, 1], ``area`` (N,) in pixels of the original image; optionally
            ``crowd_labels`` (C,), ``crowd_boxes`` (C, 4), ``crowd_area`` (C,).

    Returns:
        (B, N, 8) float64: image_id, class, x1, y1, x2, y2 in pixels of the original image, area, iscrowd. Rows beyond
        an image's own are -100. An image without objects has one row, of class -1. float64 holds ids up to 2⁵³;
        the device is that of the labels, or the CPU where it has no float64 (MPS).
    """
    rows = []
    for label in labels:
        image = _reference_rows(label["class_labels"], label["boxes"], label["area"], label["orig_size"], crowd=0)
        if "crowd_boxes" in label:
            crowds = label["crowd_labels"], label["crowd_boxes"], label["crowd_area"]
            image = torch.cat([image, _reference_rows(*crowds, label["orig_size"], crowd=1)])
        if len(image) == 0:
            image = image.new_tensor([[_NO_OBJECT, 0, 0, 0, 0, 0, 0]])
        image_id = _float64(label["image_id"]).reshape(1, 1).expand(len(image), 1)
        rows.append(torch.cat([image_id, image], dim=1))
    return _pad(rows)


class StreamingCocoMetrics:
    """COCO metrics for `Trainer(compute_metrics=...)`: takes a batch at a time and keeps only detections.

    Called with packed batches; the last call of an evaluation, with ``compute_result=True``, returns the metrics and
    forgets the images. An evaluation that ended early leaves its images behind: `reset()` forgets them.

    Args:
        class_names: names by label, a sequence or `model.config.id2label`.
        backend: see `CocoEvaluator`.
    """

    def __init__(self, class_names: Sequence[str] | Mapping[int, str], backend: str = "auto"):
        self.evaluator = CocoEvaluator(class_names, backend)

    def __call__(self, batch: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Adds a batch.

        Args:
            batch: ``predictions`` from `pack_detections` and ``label_ids`` from `pack_references`, perhaps padded
                further and gathered.
            compute_result: whether this is the last batch.

        Returns:
            Nothing but for the last batch; then the metrics of all images, rounded to 4 decimals as in the Hugging
            Face examples: ``map``, ``map_50``, ..., and ``map_<class>``, ``mar_100_<class>`` per class. Left out: what
            is undefined because there is nothing to find, and what is named like another metric (a class "small").

        Raises:
            ValueError: if an image comes twice or a value is not finite (a model that diverged).
        """
        for detections, references in zip(_rows(batch.predictions), _rows(batch.label_ids), strict=True):
            detections = detections[detections[:, 0] != PADDING]
            image_id = int(references[0, 0])
            references = references[references[:, 1] >= 0]
            self.evaluator.add(
                image_id,
                {"labels": detections[:, 0], "scores": detections[:, 1], "boxes": detections[:, 2:]},
                {
                    "labels": references[:, 1],
                    "boxes": references[:, 2:6],
                    "area": references[:, 6],
                    "iscrowd": references[:, 7],
                },
            )
        if not compute_result:
            return {}
        metrics = self.evaluator.compute()
        self.reset()
        return flatten(metrics)

    def reset(self) -> None:
        """Forgets the images of an evaluation that was broken off."""
        self.evaluator.reset()


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `CocoEvaluator.compute` in one level, as `StreamingCocoMetrics` returns them."""
    flat = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    for prefix in ("map", "mar_100"):
        named = {f"{prefix}_{name}": value for name, value in metrics[f"{prefix}_per_class"].items()}
        flat = named | flat  # a class called "small" must not pass for the small objects
    order = sorted(flat, key=lambda key: key not in metrics)  # the summary first
    return {key: round(flat[key], 4) for key in order if flat[key] == flat[key]}


def _reference_rows(classes: Tensor, boxes: Tensor, area: Tensor, orig_size: Tensor, crowd: int) -> Tensor:
    """(N, 7): class, x1, y1, x2, y2, area, iscrowd."""
    classes, boxes, area, orig_size = (_float64(value) for value in (classes, boxes, area, orig_size))
    corners = center_to_corners_format(boxes.reshape(-1, 4)) * orig_size.flip(0).repeat(2)
    return torch.cat([classes[:, None], corners, area[:, None], torch.full_like(area, crowd)[:, None]], dim=1)


def _float64(value: Tensor) -> Tensor:
    return (value.cpu() if value.device.type == "mps" else value).double()


def _pad(rows: list[Tensor]) -> Tensor:
    """Images with different numbers of rows as one tensor, padded with -100."""
    length = max([1, *map(len, rows)])
    packed = rows[0].new_full((len(rows), length, rows[0].shape[1]), PADDING)
    for image, own in zip(packed, rows, strict=True):
        image[: len(own)] = own
    return packed


def _rows(packed: Any):
    """The images of a packed tensor as float64 arrays."""
    return torch.as_tensor(packed).double().cpu().numpy()
