"""What MGD and FGD learn on a map: to generate the teacher's from a part, and what all of it says to every cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MaskedGeneration(nn.Module):
    """MGD's generator: the teacher's map from the student's with cells left out (arXiv 2205.01529, Eq. 3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, maps: Tensor, mask: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
        """(B, C, h, w) from the same, with a ``share`` in [0, 1] of the cells set to 0 in all channels; padding, False in ``mask``
        (B, h, w), is 0 as what lies beyond the border."""
        batch, _, height, width = maps.shape
        kept = torch.rand(batch, 1, height, width, generator=generator) > share if share < 1 else torch.zeros(1)
        real, (first, activation, last) = mask[:, None], self.layers
        maps = torch.where(real, maps * kept.to(maps), 0)
        return last(torch.where(real, activation(first(maps)), 0))


class GlobalContext(nn.Module):
    """FGD's global relation of a map (GcBlock, arXiv 1904.11492): every cell gets what one glance at all cells says.

    The last layer starts at zero, as there, so that the block starts as the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.attention = nn.Conv2d(channels, 1, 1)
        hidden = max(1, channels // 2)  # fgd.py
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, maps: Tensor, mask: Tensor) -> Tensor:
        """(B, C, h, w) from the same; ``mask`` (B, h, w) True = real."""
        weights = self.attention(maps)[:, 0].float().masked_fill(~mask, -torch.inf).flatten(1).softmax(-1)
        context = (maps.flatten(2) @ weights[..., None].to(maps.dtype))[..., 0]
        return maps + self.transform(context)[:, :, None, None]
