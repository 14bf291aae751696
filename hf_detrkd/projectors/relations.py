"""DRKD's relations (arXiv 2302.05637): among the cells of a map, and among the objects of an image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..losses.relation import related_pairs, relation, similarity, spread, standardised, with_mean_one
from .maps import PairedMaps


class GloRe(nn.Module):
    """A map in which every cell has heard of all others: graph reasoning (GloRe, arXiv 1811.12814), as DRKD uses it.

    Cells gather into nodes, ``V = X P^T / cells``, nodes exchange, ``Z = ((I - A) V) W``, and what they learnt goes back
    to the cells, ``F = Z P``; the unit returns ``x + scale * E F``. The scale starts at 0, so that the unit starts as
    the identity.

    GloRe norms the last term by batch norm. Here is only its scale: batch statistics would tie teacher and student, who
    share the unit, and every image to the others and to the padding, would differ between processes, and leave the
    identity in training; and layer or group norm would give every image's correction the same size.

    Args:
        channels: C. Nodes C / 4 with C / 2 numbers each (GloRe, 2 to 1).
        released: with the bias and the ReLU of GloRe's code, ``Z = ReLU((I - A) V + b) W``.
        trained: False for a unit that stays at its random values, scale 1.
    """

    def __init__(self, channels: int, released: bool = False, trained: bool = True):
        super().__init__()
        numbers, nodes = max(1, channels // 2), max(1, channels // 4)
        self.state = nn.Conv2d(channels, numbers, 1)
        self.projection = nn.Conv2d(channels, nodes, 1)
        self.adjacency = nn.Linear(nodes, nodes, bias=released)
        self.activation = nn.ReLU() if released else nn.Identity()
        self.update = nn.Linear(numbers, numbers, bias=False)
        self.expansion = nn.Conv2d(numbers, channels, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1) if trained else torch.ones(channels, 1, 1))
        self.requires_grad_(trained)

    def forward(self, maps: Tensor, mask: Tensor) -> Tensor:
        """(B, C, h, w) from the same; ``mask`` (B, h, w), True = real: padding takes no part."""
        maps = maps.to(self.scale.dtype)
        real = mask[:, None].to(maps)
        projection = (self.projection(maps) * real).flatten(2)  # P, (B, nodes, cells)
        state = (self.state(maps) * real).flatten(2)  # X, (B, numbers, cells)
        cells = real.sum((2, 3)).clamp(min=1)[..., None]
        nodes = state @ (projection / cells).mT  # V, (B, numbers, nodes)
        nodes = self.activation(nodes - self.adjacency(nodes))
        nodes = self.update(nodes.mT).mT  # Z
        back = (nodes @ projection).unflatten(2, maps.shape[-2:])  # F
        return maps + self.scale * self.expansion(back)


class PairFilter(nn.Module):
    """Which pairs of objects matter: ``sigmoid(MLP([a; b]))`` over its mean, so that it selects and can't vanish.

    DRKD's relation filter; the paper's inner structure is not known, this one is ours.
    """

    hidden = 64

    def __init__(self, width: int):
        super().__init__()
        # The first layer of the MLP in two parts: no (B, N, N, 2 d)
        self.first, self.second = nn.Linear(width, self.hidden), nn.Linear(width, self.hidden, bias=False)
        self.last = nn.Linear(self.hidden, 1)

    def forward(self, objects: Tensor, present: Tensor) -> Tensor:
        """(B, N, N) of mean 1 over the pairs of an image; ``objects`` (B, N, d), ``present`` (B, N) the real ones."""
        pairs = self.first(objects)[:, :, None] + self.second(objects)[:, None]
        return with_mean_one(self.last(pairs.relu())[..., 0].float().sigmoid(), present)


class PixelRelation(nn.Module):
    """DRKD's phi: a `GloRe` for every width of maps.

    Args:
        channels: of the maps of every level, or of all levels at once where all go through one unit.
        form: "shared" by both models, the teacher's output a constant, so that the student's side alone moves it;
            "separate": one for each model, both trained; "frozen": shared, at its random values.
        released: as in `GloRe`.
    """

    watch_every = 100
    """Calls from one look at the spread to the next, as a look waits for the device (ours)."""
    least_spread = 0.01
    """Share of the teacher's variance that phi must keep (ours)."""

    def __init__(self, channels: Sequence[int], form: Literal["shared", "separate", "frozen"], released: bool = False):
        super().__init__()
        self.form, self.calls = form, 0
        units = [
            nn.ModuleList(GloRe(c, released, trained=form != "frozen") for c in channels)
            for _ in range(2 if form == "separate" else 1)
        ]
        self.of_student = units[0]
        self.of_teacher = units[1] if form == "separate" else None

    def forward(self, level: int, pair: PairedMaps) -> tuple[Tensor, Tensor]:
        """phi of the student's and of the teacher's map of a level, (B, C, h, w) each."""
        unit = min(level, len(self.of_student) - 1)
        teacher = (self.of_teacher or self.of_student)[unit](pair.teacher, pair.mask)
        if level == 0 and self.form != "frozen":
            if self.calls % self.watch_every == 0:
                self._watch(teacher.detach(), pair)
            self.calls += 1
        if self.of_teacher is None:
            teacher = teacher.detach()
        return self.of_student[unit](pair.student, pair.mask), teacher

    def _watch(self, related: Tensor, pair: PairedMaps) -> None:
        if spread(related, pair.mask) < self.least_spread * spread(pair.teacher, pair.mask):
            warnings.warn(
                f"phi has lost more than {1 - self.least_spread:.0%} of the variance of the teacher's maps: the term "
                "`pixel` is small because both of its sides shrank. Use relation='frozen', or a smaller weight.",
                stacklevel=2,
            )


class ObjectRelation(nn.Module):
    """DRKD's psi: how the objects of an image relate to each other.

    The objects are standardised. By default nothing is learnt: what makes the student's objects comparable is done
    before. So the teacher's psi stays what it is.

    Args:
        width: d.
        embedding: "student" as said; "both": learnt embeddings g1 and g2 of 128 channels for each model.
        filter: "none", "teacher" (`related_pairs`) or "learned" (`PairFilter`); the same for both models.
        dim: as in `losses.relation.relation`.
        temperature: of the cosines of the standardised objects; learnt embeddings have 1 / sqrt(128) instead.
    """

    channels = 128
    """Of learnt embeddings (methods.md 8.5)."""

    def __init__(self, width: int, embedding: str, filter: str, dim: str, temperature: float):
        super().__init__()
        self.dim, self.scale = dim, temperature * width
        self.embeddings = nn.ModuleList(nn.Linear(width, self.channels) for _ in range(4 if embedding == "both" else 0))
        self.filtered = filter != "none"
        self.filter = PairFilter(width) if filter == "learned" else None

    def forward(self, student: Tensor, teacher: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, N) psi of both models from their objects (B, N, d); ``present`` (B, N) the real ones."""
        s, t = standardised(student), standardised(teacher.detach())
        if self.embeddings:
            g1, g2, teacher_g1, teacher_g2 = self.embeddings
            scale = math.sqrt(self.channels)
            of_student, of_teacher = similarity(g1(s), g2(s), scale), similarity(teacher_g1(t), teacher_g2(t), scale)
        else:
            of_student, of_teacher = similarity(s, s, self.scale), similarity(t, t, self.scale)
        if self.filtered:
            w = related_pairs(similarity(t, t, self.scale), present) if self.filter is None else self.filter(t, present)
            of_student, of_teacher = w * of_student, w.detach() * of_teacher
        return relation(of_student, present, self.dim), relation(of_teacher, present, self.dim)
