"""Relations between the objects of an image (DRKD, arXiv 2302.05637): what an object is, and who it goes with.

N objects per image, padded; ``present`` (B, N) tells the real ones from the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import roi_align

from ..grids import extents
from ..matching import Match, ground_truth_matches
from ..view import DetrView, take
from .reduction import weighted_mean

CANONICAL = 224 / 16
"""Cells along an object that FPN reads from the level of stride 16 (arXiv 1612.03144, Eq. 1 with k0 = 4)."""
ROI_SIZE = 7
"""Cells along the common size of all objects (Fast R-CNN heads; DRKD's own is not known)."""


def padded_boxes(targets: Sequence[Mapping[str, Tensor]], limit: int) -> tuple[Tensor, Tensor]:
    """(B, N, 4) boxes of the targets, at most ``limit`` of an image, and (B, N) which of them are real."""
    boxes = [target["boxes"][:limit].float() for target in targets]
    number = torch.tensor([len(image) for image in boxes], device=boxes[0].device)
    boxes = pad_sequence(boxes, batch_first=True)
    return boxes, torch.arange(boxes.shape[1], device=boxes.device) < number[:, None]


def target_states(view: DetrView, targets: Sequence[Mapping[str, Tensor]], limit: int) -> tuple[Tensor, Tensor]:
    """(B, N, D) the last state of the query that the model's own assignment gives to every target, and (B, N) whether
    it gives one; at most ``limit`` targets of an image."""
    number = max(min(len(target["boxes"]), limit) for target in targets)
    query, given = query_of_target(ground_truth_matches(view, targets)[-1], number)
    return take(view.hidden_states[-1], query), given


def query_of_target(match: Match, targets: int) -> tuple[Tensor, Tensor]:
    """(B, N) the query that an assignment gives to each of N targets, and (B, N) whether it gives one."""
    index = torch.where(match.weight > 0, match.teacher_index, targets).clamp(max=targets)  # the rest goes to a spare
    query = torch.full((len(index), targets + 1), -1, device=index.device).scatter(1, index, match.student_index)
    query = query[:, :targets]
    return query.clamp(min=0), query >= 0


def object_features(maps: Sequence[Tensor], masks: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """(B, N, C * 49) what lies in the boxes, by RoIAlign at 7 x 7 cells; from the level that fits the size of the box.

    That is FPN's rule in cells instead of pixels: the coarsest level on which the box spans 14 cells or more (geometric
    mean of its sides), else the finest.

    Args:
        maps: per level (B, C, h, w), fine to coarse, equal C.
        masks: per level (B, h, w), True = real. Padding is at the right and at the bottom.
        boxes: (B, N, 4) in [0, 1] of the unpadded image.
    """
    images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    chosen = None
    for level, mask in zip(maps, masks, strict=True):
        cells = extents(mask).flip(-1)  # (B, 2) width and height without padding
        centre, size = (boxes * cells.repeat(1, 2)[:, None]).split(2, dim=-1)
        corners = torch.cat([centre - size / 2, centre + size / 2], -1).flatten(0, 1)
        rois = torch.cat([images[:, None].to(corners), corners], 1)
        aligned = roi_align(_continued(level.float(), cells), rois, ROI_SIZE, aligned=True)
        fits = size.prod(-1).flatten() >= CANONICAL**2
        chosen = aligned if chosen is None else torch.where(fits[:, None, None, None], aligned, chosen)
    return chosen.flatten(1).unflatten(0, boxes.shape[:2])


def _continued(maps: Tensor, cells: Tensor) -> Tensor:
    """Maps whose padding repeats the last real cells, as RoIAlign does beyond the border of a map without padding."""
    last = (cells - 1).clamp(min=0)
    column, row = (
        torch.arange(n, device=maps.device).minimum(last[:, i, None]) for i, n in enumerate(maps.shape[:1:-1])
    )
    image = torch.arange(len(maps), device=maps.device)[:, None, None]
    return maps.movedim(1, -1)[image, row[:, :, None], column[:, None]].movedim(-1, 1)


def standardised(x: Tensor, dim: int = -1) -> Tensor:
    """The same with mean 0 and deviation 1 along one dimension, float32: a LayerNorm without parameters."""
    x = x.float().movedim(dim, -1)
    return layer_norm(x, x.shape[-1:], eps=1e-6).movedim(-1, dim)  # the memory of an RT-DETR has a deviation of .03


def similarity(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(B, N, N) dot products of (B, N, d), over ``scale``; in float32 under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().mT / scale


def relation(similarities: Tensor, present: Tensor, dim: Literal["rows", "first"] = "rows") -> Tensor:
    """psi, (B, N, N): the softmax of similarities over the objects of the image; 0 where one of the two is padding.

    Args:
        similarities: (B, N, N), times the weights of a filter where there is one.
        dim: "rows" normalises over the second index, as attention does; "first" over the first.
    """
    pairs = _pairs(present)
    masked = similarities.masked_fill(~pairs, torch.finfo(similarities.dtype).min)
    return torch.where(pairs, masked.softmax(-1 if dim == "rows" else -2), 0.0)


def relation_loss(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """The squared difference of two psi (B, N, N), summed over the other objects, mean over the objects.

    Images with fewer than two objects don't count: their psi is 1 whatever the model says.
    """
    several = present & (present.sum(1, keepdim=True) > 1)
    return weighted_mean((student - teacher).square().sum(-1), several)


def pixel_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The squared difference of maps (B, C, h, w), mean over channels and real cells; ``mask`` (B, h, w)."""
    return weighted_mean((student.float() - teacher.float()).square().mean(1), mask)


def instance_loss(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """The squared difference of the objects (B, N, d), mean over d and over the objects."""
    return weighted_mean((student.float() - teacher.detach().float()).square().mean(-1), present)


def with_mean_one(weights: Tensor, present: Tensor) -> Tensor:
    """Weights (B, N, N) >= 0 of pairs over their mean over the pairs of the image; 0 for padding."""
    pairs = _pairs(present)
    weights = torch.where(pairs, weights, 0.0)
    number = pairs.sum((1, 2), keepdim=True).clamp(min=1)
    return weights * number / weights.sum((1, 2), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def related_pairs(similarities: Tensor, present: Tensor) -> Tensor:
    """A filter (B, N, N) of mean 1 from the teacher: n^2 times the softmax of its similarities over all pairs."""
    pairs = _pairs(present)
    masked = similarities.detach().masked_fill(~pairs, torch.finfo(similarities.dtype).min)
    if masked.numel() == 0:
        return masked
    return with_mean_one(masked.flatten(1).softmax(-1).view_as(masked), present)


def spread(maps: Tensor, mask: Tensor) -> Tensor:
    """The variance of maps (B, C, h, w) over the real cells of an image, mean over images and channels."""
    weight = mask[:, None].float()
    number = weight.sum((2, 3), keepdim=True).clamp(min=1)
    centred = maps.float() - (maps.float() * weight).sum((2, 3), keepdim=True) / number
    return ((centred.square() * weight).sum((2, 3), keepdim=True) / number).mean()


def _pairs(present: Tensor) -> Tensor:
    return present[:, :, None] & present[:, None]
