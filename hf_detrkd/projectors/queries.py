"""Queries in the student's terms: the teacher's, and learned ones."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..families import FamilyAdapter
from ..view import DetrView, Queries


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
