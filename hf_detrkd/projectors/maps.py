"""The student's maps in the teacher's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..families import FamilyAdapter
from ..grids import frames_differ, nearest_grid, on_grid
from ..losses.reduction import mean_over_processes
from ..view import DetrView


@dataclass(frozen=True)
class PairedMaps:
    """One level of maps of both models, on the teacher's grid and in the teacher's channels."""

    student: Tensor
    """(B, C, h, w) with graph."""
    teacher: Tensor
    """(B, C, h, w) without graph."""
    mask: Tensor
    """(B, h, w) True = real in both models."""


class MapProjector(nn.Module):
    """The student's maps in the teacher's terms: a 1x1 convolution, then resized to the teacher's grid, image onto image.

    - ``tap="memory"``: the maps that the decoder reads. One convolution for all levels, because the decoder too reads
      all of them by one projection. Every level of the teacher goes with the student's level of the nearest grid.
    - ``tap="backbone"``: the backbone's maps, paired from the coarsest down; a convolution for every pair.

    Args:
        always: a convolution where the channels are equal too. It starts as the identity on the channels both sides
            have, so that equal models start with equal maps; without it equal channels are compared as they are.
    """

    def __init__(
        self,
        student: FamilyAdapter,
        teacher: FamilyAdapter,
        tap: Literal["memory", "backbone"] = "memory",
        always: bool = False,
    ):
        super().__init__()
        self.tap = tap
        if tap == "memory":
            channels = [(student.memory_width, teacher.memory_width)]
        else:
            levels = min(len(student.feature_channels), len(teacher.feature_channels))
            channels = list(zip(student.feature_channels[-levels:], teacher.feature_channels[-levels:], strict=True))
        self.levels = nn.ModuleList(
            identity_convolution(*pair) if always or pair[0] != pair[1] else nn.Identity() for pair in channels
        )

    def forward(self, student: DetrView, teacher: DetrView) -> tuple[PairedMaps, ...]:
        """One pair per level of the teacher that has a partner, fine to coarse."""
        if self.tap == "memory":
            own, masks = student.memory_maps(), student.memory_masks()
            others, of_others = teacher.memory_maps(), teacher.memory_masks()
            nearest = [nearest_grid(size, student.memory_shapes) for size in teacher.memory_shapes]
            own, masks = [own[i] for i in nearest], [masks[i] for i in nearest]
            convolutions = [self.levels[0]] * len(others)
        else:
            own, others = student.features[-len(self.levels) :], teacher.features[-len(self.levels) :]
            masks = [_resized_mask(student, x.shape[-2:]) for x in own]
            of_others = [_resized_mask(teacher, x.shape[-2:]) for x in others]
            convolutions = self.levels
        padded, pairs = frames_differ(student, teacher), []
        for x, mask, target, its_mask, convolution in zip(own, masks, others, of_others, convolutions, strict=True):
            x = on_grid(convolution(_of_type(x, convolution)), mask, its_mask, padded=padded, mode="bilinear")
            mask = on_grid(mask[:, None].float(), mask, its_mask, padded=padded, mode="nearest")[:, 0] > 0
            pairs.append(PairedMaps(x, target.detach(), mask & its_mask))
        return tuple(pairs)


class MatchedScale(nn.Module):
    """The student's maps in the unit of the teacher's where theirs is larger: times one factor, measured on the first batch.

    Families have scales of their own: a memory that leaves a LayerNorm has squares of 1, those of our RT-DETR teachers are
    0.001. Relative to these the error of such a student is a thousand, and until the projector has bridged that, which
    takes it hundreds of steps, the task gets no gradient. Smaller maps stay as they are: their relative error is 1, and
    those of an untrained RT-DETR are so small that they say nothing of the maps to come.

    The factor is no parameter: with it the projector keeps the size for which its learning rate is made.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.zeros(()))  # 0: not measured yet

    def forward(self, pairs: Sequence[PairedMaps]) -> tuple[PairedMaps, ...]:
        """The same pairs, with the student's maps times the factor, which is at most 1."""
        if not self.factor:
            own, others = (
                mean_over_processes(sum(_squares(getattr(pair, role), pair.mask) for pair in pairs))
                for role in ("student", "teacher")
            )
            self.factor.copy_(torch.where(others > 0, (others / own).sqrt().clamp(max=1), 1.0))
        return tuple(replace(pair, student=self.factor * pair.student) for pair in pairs)


def identity_convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as the identity on the channels both sides have."""
    convolution = nn.Conv2d(channels_in, channels_out, 1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


def _squares(maps: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[:, None], maps.detach().float(), 0.0).square().sum()


def _resized_mask(view: DetrView, size: tuple[int, int]) -> Tensor:
    """The mask of the finest level of the memory on a map of another size, (B, h, w)."""
    return interpolate(view.memory_masks()[0][:, None].float(), size=size, mode="nearest")[:, 0] > 0


def _of_type(x: Tensor, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    return x if weight is None else x.to(weight.dtype)
