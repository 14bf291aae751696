"""Distillation points: the queries that teacher and student are both asked (KD-DETR, arXiv 2211.08071)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .projectors import QueryProjector
from .view import DetrView, Queries


@dataclass(frozen=True)
class DistillationPoints:
    """Pairs of queries at the same places."""

    student: Queries
    teacher: Queries | None
    """None: the teacher's own queries, whose answers its view already holds."""


def places_of(view: DetrView) -> Tensor:
    """(B, Q, 4) where the view's own queries stand: their reference boxes, or where they have none their final boxes."""
    reference = view.queries.reference
    return reference if reference is not None and reference.shape[-1] == 4 else view.boxes[-1]


def teacher_queries(student: DetrView, teacher: DetrView, projector: QueryProjector) -> DistillationPoints:
    """The specific points: the teacher's decoder inputs, exactly as its decoder got them, put to the student."""
    return DistillationPoints(projector(teacher.queries, places_of(teacher), student), None)


def random_boxes(number: int, generator: torch.Generator, distribution: str = "uniform") -> Tensor:
    """(number, 4) boxes in (0, 1].

    "uniform": centres and sizes uniform. "logit_normal": the sigmoid of normal numbers, as KD-DETR's release draws
    them (kd_engine.py 57-60), which keeps mostly within .27 and .73.
    """
    if distribution == "logit_normal":
        return torch.randn(number, 4, generator=generator).sigmoid()
    return 1 - torch.rand(number, 4, generator=generator)


def random_queries(
    student: DetrView,
    teacher: DetrView,
    projector: QueryProjector,
    number: int,
    generator: torch.Generator,
    distribution: str = "uniform",
) -> DistillationPoints:
    """The general points: the same random places for both models and for all images.

    A teacher whose queries know no boxes is asked random position embeddings with the statistics of its own; the
    student is then asked where the teacher's answers lie (or the same embeddings through the projector).
    """
    batch, device = teacher.boxes.shape[1], teacher.boxes.device
    if "queries_from_boxes" in teacher.adapter.provides:
        boxes = random_boxes(number, generator, distribution).to(device).expand(batch, -1, -1)
        queries = teacher.queries_from_boxes(boxes)
    else:
        own = teacher.queries.position
        noise = torch.randn(number, own.shape[-1], generator=generator).to(own)
        position = (own.mean() + own.std() * noise).expand(batch, -1, -1)
        queries = Queries(position.new_zeros(position.shape), position)
        with torch.no_grad():
            boxes = teacher.replay(queries).boxes[-1]
    return DistillationPoints(projector(queries, boxes, student), queries)
