"""Groups of a model's own queries that are worth learning from (QSKD, arXiv 2409.06443)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..losses.boxes import generalized_iou
from ..matching import Match


@dataclass(frozen=True)
class QueryGroups:
    """The queries of one decoder layer by what they have to do with the targets (QSKD's group query selection)."""

    positive: Tensor
    """(B, Q) True where the query is assigned to a target."""
    hard: Tensor
    """(B, Q) True where it is assigned to none, but lies on one: a hard negative. The rest are easy negatives."""
    overlap: Tensor
    """(B, Q) GIoU with the assigned target, or the highest with any; 0 for queries of images without targets."""
    target: Tensor
    """(B, Q) the index of that target."""
    rank: Tensor
    """(B, Q) of a hard negative: its place among those of its target, by overlap, from 0."""

    @property
    def selected(self) -> Tensor:
        """(B, Q) positives and hard negatives."""
        return self.positive | self.hard


@torch.no_grad()
def group_queries(
    boxes: Tensor, match: Match, targets: Sequence[Mapping[str, Tensor]], threshold: float = 0.0, per_target: int = 20
) -> QueryGroups:
    """The groups of the queries of one layer.

    Args:
        boxes: (B, Q, 4).
        match: the layer's assignment to the targets, as ``ground_truth_matches`` gives it.
        targets: per image ``class_labels`` (N,) and ``boxes`` (N, 4).
        threshold: hard negatives have a GIoU above it.
        per_target: of the hard negatives of a target, this many with the highest GIoU are kept; the others count as easy.
    """
    number = torch.tensor([len(image["boxes"]) for image in targets], device=boxes.device)
    # One column more, so that there is one where no image has targets
    target_boxes = pad_sequence(
        [torch.cat([t["boxes"], t["boxes"].new_zeros(1, 4)]) for t in targets], batch_first=True
    )
    giou = generalized_iou(boxes[:, :, None], target_boxes[:, None])  # (B, Q, N + 1)
    real = torch.arange(giou.shape[-1], device=boxes.device) < number[:, None]
    overlap, target = giou.masked_fill(~real[:, None], -2.0).max(-1)

    # Padding writes to a query beyond the last
    queries = boxes.shape[1]
    index = torch.where(match.weight > 0, match.student_index, queries)
    assigned = target.new_full((len(boxes), queries + 1), -1).scatter(1, index, match.teacher_index)[:, :queries]
    positive = assigned >= 0
    target = torch.where(positive, assigned, target)
    overlap = torch.where(positive, giou.gather(-1, target[..., None])[..., 0], overlap)

    hard = ~positive & (overlap > threshold) & (number[:, None] > 0)
    order = torch.where(hard, overlap, -torch.inf).argsort(dim=1, descending=True, stable=True)
    in_order = torch.nn.functional.one_hot(target, giou.shape[-1]) * hard[..., None]
    in_order = in_order.gather(1, order[..., None].expand_as(in_order))
    places = ((in_order.cumsum(1) - 1) * in_order).sum(-1)
    rank = torch.zeros_like(places).scatter(1, order, places)
    overlap = torch.where(number[:, None] > 0, overlap, 0.0)
    return QueryGroups(positive, hard & (rank < per_target), overlap, target, rank)


def pair_by_key(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], keys: int) -> Match:
    """The match of the queries that have the same key, M = ``keys``.

    Args:
        student: (B, Q) True for the queries that take part, and (B, Q) their keys below ``keys``, each of them once.
        teacher: the same of the teacher.
    """

    def by_key(part: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.arange(part.shape[1], device=part.device).expand(len(part), -1)
        table = own.new_full((len(part), keys + 1), -1).scatter(1, torch.where(part, key, keys), own)[:, :keys]
        return table.clamp(min=0), table >= 0

    (of_student, in_student), (of_teacher, in_teacher) = by_key(*student), by_key(*teacher)
    both = in_student & in_teacher
    return Match(of_student * both, of_teacher * both, both.float())
