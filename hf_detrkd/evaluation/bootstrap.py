"""How much a difference in AP owes to the choice of the images: a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .coco_detection.coco_evaluator import CocoEvaluator, Matches

RECALLS = np.linspace(0, 1, 101)
"""At which COCO reads precision (pycocotools, cocoeval.py, Params.setDetParams)."""


def resampled_ap(evaluators: Sequence[CocoEvaluator], resamples: int = 200, seed: int = 0) -> np.ndarray:
    """(resamples, models): COCO AP in [0, 1] on images drawn with replacement, as many as there are; in each resample the same
    for all models. NaN where a resample has no object.

    Detections are matched once and only accumulated again, so a resample costs little.

    Args:
        evaluators: one per model, with the same images.

    Raises:
        ValueError: the models were evaluated on different images.
    """
    ids = evaluators[0].image_ids
    for evaluator in evaluators[1:]:
        if evaluator.image_ids != ids:
            raise ValueError(
                f"The models were evaluated on different images ({len(ids)} and {len(evaluator)}, "
                f"{len(set(ids) & set(evaluator.image_ids))} of them shared); a paired bootstrap needs the same ones."
            )
    matches = [evaluator.matches() for evaluator in evaluators]
    times = np.random.default_rng(seed).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=resamples)
    return np.array([[average_precision(of_model, one) for of_model in matches] for one in times])


def interval(differences: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled differences (resamples,); NaN don't count.

    It says what other images of the same kind would give with these weights. Another training run with another seed is another
    question: see `hf_detrkd.reporting.summary.interval`.
    """
    low, high = np.nanpercentile(differences, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def average_precision(matches: Sequence[Matches], times: np.ndarray) -> float:
    """COCO AP over the classes of a model, NaN without an object.

    Args:
        times: (I,) how often each image counts; once each gives `CocoEvaluator.compute`'s ``map``.
    """
    values = [_class_ap(one, times) for one in matches if (times * one.objects).any()]
    return float(np.mean(values)) if values else float("nan")


def _class_ap(matches: Matches, times: np.ndarray) -> float:
    """As pycocotools (cocoeval.py, accumulate), but only where recall rises: precision falls everywhere else."""
    objects = int((times * matches.objects).sum())
    weight = times[matches.image]
    so_far = np.cumsum(weight)
    total = 0.0
    for hits, ignored in zip(matches.hits, matches.ignored, strict=True):
        left_out = np.append(0, np.cumsum(weight[ignored]))[np.searchsorted(ignored, hits)]
        found = np.cumsum(weight[hits])
        precision = found / np.maximum(so_far[hits] - left_out, 1)
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        total += best[np.searchsorted(found / objects, RECALLS, side="left")].mean()
    return total / len(matches.hits)
