"""Whether two forms of one detector detect the same: as sets of detections, and by AP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalPrediction

from ..data.collator import DetectionCollator
from .detector import label_lookup, translated
from .streaming import StreamingCocoMetrics, pack_detections, pack_references

Detections = dict[str, Tensor]
"""``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), x1, y1, x2, y2 in pixels of the original image."""

Detector = Callable[[Tensor, Tensor], list[Detections]]
"""From ``pixel_values`` (B, 3, H, W) and original sizes (B, 2), height and width, to detections whatever their score."""


def torch_detector(model: PreTrainedModel, processor: BaseImageProcessor) -> Detector:
    """The model in PyTorch, called like an `OnnxDetector`."""

    def run(pixel_values: Tensor, sizes: Tensor) -> list[Detections]:
        with torch.no_grad():
            output = model.eval()(pixel_values=pixel_values.to(model.device))
        found = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes.to(model.device))
        return [{name: value.cpu() for name, value in one.items()} for one in found]

    return run


@dataclass(frozen=True)
class SetDifference:
    """How far two sets of detections are apart."""

    detections: int
    """Compared, of both sides."""
    unmatched: int
    """Without a partner of the same class within the tolerances."""
    score: float
    """Largest difference of matched scores."""
    box: float
    """Largest difference of matched corners, in shares of the image's longer side."""


def compare_sets(
    one: Sequence[Detections],
    other: Sequence[Detections],
    sizes: Tensor,
    *,
    threshold: float = 0.05,
    score_tolerance: float = 1e-3,
    box_tolerance: float = 2e-3,
) -> SetDifference:
    """Compares detections image by image, in whatever order they come: encoders that select queries by their score order
    them differently where scores are nearly equal.

    Every detection with a score of ``threshold`` or more, of either side, needs a partner on the other side, which may lie
    below the threshold. Partners are assigned so that scores and corners differ least in sum.
    """
    number = unmatched = 0
    score = box = 0.0
    for left, right, size in zip(one, other, sizes, strict=True):
        for a, b in ((left, right), (right, left)):
            kept = a["scores"] >= threshold
            a = {name: value[kept] for name, value in a.items()}
            number += len(a["scores"])
            if not len(a["scores"]):
                continue
            scores = (a["scores"][:, None] - b["scores"][None]).abs().float()
            corners = (a["boxes"][:, None] - b["boxes"][None]).abs().amax(-1).float() / size.max()
            fits = (
                (a["labels"][:, None] == b["labels"][None]) & (scores <= score_tolerance) & (corners <= box_tolerance)
            )
            rows, columns = linear_sum_assignment(torch.where(fits, scores + corners, 1e3).numpy())
            fitting = fits[rows, columns]
            unmatched += len(a["scores"]) - int(fitting.sum())
            if fitting.any():
                score = max(score, float(scores[rows, columns][fitting].max()))
                box = max(box, float(corners[rows, columns][fitting].max()))
    return SetDifference(number, unmatched, score, box)


def measure(
    detectors: Mapping[str, Detector],
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset,
    batch_size: int = 1,
) -> tuple[dict[str, dict[str, float]], SetDifference]:
    """COCO metrics of two detectors on the same pixels of a data set, and how far their detections are apart.

    Args:
        detectors: by name.
        model: that both are made from, for its class names.
        processor: makes the pixels, of one size.
        dataset: a `DetectionDataset`.
    """
    lookup = label_lookup(model, dataset.id2label)
    names = [dataset.id2label[index] for index in range(len(dataset.id2label))]
    metrics = {name: StreamingCocoMetrics(names) for name in detectors}
    results: dict[str, dict[str, float]] = {}
    found: dict[str, list[Detections]] = {name: [] for name in detectors}
    sizes = []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=DetectionCollator(processor))
    for index, batch in enumerate(loader, start=1):
        _check_unpadded(batch)
        targets = batch["labels"]
        sizes.append(torch.stack([target["orig_size"] for target in targets]))
        for name, detector in detectors.items():
            detections = detector(batch["pixel_values"], sizes[-1])
            found[name] += detections
            packed = pack_detections([translated(one, lookup) for one in detections])
            prediction = EvalPrediction(predictions=packed, label_ids=pack_references(targets))
            results[name] = metrics[name](prediction, compute_result=index == len(loader))
    return results, compare_sets(*found.values(), torch.cat(sizes))


def _check_unpadded(batch: Mapping) -> None:
    mask = batch.get("pixel_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError("The image processor pads, but an exported graph takes images of one size without padding.")
