"""Maps of one model on the grid of another: the same cell has to be the same place of the image.

Image processors pad, or they don't: of a DETR's pixels a tall image may be the left half, of an RT-DETR's it is all. Where
the two differ, image goes onto image, not grid onto grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .view import DetrView


def frames_differ(one: DetrView, other: DetrView) -> bool:
    """Whether some image takes up another share of one model's pixels than of the other's.

    Masks tell it to a cell: shares that differ by less than a cell of the coarser grid are the same.
    """
    if one.memory_mask is None and other.memory_mask is None:
        return False
    masks = [view.memory_masks()[0] for view in (one, other)]
    cells = torch.tensor([mask.shape[1:] for mask in masks], device=masks[0].device)
    shares = torch.stack([extents(mask) for mask in masks]) / cells[:, None]
    return bool(((shares[0] - shares[1]).abs() * cells.amin(0) > 1).any())


def on_grid(maps: Tensor, mask: Tensor, onto: Tensor, *, padded: bool = False, **settings: Any) -> Tensor:
    """(B, C, H, W) maps on the grid of another model.

    Args:
        maps: (B, C, h, w).
        mask: (B, h, w) True = real: the upper left part.
        onto: (B, H, W) the same of the other model.
        padded: the frames differ (`frames_differ`): real cells go onto real cells, image by image, and the rest is 0.
        settings: of ``interpolate``.
    """
    size = onto.shape[-2:]
    if not padded:
        return maps if maps.shape[-2:] == size else interpolate(maps, size=size, **settings)
    images = []
    for image, (h, w), (height, width) in zip(maps, extents(mask).tolist(), extents(onto).tolist(), strict=True):
        # An image of no cell at all says nothing, in neither model
        real = interpolate(image[None, :, : max(h, 1), : max(w, 1)], size=(max(height, 1), max(width, 1)), **settings)
        images.append(pad(real, (0, size[1] - real.shape[-1], 0, size[0] - real.shape[-2])))
    return torch.cat(images)


def extents(mask: Tensor) -> Tensor:
    """(B, 2) rows and columns of the real cells."""
    return torch.stack([mask.any(2).sum(1), mask.any(1).sum(1)], -1)


def nearest_grid(size: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """The place among others, by (h, w), of the one with most nearly as many cells as a grid of (h, w); the first of equal ones."""
    return min(range(len(others)), key=lambda i: abs(math.log(math.prod(others[i]) / math.prod(size))))
