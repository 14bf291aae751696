"""Distillation points: the queries that teacher and student are both asked (KD-DETR, arXiv 2211.08071)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..projectors import QueryProjector
from ..view import DetrView, Queries


@dataclass(frozen=True)
class DistillationPoints:
    """Queries for the student, and what the teacher answers at the same places."""

    student: Queries
    """k queries with the projector's graph."""
    answers: DetrView
    """The teacher's view of its k queries at the same places, without graph."""


def places_of(view: DetrView) -> Tensor:
    """(B, Q, 4) where the view's own queries stand: their reference; what it lacks, their final boxes give.

    A reference that is a centre lacks the size.
    """
    reference, boxes = view.queries.reference, view.boxes[-1]
    return boxes if reference is None else torch.cat([reference, boxes[..., reference.shape[-1] :]], dim=-1)


def teacher_queries(student: DetrView, teacher: DetrView, projector: QueryProjector) -> DistillationPoints:
    """The specific points: the teacher's decoder inputs, exactly as its decoder got them, put to the student.

    The teacher's answers are its own view: it doesn't decode again.
    """
    return DistillationPoints(projector(teacher.queries, places_of(teacher), student), teacher)


def random_boxes(number: int, generator: torch.Generator | None, distribution: str = "uniform") -> Tensor:
    """(number, 4) boxes in (0, 1].

    "uniform": centres and sizes uniform. "logit_normal": the sigmoid of normal numbers, as KD-DETR's release draws
    them (kd_engine.py 57-60), which keeps mostly within .27 and .73.
    """
    if distribution == "logit_normal":
        return torch.randn(number, 4, generator=generator).sigmoid()
    return 1 - torch.rand(number, 4, generator=generator)


@torch.no_grad()
def ask_random(
    teacher: DetrView, number: int, generator: torch.Generator | None, distribution: str
) -> tuple[DetrView, Tensor]:
    """The teacher's answers to ``number`` random queries, the same for all images, and (B, number, 4) where they stand."""
    batch, device = teacher.boxes.shape[1], teacher.boxes.device
    if "queries_from_boxes" in teacher.adapter.provides:
        boxes = random_boxes(number, generator, distribution).to(device).expand(batch, -1, -1)
        return teacher.replay(teacher.queries_from_boxes(boxes)), boxes
    own = teacher.queries.position
    noise = torch.randn(number, own.shape[-1], generator=generator).to(own)
    position = (own.mean() + own.std() * noise).expand(batch, -1, -1)
    answers = teacher.replay(Queries(torch.zeros_like(position), position))
    return answers, answers.boxes[-1]


def random_queries(
    student: DetrView,
    teacher: DetrView,
    projector: QueryProjector,
    number: int,
    generator: torch.Generator | None,
    distribution: str = "uniform",
) -> DistillationPoints:
    """The general points: the same random places for both models and for all images.

    A teacher whose queries know no boxes is asked random position embeddings with the statistics of its own; the
    student is then asked where the teacher's answers lie (or the same embeddings through the projector).
    """
    answers, places = ask_random(teacher, number, generator, distribution)
    return DistillationPoints(projector(answers.queries, places, student), answers)
