"""Distances of paired boxes, all ``(cx, cy, w, h)`` in one common unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .reduction import weighted_mean


def l1(student: Tensor, teacher: Tensor, weight: Tensor, *, coordinates: Literal["sum", "mean"] = "sum") -> Tensor:
    """Weighted mean over the pairs of the absolute differences.

    Args:
        student: (..., 4) boxes.
        teacher: (..., 4) boxes of the same pairs, taken as constants.
        weight: (...) >= 0, broadcastable.
        coordinates: "sum" adds the four differences, as DETR's own box loss does; "mean" averages them, as KD-DETR's
            released code does.
    """
    distance = (student.float() - teacher.detach().float()).abs()
    return weighted_mean(distance.sum(-1) if coordinates == "sum" else distance.mean(-1), weight)


def giou(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over the pairs of ``1 - GIoU``, in [0, 2]; exactly 0 for equal boxes that have an area.

    Args:
        student: (..., 4) boxes.
        teacher: (..., 4) boxes of the same pairs, taken as constants.
        weight: (...) >= 0, broadcastable.
    """
    return weighted_mean(1 - generalized_iou(student, teacher.detach()), weight)


@torch.no_grad()
def teacher_is_better(student: Tensor, teacher: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(B, M) True where the teacher's box of a pair overlaps a target more than the student's (TADF, arXiv 2006.13108).

    The target is the one that the teacher's box overlaps most. False everywhere in an image without targets.

    Args:
        student: (B, M, 4).
        teacher: (B, M, 4) of the same pairs.
        targets: per image ``boxes`` (N, 4).
    """
    better = torch.zeros(student.shape[:2], dtype=torch.bool, device=student.device)
    for image, target in enumerate(targets):
        if len(target["boxes"]):
            overlap, nearest = iou(teacher[image][:, None], target["boxes"][None]).max(1)
            better[image] = overlap > iou(student[image], target["boxes"][nearest])
    return better


def inside_image(boxes: Tensor) -> Tensor:
    """(..., 4) the part of boxes (..., 4) that lies in the image, in [0, 1]; without an area where there is none."""
    centre, size = boxes.float().split(2, dim=-1)
    low, high = (centre - size / 2).clamp(0, 1), (centre + size / 2).clamp(0, 1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU in [0, 1], float32, elementwise over (..., 4); 0 where neither box has an area."""
    return iou_of_corners(_corners(a), _corners(b))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019, Algorithm 1) in [-1, 1], float32.

    Elementwise over (..., 4); for every pair of (B, M, 4) and (B, N, 4) give ``a[:, :, None], b[:, None]``. Two boxes
    without an area count as disjoint instead of NaN.
    """
    return generalized_iou_of_corners(_corners(a), _corners(b))


def iou_of_corners(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """As `iou`, of boxes given as four tensors: left, top, right, bottom."""
    intersection, union = _overlap(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou_of_corners(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """As `generalized_iou`, of boxes given as four tensors: left, top, right, bottom."""
    intersection, union = _overlap(a, b)
    (a_left, a_top, a_right, a_bottom), (b_left, b_top, b_right, b_bottom) = a, b
    hull = _area(
        torch.minimum(a_left, b_left),
        torch.minimum(a_top, b_top),
        torch.maximum(a_right, b_right),
        torch.maximum(a_bottom, b_bottom),
    )
    tiny = torch.finfo(union.dtype).tiny
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cx, cy, w, h = boxes.float().unbind(-1)
    return cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h


def _overlap(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of boxes as corners."""
    # Before the intersection, as in transformers: gradients are then added up in the same order, and equal to the bit.
    areas = _area(*a) + _area(*b)
    first, last = (
        [torch.maximum(x, y) for x, y in zip(a[:2], b[:2], strict=True)],
        [torch.minimum(x, y) for x, y in zip(a[2:], b[2:], strict=True)],
    )
    intersection = _area(*first, *last)
    return intersection, areas - intersection


def _area(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
    # Clamped for boxes of negative size, which heads that predict distances to the four sides can give.
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
