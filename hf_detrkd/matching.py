"""Which query of the student belongs to which query of the teacher, or to which target."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher as DetrHungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from .losses.boxes import generalized_iou
from .losses.logits import as_kind
from .view import Classification, DetrView, take

Pairs = tuple[Tensor, Tensor]
"""(query index, target index) of one image, int64 on the CPU, in the order of the queries."""


@dataclass(frozen=True)
class Match:
    """M pairs in each of B images."""

    student_index: Tensor
    """(B, M) int64."""
    teacher_index: Tensor
    """(B, M) int64; index into the targets of the image where the match is one with the ground truth."""
    weight: Tensor
    """(B, M) float32; 0 marks padding, whose indices are 0."""

    def student(self, values: Tensor) -> Tensor:
        """``values`` (B, Q, ...) of the student at the pairs, (B, M, ...)."""
        return take(values, self.student_index)

    def teacher(self, values: Tensor) -> Tensor:
        """``values`` (B, Q or N, ...) of the teacher at the pairs, (B, M, ...)."""
        return take(values, self.teacher_index)


def identity_match(batch: int, queries: int, device: torch.device | str | None = None) -> Match:
    """Query i with query i: for replays of the same queries, and for students that share the teacher's."""
    index = torch.arange(queries, device=device).expand(batch, -1)
    return Match(index, index, torch.ones(batch, queries, device=device))


