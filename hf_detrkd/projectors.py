"""Everything that owns parameters besides the student. Trained with it, saved beside it, never part of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .families import FamilyAdapter
from .losses.relation import related_pairs, relation, similarity, spread, standardised, with_mean_one
from .view import DetrView, Queries


def identity_linear(features_in: int, features_out: int) -> nn.Linear:
    """A linear map that starts as the identity on the channels both sides have, so equal widths start unchanged."""
    linear = nn.Linear(features_in, features_out)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class BoxEmbedding(nn.Module):
    """Position embeddings of boxes for decoders without a box in their queries: ``MLP(sine(cx, cy, w, h))``.

    KD-DETR's bridge to foreign queries (arXiv 2211.08071, heterogeneous distillation); two layers with ReLU as in
    Conditional DETR's reference point head.
    """

    temperature = 10000.0  # DETR, position_encoding.py

    def __init__(self, width: int):
        super().__init__()
        self.channels = 2 * math.ceil(width / 8)  # per coordinate, sines and cosines
        self.mlp = nn.Sequential(nn.Linear(4 * self.channels, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, boxes: Tensor) -> Tensor:
        """(B, k, 4) boxes to (B, k, width)."""
        exponent = torch.arange(self.channels // 2, device=boxes.device) * 2 / self.channels
        angles = boxes[..., None].float() * 2 * math.pi / self.temperature**exponent
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2))


class QueryProjector(nn.Module):
    """The teacher's queries in the student's terms.

    Each part of a query goes the shortest way that exists:

    - *reference*: a box is a box in every family; where the teacher has none, the place its answer gives.
    - *position*: through a linear map where both decoders take one; else the student's own for that place; a decoder
      that knows no boxes (DETR) learns an embedding of the place.
    - *content*: through a linear map where both decoders start from one and it is asked for; else the student's own.

    The linear maps start as the identity, so teacher and student of one width start from equal queries. No gradient
    reaches the teacher's queries or the student's own.
    """

    def __init__(self, student: FamilyAdapter, teacher: FamilyAdapter, content: bool = True):
        super().__init__()

        def both(part: str) -> bool:
            return part in student.provides and part in teacher.provides

        widths = teacher.width, student.width
        self.content = identity_linear(*widths) if content and both("content") else None
        self.position = identity_linear(*widths) if both("position") else None
        knows_boxes = "queries_from_boxes" in student.provides
        self.place = None if self.position is not None or knows_boxes else BoxEmbedding(student.width)
        self.knows_boxes = knows_boxes

    def forward(self, queries: Queries, places: Tensor, student: DetrView) -> Queries:
        """
        Args:
            queries: the teacher's, Q of them.
            places: (B, Q, 4) boxes where they stand.
            student: the view whose decoder is to take them.
        """
        queries, places = queries.detach(), places.detach().to(student.boxes.dtype)
        if self.knows_boxes:
            # Detached: the student's own queries learn from the task alone, wherever the points are
            own = replace(student, queries=student.queries.detach()).queries_from_boxes(places)
        else:
            zeros = places.new_zeros(*places.shape[:2], student.queries.content.shape[-1])
            own = Queries(zeros.to(student.queries.content.dtype))
        content = own.content if self.content is None else _through(self.content, queries.content)
        if self.position is not None:
            position = _through(self.position, queries.position)
        elif self.place is not None:
            position = self.place(places)
        else:
            position = own.position
        return Queries(content, position, own.reference)


def _through(linear: nn.Linear, x: Tensor) -> Tensor:
    """A teacher in half precision gives a student in full precision half-precision queries."""
    return linear(x.to(linear.weight.dtype))


class LearnedQueries(nn.Module):
    """An auxiliary group of queries of the student's own kind, the same for all images: an extra group of Group DETR.

    Embeddings start as ``nn.Embedding`` starts, references as boxes all over the image.
    """

    def __init__(self, student: FamilyAdapter):
        super().__init__()
        number, provides = student.num_queries, student.provides
        sizes = {
            "content": student.width if "content" in provides else 0,
            "position": student.width if "position" in provides else 0,
            "reference": student.reference_size,
        }
        self.parts = nn.ParameterDict({part: torch.randn(number, size) for part, size in sizes.items() if size})
        if "reference" in self.parts:
            nn.init.uniform_(self.parts["reference"], -3.0, 3.0)  # before a sigmoid: .05 to .95

    def forward(self, student: DetrView) -> Queries:
        """The queries for every image of a view."""
        batch = len(student.memory)
        parts = {part: value.expand(batch, -1, -1) for part, value in self.parts.items()}
        if "reference" in parts:
            parts["reference"] = parts["reference"].sigmoid()
        if "content" not in parts:
            parts["content"] = torch.zeros_like(student.queries.content)
        return Queries(**parts)


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
    """The student's maps in the teacher's terms: a 1x1 convolution, then resized to the teacher's grid.

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
            nearest = [min(range(len(own)), key=lambda i: abs(math.log(_cells(own[i]) / _cells(x)))) for x in others]
            own, masks = [own[i] for i in nearest], [masks[i] for i in nearest]
            convolutions = [self.levels[0]] * len(others)
        else:
            own, others = student.features[-len(self.levels) :], teacher.features[-len(self.levels) :]
            masks = [_resized_mask(student, x.shape[-2:]) for x in own]
            of_others = [_resized_mask(teacher, x.shape[-2:]) for x in others]
            convolutions = self.levels
        pairs = []
        for x, mask, target, its_mask, convolution in zip(own, masks, others, of_others, convolutions, strict=True):
            size = target.shape[-2:]
            x = convolution(_of_type(x, convolution))
            if x.shape[-2:] != size:
                x = interpolate(x, size=size, mode="bilinear", align_corners=False)
            mask = interpolate(mask[:, None].float(), size=size, mode="nearest")[:, 0] > 0
            pairs.append(PairedMaps(x, target.detach(), mask & its_mask))
        return tuple(pairs)


def identity_convolution(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 1x1 convolution that starts as the identity on the channels both sides have."""
    convolution = nn.Conv2d(channels_in, channels_out, 1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


class MaskedGeneration(nn.Module):
    """MGD's generator: the teacher's map from the student's with cells left out (arXiv 2205.01529, Eq. 3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, maps: Tensor, share: float, generator: torch.Generator | None) -> Tensor:
        """(B, C, h, w) from the same, with a ``share`` in [0, 1] of the cells set to 0 in all channels."""
        batch, _, height, width = maps.shape
        kept = torch.rand(batch, 1, height, width, generator=generator) > share if share < 1 else torch.zeros(1)
        return self.layers(maps * kept.to(maps))


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


def _cells(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1]


def _resized_mask(view: DetrView, size: tuple[int, int]) -> Tensor:
    """The mask of the finest level of the memory on a map of another size, (B, h, w)."""
    return interpolate(view.memory_masks()[0][:, None].float(), size=size, mode="nearest")[:, 0] > 0


def _of_type(x: Tensor, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    return x if weight is None else x.to(weight.dtype)


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
