"""DETR's detection loss of one decoder layer under an assignment that is given instead of searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid, one_hot
from torch.nn.utils.rnn import pad_sequence

from ..matching import Match
from ..view import Classification
from .boxes import generalized_iou, iou
from .reduction import mean_over_processes, weighted_mean


def set_loss(
    logits: Tensor,
    boxes: Tensor,
    classification: Classification,
    match: Match,
    targets: Sequence[Mapping[str, Tensor]],
    *,
    quality: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    no_object_weight: float = 0.1,
) -> dict[str, Tensor]:
    """The terms ``class``, ``l1`` and ``giou`` of set prediction, unweighted.

    Sigmoid heads: the focal loss of all queries, summed over classes, by the number of targets; or, where scores are to
    tell how good the box is, the varifocal loss (arXiv 2008.13367), whose target is the IoU of a pair. Softmax heads: the
    cross-entropy of all queries, where a query without a target is to say no-object and weighs ``no_object_weight``, by
    the sum of these weights. Boxes: ``||b - b*||_1`` and ``1 - GIoU(b, b*)`` of the pairs by the number of targets.
    That number counts all targets, paired or not, and is averaged over the processes, at least 1 (DETR, detr.py). So
    every process must call this equally often.

    Args:
        logits: (B, Q, K) where ``classification`` is "sigmoid", (B, Q, K + 1) with no-object last where it is "softmax".
        boxes: (B, Q, 4).
        match: queries in ``student_index``, targets in ``teacher_index``; pairs of weight 0 are padding, all others
            count alike.
        targets: per image ``class_labels`` (N,) < K and ``boxes`` (N, 4).
        quality: the varifocal loss of sigmoid heads, as RT-DETR trains them: against it, a focal loss raises the scores of
            boxes that don't fit.
        alpha: the focal loss's share of the positive; RetinaNet's (arXiv 1708.02002), as in transformers.
        gamma: its exponent, from there too.
        no_object_weight: DETR's ``eos_coef``.

    Returns:
        scalars in float32, with a graph also where there are no targets; ``l1`` and ``giou`` are 0 there.
    """
    logits, boxes = logits.float(), boxes.float()
    real = match.weight > 0
    # One row more, so that padding has something to point to where there are no targets
    labels, target_boxes = (_padded([image[name] for image in targets]) for name in ("class_labels", "boxes"))
    number = logits.new_tensor(sum(len(image["class_labels"]) for image in targets))
    number = mean_over_processes(number).clamp(min=1)

    # Padding writes to a query beyond the last
    queries, classes = logits.shape[1], logits.shape[2] - (classification == "softmax")
    wanted = labels.new_full((len(logits), queries + 1), classes)
    index = torch.where(real, match.student_index, queries)
    wanted = wanted.scatter(1, index, match.teacher(labels))[:, :queries]
    own, others = match.student(boxes), match.teacher(target_boxes).float()
    if classification == "softmax":
        entropy = -logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        class_loss = weighted_mean(entropy, torch.where(wanted == classes, no_object_weight, 1.0))
    else:
        present = one_hot(wanted, classes + 1)[..., :classes].bool()
        if quality:
            fits = logits.new_zeros(len(logits), queries + 1)
            fits = fits.scatter(1, index, iou(own, others).detach())[:, :queries, None] * present
            weight = torch.where(present, fits, (1 - alpha) * logits.detach().sigmoid() ** gamma)
            class_loss = (weight * binary_cross_entropy_with_logits(logits, fits, reduction="none")).sum() / number
        else:
            signed = torch.where(present, logits, -logits)  # sigmoid(signed): the probability given to what is true
            share = torch.where(present, alpha, 1 - alpha)
            class_loss = (share * (-signed).sigmoid() ** gamma * -logsigmoid(signed)).sum() / number

    distance = (own - others).abs().sum(-1)
    overlap = generalized_iou(own, others)
    return {
        "class": class_loss,
        "l1": torch.where(real, distance, 0.0).sum() / number,
        "giou": torch.where(real, 1 - overlap, 0.0).sum() / number,
    }


def _padded(values: Sequence[Tensor]) -> Tensor:
    return pad_sequence([torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in values], batch_first=True)