def pair_layers(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """The teacher layer, counted from 0, for every student layer.

    Student layer k takes teacher layer ``ceil(k * teacher_layers / student_layers)``, both counted from 1: the last
    goes with the last. In integers, because rounding halves to even gives layer -1 for 6 layers from 3.
    """
    return tuple(-(-k * teacher_layers // student_layers) - 1 for k in range(1, student_layers + 1))


@dataclass(frozen=True)
class HungarianMatcher:
    """The cheapest one-to-one pairing of the student's queries with the teacher's, image by image.

    The cost of a pair is ``class_cost`` times the cross-entropy of the student's class prediction with the teacher's as
    soft label, summed over classes, plus ``l1_cost`` times the L1 distance and ``giou_cost`` times minus the GIoU of
    the boxes. The defaults are those of DETR's matching with the ground truth; DETRDistill (arXiv 2211.10156) matches
    predictions with the same cost.
    Cross-entropy: binary where the student has sigmoid heads, categorical with the no-object column where both have
    softmax heads; two different heads are compared by the probabilities of their K classes.
    """

    class_cost: float = 1.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0

    def __post_init__(self) -> None:
        _check_costs(self)

    @torch.no_grad()
    def __call__(
        self,
        student: DetrView,
        teacher: DetrView,
        layers: Sequence[int] | None = None,
        among: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Match, ...]:
        """One match of M = min(Q of the student, Q of the teacher) pairs per student layer; one transfer to the host.

        Args:
            student: its logits (L, B, Q, ...), boxes (L, B, Q, 4) and classification are read.
            teacher: the same classes in the same order; layers and queries may differ in number.
            layers: the teacher layer for every student layer; None for ``pair_layers``.
            among: for every student layer which queries may be paired, (B, Q) of the student and (B, Q) of the teacher,
                True = may; None for all. Then M is the most that an image has pairs.

        Raises:
            ValueError: the two views differ in classes or images.
        """
        _check_comparable(student, teacher)
        if layers is None:
            layers = pair_layers(len(student.logits), len(teacher.logits))
        device = student.logits.device
        # Layer by layer: the temporaries of (B, Q, Q) stay small. Autocast off: it would round the costs to 8 bits.
        with torch.autocast(device.type, enabled=False):
            costs = [self._cost(student, k, teacher, layer) for k, layer in enumerate(layers)]
        blocks = [list(layer) for layer in _to_host(costs)]
        sides = [(None,) * len(block) for block in blocks] if among is None else _sides_to_host(among)
        # 300 x 300 takes 3 ms and more on one core, and scipy releases the interpreter lock.
        with ThreadPoolExecutor(min(os.cpu_count() or 1, len(blocks) * len(blocks[0]))) as pool:
            futures = [
                [pool.submit(_assign, *image) for image in zip(layer, of_layer, strict=True)]
                for layer, of_layer in zip(blocks, sides, strict=True)
            ]
        return matches([[future.result() for future in layer] for layer in futures], device)

    def _cost(self, student: DetrView, student_layer: int, teacher: DetrView, teacher_layer: int) -> Tensor:
        z, target = student.logits[student_layer].float(), teacher.logits[teacher_layer].float()
        if student.classification == teacher.classification == "softmax":
            classes = -z.log_softmax(-1) @ target.softmax(-1).mT
        else:
            z = as_kind(z, student.classification, "sigmoid")
            p = target.sigmoid() if teacher.classification == "sigmoid" else target.softmax(-1)[..., :-1]
            # softplus(-z) p + softplus(z) (1 - p) = softplus(z) - z p
            classes = softplus(z).sum(-1, keepdim=True) - z @ p.mT
        boxes = _box_cost(self, student.boxes[student_layer], teacher.boxes[teacher_layer])
        return boxes.add_(classes, alpha=self.class_cost)


@dataclass(frozen=True)
class GroundTruthMatcher:
    """transformers' matching of queries with targets, for all layers and images at once.

    The class cost is minus the probability of the target's class for softmax heads, and for sigmoid heads the
    difference of the focal losses with and without the target. transformers costs every query against the targets of
    all images, layer by layer, with one transfer each; this costs pairs inside an image, with one transfer.
    """

    class_cost: float = 1.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    classification: Classification = "sigmoid"
    alpha: float = 0.25
    """Share of the positive focal loss; sigmoid heads only. The default is RetinaNet's (arXiv 1708.02002)."""
    gamma: float = 2.0
    """Exponent of the focal loss; sigmoid heads only."""

    def __post_init__(self) -> None:
        _check_costs(self)

    @classmethod
    def like(cls, matcher: nn.Module) -> GroundTruthMatcher | None:
        """The same matching as transformers' ``matcher``; None where it is one with other rules (Group DETR's)."""
        kind = type(matcher)  # not isinstance: a subclass is one with another cost
        if kind is RTDetrHungarianMatcher:
            rule = ("sigmoid" if matcher.use_focal_loss else "softmax", matcher.alpha, matcher.gamma)
        elif kind is DeformableDetrHungarianMatcher:
            rule = ("sigmoid", 0.25, 2.0)  # fixed in its code
        elif kind is DetrHungarianMatcher:
            rule = ("softmax",)
        else:
            return None
        return cls(matcher.class_cost, matcher.bbox_cost, matcher.giou_cost, *rule)

    def __call__(
        self, logits: Sequence[Tensor], boxes: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> tuple[Match, ...]:
        """One match per layer; its ``teacher_index`` is the index of the target. Arguments as in ``pairs``."""
        return matches(self.pairs(logits, boxes, targets), logits[0].device)

    @torch.no_grad()
    def pairs(
        self, logits: Sequence[Tensor], boxes: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]
    ) -> list[list[Pairs]]:
        """The pairs of every layer and image, as transformers' matchers return them; one transfer to the host.

        Args:
            logits: L times (B, Q, K) or (B, Q, K + 1), or one tensor (L, B, Q, ...); Q may differ from layer to layer.
            boxes: L times (B, Q, 4).
            targets: B times ``class_labels`` (N,) and ``boxes`` (N, 4).
        """
        sizes = [len(target["class_labels"]) for target in targets]
        labels = pad_sequence([target["class_labels"] for target in targets], batch_first=True)
        target_boxes = pad_sequence([target["boxes"].float() for target in targets], batch_first=True)
        with torch.autocast(labels.device.type, enabled=False):
            costs = [self._cost(*layer, labels, target_boxes) for layer in zip(logits, boxes, strict=True)]
        return [
            [_assign(image[:, :size]) for image, size in zip(layer, sizes, strict=True)] for layer in _to_host(costs)
        ]

    def _cost(self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor) -> Tensor:
        index = labels[:, None].expand(-1, logits.shape[1], -1)
        if self.classification == "softmax":
            classes = -logits.float().softmax(-1).gather(-1, index)
        else:
            p = logits.float().gather(-1, index).sigmoid()
            positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
            negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
            classes = positive - negative
        return _box_cost(self, boxes, target_boxes).add_(classes, alpha=self.class_cost)


def ground_truth_matches(view: DetrView, targets: Sequence[Mapping[str, Tensor]]) -> tuple[Match, ...]:
    """The model's own assignment of its queries to the targets, with the costs its family trains with, layer by layer.

    Args:
        view: of an adapter.
        targets: per image ``class_labels`` (N,) among the view's classes, and ``boxes`` (N, 4).
    """
    matcher = GroundTruthMatcher(**view.adapter.matching_costs, classification=view.classification)
    return matcher(view.logits, view.boxes, targets)


def _box_cost(costs: HungarianMatcher | GroundTruthMatcher, a: Tensor, b: Tensor) -> Tensor:
    """Of every pair of (B, M, 4) and (B, N, 4), (B, M, N)."""
    a, b = a.float()[:, :, None], b.float()[:, None]
    # One coordinate at a time: no (B, M, N, 4) in memory.
    distance = sum((x - y).abs_() for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True))
    return distance.mul_(costs.l1_cost).sub_(generalized_iou(a, b), alpha=costs.giou_cost)


def _to_host(costs: Sequence[Tensor]) -> list[np.ndarray]:
    """All layers in one transfer. NaN and infinity become the largest number, so that scipy still finds a pairing."""
    flat = torch.cat([cost.flatten() for cost in costs])
    largest = torch.finfo(flat.dtype).max
    flat = flat.nan_to_num_(nan=largest, posinf=largest, neginf=largest).cpu()
    parts = flat.split([cost.numel() for cost in costs])
    return [part.view(cost.shape).numpy() for part, cost in zip(parts, costs, strict=True)]


def _sides_to_host(among: Sequence[tuple[Tensor, Tensor]]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The indices of the True ones of every layer and image, in one transfer."""
    flat = torch.cat([side.flatten() for layer in among for side in layer]).cpu()
    parts = iter(flat.split([side.numel() for layer in among for side in layer]))
    sides = [[next(parts).view(side.shape).numpy() for side in layer] for layer in among]
    return [[tuple(map(np.flatnonzero, image)) for image in zip(*layer, strict=True)] for layer in sides]


def _assign(cost: np.ndarray, among: tuple[np.ndarray, np.ndarray] | None = None) -> Pairs:
    if among is None:
        rows, columns = linear_sum_assignment(cost)
    else:
        rows, columns = linear_sum_assignment(cost[np.ix_(*among)])
        rows, columns = among[0][rows], among[1][columns]
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)


def matches(pairs: Sequence[Sequence[Pairs]], device: torch.device) -> tuple[Match, ...]:
    """The matches of all layers, padded to the longest image of all, in one transfer."""
    columns = zip(*((query, target, torch.ones_like(query)) for layer in pairs for query, target in layer), strict=True)
    padded = torch.stack([pad_sequence(column, batch_first=True) for column in columns])
    student, teacher, weight = padded.unflatten(1, (len(pairs), -1)).to(device).unbind()
    return tuple(map(Match, student, teacher, weight.float()))


def _check_costs(matcher: HungarianMatcher | GroundTruthMatcher) -> None:
    costs = {name: getattr(matcher, name) for name in ("class_cost", "l1_cost", "giou_cost")}
    if min(costs.values()) < 0 or max(costs.values()) == 0:
        raise ValueError(
            f"{type(matcher).__name__} was given {costs}. Costs must be >= 0 and at least one of them > 0: a pairing "
            "needs something to prefer. Leave them out for the usual 1, 5, 2."
        )


def _check_comparable(student: DetrView, teacher: DetrView) -> None:
    def sizes(view: DetrView) -> tuple[int, int]:
        return view.logits.shape[1], view.logits.shape[-1] - (view.classification == "softmax")

    if sizes(student) != sizes(teacher):
        raise ValueError(
            "HungarianMatcher compares predictions for the same images and classes, but the student's view has {} "
            "images and {} classes, the teacher's {} and {}. Map the classes by name: "
            "`adapter_for(model, classes=...)` with the indices of `LabelMap.between(...)`.".format(
                *sizes(student), *sizes(teacher)
            )
        )
