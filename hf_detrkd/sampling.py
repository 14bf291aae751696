"""Distillation points: the queries that teacher and student are both asked (KD-DETR, arXiv 2211.08071); and the groups
of a model's own queries that are worth learning from (QSKD, arXiv 2409.06443)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad
from torch.nn.utils.rnn import pad_sequence

from .families import FamilyAdapter
from .families.references import reference_logit
from .losses.boxes import generalized_iou
from .matching import Match
from .projectors import QueryProjector, identity_linear
from .view import DetrView, Queries


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


@dataclass(frozen=True)
class TargetPoints:
    """One query per target for both models, which correspond by index."""

    student: Queries
    """k queries, real ones first."""
    teacher: Queries
    real: Tensor
    """(B, k) False where an image has fewer than k targets."""
    numbers: tuple[int, ...]
    """Targets of every image; k is the largest number, at least 1."""


class TargetQueries(nn.Module):
    """CLoCKDistill's target-aware queries (arXiv 2502.10683, section 3.2): both models are asked about every object.

    - *place*: the target's box, or its centre, where a family's queries have one; in families whose queries know no
      boxes (DETR) a random MLP of the box is their position embedding, the same for both models, at the scale of the
      teacher's own.
    - *content*, "denoising": the teacher's denoising embedding of the class where it has one; the student has its own or,
      where it starts from learned content, the teacher's through a linear map. Elsewhere, and with "native", each model's
      own content at the place. "random": a random vector per class, the same for both models.

    What is random is seeded and frozen, a buffer; of narrower models the first channels. No gradient reaches what the
    models themselves bring; the linear map alone is trained.
    """

    seed = 0
    hidden = 64  # lanqz7766/GKD: MLP 4 -> 64 -> D with ReLU, on the logit of the box

    def __init__(
        self,
        student: FamilyAdapter,
        teacher: FamilyAdapter,
        content: Literal["denoising", "native", "random"] = "denoising",
    ):
        super().__init__()
        width, generator = max(student.width, teacher.width), torch.Generator().manual_seed(self.seed)
        models = student.provides, teacher.provides
        self.by_label = content == "denoising" and "label_content" in teacher.provides
        lent = self.by_label and "label_content" not in student.provides and "content" in student.provides
        self.content = identity_linear(teacher.width, student.width) if lent else None
        # Each buffer is None where it isn't needed
        classes = torch.randn(student.num_classes, width, generator=generator)
        layers = [torch.randn(size, generator=generator) for size in ((self.hidden, 4), (width, self.hidden))]
        knows_boxes = all("queries_from_boxes" in provides for provides in models)
        self.register_buffer("classes", classes if content == "random" else None)
        self.register_buffer("inner", None if knows_boxes else layers[0])
        self.register_buffer("outer", None if knows_boxes else layers[1])

    def forward(self, student: DetrView, teacher: DetrView, targets: Sequence[Mapping[str, Tensor]]) -> TargetPoints:
        """
        Args:
            targets: per image ``class_labels`` (N,) among the views' classes, and ``boxes`` (N, 4).
        """
        numbers = tuple(len(target["class_labels"]) for target in targets)
        slots = max(1, *numbers)  # one even without targets: the decoders run alike on every process
        free = [slots - number for number in numbers]
        labels = torch.stack([pad(t["class_labels"], (0, n)) for t, n in zip(targets, free, strict=True)])
        boxes = torch.stack([pad(t["boxes"], (0, 0, 0, n), value=0.5) for t, n in zip(targets, free, strict=True)])
        real = torch.arange(slots, device=labels.device) < torch.tensor(numbers, device=labels.device)[:, None]

        of_teacher = self._queries(teacher, boxes, labels, teacher)
        of_student = self._queries(student, boxes, labels, teacher)
        if self.content is not None:
            content = self.content(of_teacher.content.to(self.content.weight.dtype))
            of_student = replace(of_student, content=content)
        return TargetPoints(of_student, of_teacher, real, numbers)

    @torch.no_grad()
    def _queries(self, view: DetrView, boxes: Tensor, labels: Tensor, teacher: DetrView) -> Queries:
        content = view.queries.content
        if "queries_from_boxes" in view.adapter.provides:
            queries = view.queries_from_boxes(boxes.to(view.boxes.dtype), labels if self.by_label else None)
        else:
            position = self._position(boxes, teacher)[..., : content.shape[-1]].to(content.dtype)
            queries = Queries(torch.zeros_like(position), position)
        if self.classes is not None:
            queries = replace(queries, content=self.classes[labels][..., : content.shape[-1]].to(content.dtype))
        return queries.detach()

    def _position(self, boxes: Tensor, teacher: DetrView) -> Tensor:
        hidden = (reference_logit(boxes.float()) @ self.inner.T).relu()
        position = layer_norm(hidden @ self.outer.T, self.outer.shape[:1])
        own = None if "queries_from_boxes" in teacher.adapter.provides else teacher.queries.position
        return position if own is None else own.mean() + own.std() * position


def decode_targets(view: DetrView, queries: Queries, points: TargetPoints, groups: int = 1) -> tuple[DetrView, ...]:
    """A model's answers to its queries of ``points``, once per group; those at padding mean nothing.

    Queries of an image see each other and no padding. A decoder that takes no mask decodes once per number of targets
    that occurs in the batch, with that many queries in all images.
    """
    numbers = [max(1, number) for number in points.numbers]
    if len(set(numbers)) > 1 and "query_mask" not in view.adapter.provides:
        return tuple(_decode_by_number(view, queries, numbers) for _ in range(groups))
    # Without padding among them images without targets too have one query, which sees itself
    queries = replace(queries, mask=points.real if len(set(numbers)) > 1 else None)
    answers = view.replay(*[queries] * groups)
    return answers if groups > 1 else (answers,)


def _decode_by_number(view: DetrView, queries: Queries, numbers: Sequence[int]) -> DetrView:
    names = "logits", "boxes", "hidden_states"
    together = dict.fromkeys(names, 0.0)
    for number in sorted(set(numbers)):
        index = torch.arange(number, device=queries.content.device).expand(len(numbers), -1)
        answer = view.replay(queries.select(index))
        own = torch.tensor([n == number for n in numbers], device=index.device)[:, None, None]
        for name in names:
            values = pad(getattr(answer, name), (0, 0, 0, len(queries) - number))
            together[name] = torch.where(own, values, together[name])
    return replace(answer, queries=queries, self_attentions=None, cross_attentions=None, **together)
