"""Distances between feature maps, and the masks that weigh their cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad
from torch.nn.utils.rnn import pad_sequence

from ..grids import extents
from .boxes import inside_image, iou
from .reduction import mean_over_processes, weighted_mean


def scale_masks(boxes: Sequence[Tensor], mask: Tensor, *, inclusive: bool = False) -> tuple[Tensor, Tensor]:
    """Weights of the cells inside and outside of the objects, (B, h, w) each (FGD, CVPR 2022, Eq. 4; CLoCKDistill).

    A cell inside box k weighs one over the cells of box k, so that every object counts alike; where boxes overlap the
    smaller wins. A cell outside weighs one over the number of cells outside. Padding weighs nothing and isn't counted.

    Args:
        boxes: per image (N, 4) in [0, 1] of the unpadded image.
        mask: (B, h, w), True = real.
        inclusive: FGD's rasterisation, in which a box has the cell after its end too; else [floor, ceil).
    """
    foreground = torch.zeros(mask.shape, device=mask.device)
    for image, inside in enumerate(_cells_of(boxes, mask, inclusive)):
        if len(inside):
            cells = inside.flatten(1).sum(1).clamp(min=1)
            foreground[image] = (inside / cells[:, None, None]).amax(0)
    outside = (foreground == 0) & mask
    background = outside / outside.flatten(1).sum(1).clamp(min=1)[:, None, None]
    return foreground, background


def _cells_of(boxes: Sequence[Tensor], mask: Tensor, inclusive: bool = False) -> Iterator[Tensor]:
    """Image by image (N, h, w), True where a cell of the unpadded image touches a box."""
    rows = torch.arange(mask.shape[1], device=mask.device)[:, None]
    columns = torch.arange(mask.shape[2], device=mask.device)
    sizes = extents(mask).flip(-1)  # (B, 2) columns and rows
    for image_boxes, size, real in zip(boxes, sizes, mask, strict=True):
        centre, half = image_boxes[:, :2].float(), image_boxes[:, 2:].float() / 2
        # Rounded: 0.25 * 4 may come out as 1.0000001 in float32, whose ceiling is another cell
        first = ((centre - half) * size).mul(1e4).round().div(1e4).floor()[:, :, None, None]
        last = ((centre + half) * size).mul(1e4).round().div(1e4).ceil()[:, :, None, None] - (0 if inclusive else 1)
        inside_x = (columns >= first[:, 0]) & (columns <= last[:, 0])
        inside_y = (rows >= first[:, 1]) & (rows <= last[:, 1])
        yield inside_x & inside_y & real


def box_scores(boxes: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """For every cell the highest score of a box that it touches, (B, h, w); 0 outside of all boxes and in padding.

    Args:
        boxes: (B, Q, 4) in [0, 1] of the unpadded image.
        scores: (B, Q) in [0, 1].
        mask: (B, h, w), True = real.
    """
    covered = [
        torch.where(inside, image_scores[:, None, None], 0.0).amax(0)
        for image_scores, inside in zip(scores.float(), _cells_of(boxes, mask), strict=True)
    ]
    return torch.stack(covered)


def feature_mse(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over cells of the squared difference, averaged over channels.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w), taken as a constant.
        weight: (B, h, w) >= 0.
    """
    return weighted_mean((student.float() - teacher.detach().float()).square().mean(1), weight)


