"""Distances between feature maps, and the masks that weigh their cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    height, width = mask.any(2).sum(1), mask.any(1).sum(1)  # cells of the unpadded images
    rows = torch.arange(mask.shape[1], device=mask.device)
    columns = torch.arange(mask.shape[2], device=mask.device)
    for image, image_boxes in enumerate(boxes):
        if not len(image_boxes):
            continue
        centre, half = image_boxes[:, :2].float(), image_boxes[:, 2:].float() / 2
        size = torch.stack([width[image], height[image]])
        # Rounded: 0.25 * 4 may come out as 1.0000001 in float32, whose ceiling is another cell
        first = ((centre - half) * size).mul(1e4).round().div(1e4).floor()
        last = ((centre + half) * size).mul(1e4).round().div(1e4).ceil() - (0 if inclusive else 1)
        inside_x = (columns >= first[:, :1]) & (columns <= last[:, :1])
        inside_y = (rows >= first[:, 1:]) & (rows <= last[:, 1:])
        inside = inside_y[:, :, None] & inside_x[:, None] & mask[image]  # (N, h, w)
        cells = inside.flatten(1).sum(1).clamp(min=1)
        foreground[image] = (inside / cells[:, None, None]).amax(0)
    outside = (foreground == 0) & mask
    background = outside / outside.flatten(1).sum(1).clamp(min=1)[:, None, None]
    return foreground, background
