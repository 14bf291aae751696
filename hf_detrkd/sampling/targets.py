"""One query per object for both models (CLoCKDistill, arXiv 2502.10683)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from ..families import FamilyAdapter
from ..families.references import nearest, reference_logit
from ..projectors import identity_linear
from ..view import DetrView, Queries


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

    - *place*: the target's box, or its centre, where a family's queries have one. In families whose queries know no boxes
      (DETR) it is the place of that query of the model's own whose box comes to lie nearest.
    - *content*, "native": each model's own content at the place. "denoising": the teacher's denoising embedding of the
      class where it has one; the student has its own or, where it starts from learned content, the teacher's through a
      linear map; elsewhere as "native". "random": a random vector per class, the same for both models, and the place of
      families whose queries know no boxes is a random MLP of the box, at the scale of the teacher's own.

    What is random is seeded and frozen, a buffer; of narrower models the first channels. No gradient reaches what the
    models themselves bring; the linear map alone is trained.
    """

    seed = 0
    hidden = 64  # lanqz7766/GKD: MLP 4 -> 64 -> D with ReLU, on the logit of the box

    def __init__(
        self,
        student: FamilyAdapter,
        teacher: FamilyAdapter,
        content: Literal["native", "denoising", "random"] = "native",
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
        random = content == "random"
        places = random and not all("queries_from_boxes" in provides for provides in models)
        self.register_buffer("classes", classes if random else None)
        self.register_buffer("inner", layers[0] if places else None)
        self.register_buffer("outer", layers[1] if places else None)

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
        elif self.inner is None:
            queries = view.queries.select(nearest(boxes, view.boxes[-1]))
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