def relative_error(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """The squared difference as a share of the teacher's squares, ``sum w |s - t|^2 / sum w |t|^2``: the same for maps of any
    scale, 0 for the teacher's own map and 1 for one of zeros. Arguments as of `feature_mse`; 0 where nothing is selected.
    The teacher's squares are those of all processes, as every denominator here.
    """
    squares = mean_over_processes(feature_mse(torch.zeros_like(teacher), teacher, weight))
    return feature_mse(student, teacher, weight) / torch.where(squares == 0, 1.0, squares)


def fgd(
    student: Tensor,
    teacher: Tensor,
    masks: tuple[Tensor, Tensor],
    mask: Tensor,
    *,
    temperature: float = 0.5,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 1e-3,
) -> Tensor:
    """FGD's focal part (CVPR 2022, Eq. 8 and 9): where the teacher looks, objects apart from the background.

    Sums over cells and channels, mean over images. The defaults are fgd.py's for RetinaNet
    (yzd-v/FGD, mmdet/distillation/losses/fgd.py).

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w), taken as a constant.
        masks: of `scale_masks`.
        mask: (B, h, w), True = real.
    """
    student, teacher = student.float(), teacher.detach().float()
    spatial, channel = _where_it_looks(teacher, mask, temperature)
    own_spatial, own_channel = _where_it_looks(student, mask, temperature)
    squared = ((student - teacher).square() * channel[:, :, None, None]).sum(1) * spatial
    squared = torch.where(mask, squared, 0.0)
    foreground, background = ((squared * part).sum() for part in masks)
    attention = torch.where(mask, (own_spatial - spatial).abs(), 0.0).sum() + (own_channel - channel).abs().sum()
    return (alpha * foreground + beta * background + gamma * attention) / len(student)


def _where_it_looks(maps: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial (B, h, w) and channel (B, C) attention with means 1 (FGD, Eq. 5 to 7), over the real cells."""
    cells = mask.flatten(1).sum(1)
    spatial = (maps.abs().mean(1) / temperature).masked_fill(~mask, -torch.inf).flatten(1).softmax(-1)
    spatial = (spatial * cells[:, None]).view(mask.shape)
    mean = (maps.abs() * mask[:, None]).flatten(2).sum(-1) / cells[:, None]
    return spatial, maps.shape[1] * (mean / temperature).softmax(-1)


def cwd(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Channel-wise distillation (ICCV 2021, Eq. 4): T² KL of each channel's softmax over the real cells, mean over channels.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w), taken as a constant.
        mask: (B, h, w), True = real.
    """

    def spread(maps: Tensor) -> Tensor:
        logits = (maps.float() / temperature).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
        return logits.flatten(2).log_softmax(-1)

    log_q, log_p = spread(student), spread(teacher.detach())
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return weighted_mean(temperature**2 * divergence, torch.ones_like(divergence))


def pkd(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Pearson distance (PKD, NeurIPS 2022, Eq. 4): ``1 - r`` of each channel over the cells of the batch, mean over channels.

    Half the mean squared difference of the standardised maps. With the biased deviation it is exactly ``1 - r`` and
    doubling the batch changes nothing; the released code's unbiased one gives (n - 1) / n of it. Mean and deviation are
    those of this process's images.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w), taken as a constant.
        mask: (B, h, w), True = real.
    """

    def standardised(maps: Tensor) -> Tensor:
        cells = maps.float().movedim(1, -1)[mask]  # (cells, C)
        cells = cells - cells.mean(0)
        return cells / (cells.square().mean(0) + 1e-12).sqrt()  # inside: the root of 0 has an infinite gradient

    distance = (standardised(student) - standardised(teacher.detach())).square().mean(-1) / 2
    return weighted_mean(distance, torch.ones_like(distance))


def box_quality(scores: Tensor, boxes: Tensor, target_boxes: Sequence[Tensor], *, gamma: float | None = None) -> Tensor:
    """How good predicted boxes are, (B, n): ``score * IoU`` or, with ``gamma``, ``score^gamma * IoU^(1 - gamma)``.

    IoU is the highest with any target of the image, whatever its class, of the part of the box inside the image. Where
    an image has no targets the quality is the score (DETRDistill, ICCV 2023; its released head, lines 816-855).

    Args:
        scores: (B, n) in [0, 1].
        boxes: (B, n, 4) in the unit of the targets, which must be [0, 1] of the image.
        target_boxes: per image (N, 4).
    """
    # One box without an area more, which overlaps nothing: there is a maximum where no image has targets too
    objects = pad(pad_sequence([image.float() for image in target_boxes], batch_first=True), (0, 0, 0, 1))
    present = torch.tensor([[len(image) > 0] for image in target_boxes], device=scores.device)
    overlap = iou(inside_image(boxes)[:, :, None], objects[:, None]).amax(-1)
    scores = scores.float()
    quality = scores * overlap if gamma is None else scores**gamma * overlap ** (1 - gamma)
    return torch.where(present, quality, scores)


def target_aware_mask(states: Tensor, quality: Tensor, maps: Tensor, mask: Tensor, *, floor: float = 0.01) -> Tensor:
    """Where the objects are that a decoder saw, (B, h, w) with maximum 1 in every image; 0 in padding.

    ``max(sum_n quality_n cos(state_n, map_hw), floor)``, divided by its maximum over the real cells (DETRDistill, ICCV
    2023; the released distiller.py, lines 211-233).

    Args:
        states: (B, n, D) decoder states.
        quality: (B, n) >= 0.
        maps: (B, D, h, w) of the same model.
        mask: (B, h, w), True = real.
    """
    states, maps = normalize(states.detach().float(), dim=-1), normalize(maps.detach().float(), dim=1)
    # The sum over queries goes before the product with the map: no (B, n, h, w)
    direction = (quality.detach()[..., None] * states).sum(1)
    similarity = (direction[:, :, None, None] * maps).sum(1)
    raised = torch.where(mask, similarity.clamp(min=floor), 0.0)
    return raised / raised.flatten(1).amax(1).clamp(min=floor)[:, None, None]


def squared_sums(student: Tensor, teacher: Tensor, masks: tuple[Tensor, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_p m_p ||F^T_p - F^S_p||²`` under each of two masks, summed over channels and cells, mean over images.

    CLoCKDistill's memory distillation (arXiv 2502.10683, section 3.1) before its factors alpha and beta: FGD's focal
    part without attention. No mean over channels: alpha and beta are made for the sum.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w), taken as a constant.
        masks: (B, h, w) each, of `scale_masks`.
        mask: (B, h, w), True = real.
    """
    difference = torch.where(mask[:, None], student.float() - teacher.detach().float(), 0.0)
    squared = difference.square().sum(1)
    foreground, background = ((squared * part).sum() / len(squared) for part in masks)
    return foreground, background
