"""QSKD: query selection knowledge distillation (arXiv 2409.06443)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..losses.attention import attention_mask
from ..losses.boxes import giou, l1
from ..losses.logits import class_kl
from ..losses.reduction import weighted_mean
from ..matching import HungarianMatcher, Match, ground_truth_matches, pair_layers
from ..projectors import MapProjector
from ..sampling import group_queries, pair_by_key
from .base import DistillationMethod, Paper, check_choice, check_class_loss


@dataclass(frozen=True)
class QSKDConfig:
    """Settings of `QSKD`. The paper's own numbers aren't public: these are of the TPRD toolbox (bb8ed01) or ours."""

    weights: dict[str, float] = field(
        # TPRD's, distill_criterion.py; it counts 100 in each of 6 layers
        default_factory=lambda: {"class": 1.0, "l1": 5.0, "giou": 2.0, "feature": 100.0}
    )
    temperature: float = 1.0
    class_loss: str = "bernoulli"
    """Of sigmoid students: "bernoulli" per class (TPRD), or "softmax" over the classes. Softmax students always have the
    latter."""
    hard_threshold: float = 0.0
    """A query without a target is a hard negative where its GIoU with one is above this (TPRD)."""
    hard_per_target: int = 20
    """At most so many hard negatives of a target, those of highest GIoU: early in training there are too many. Ours; the
    number of queries lifts the cap."""
    pairing: str = "set"
    """Of hard negatives: "set", the cheapest pairing of all of an image (TPRD); "per_gt", those of one target by the rank
    of their GIoU."""
    masks: str = "mean"
    """"mean" of all layers' masks, one comparison of the memory; "per_layer": one for each layer, added up (TPRD)."""
    mask_floor: float = 1e-6
    """Masks are divided by their maximum, or by this if more. TPRD's 0.01 flattens the masks of large memories."""
    projection: str = "if_needed"
    """Of the student's memory: only between different widths, or "always" (it starts as the identity)."""

    def __post_init__(self):
        check_choice(
            self,
            class_loss=("bernoulli", "softmax"),
            pairing=("set", "per_gt"),
            masks=("mean", "per_layer"),
            projection=("if_needed", "always"),
        )
        if not -1 <= self.hard_threshold < 1:
            raise ValueError(f"`hard_threshold` is {self.hard_threshold}; a GIoU lies between -1 and 1.")
        if self.hard_per_target < 1:
            raise ValueError(f"`hard_per_target` is {self.hard_per_target}; it must be 1 or more.")
        if not 0 < self.mask_floor < 1:
            raise ValueError(f"`mask_floor` is {self.mask_floor}; it must lie between 0 and 1.")


class QSKD(DistillationMethod):
    """Only some queries teach: those that found an object (positives) and those that nearly did (hard negatives).

    *Group query selection*, per layer, for each model: positives are its own assignment to the targets, hard negatives
    other queries with g_q = max_j GIoU(b_q, gt_j) > tau; the rest is discarded. *Attention-guided features*: where the
    teacher's selected queries Q look is what the student's memory F has to get right. *Local alignment*: positives are
    paired by their target, hard negatives among themselves.

    **Terms**:

    - ``feature``: mean_{p,c} (m_p F_pc^T - m_p phi(F_pc^S))^2 over real cells p, with
      m_p = mean_{q in Q} (1 + g_q) A_qp^T, divided by its maximum, and averaged over the layers
    - ``class``: sum_l mean_P KL(p^T || p^S) over the pairs P of a layer
    - ``l1``: sum_l mean_P ||b^T - b^S||_1
    - ``giou``: sum_l mean_P (1 - GIoU(b^T, b^S))

    All are 0 where there are no targets.

    **Differs from the paper**, whose full text and code are not public (its formulas are read off TPRD): one mask of all
    layers and a relative mask floor; hard negatives capped per target; classes as a KL; sampled attention is splatted.
    Selections and attention are of the same layer, which TPRD mixes up.
    """

    name = "qskd"
    paper = Paper(
        title="Knowledge Distillation via Query Selection for Detection Transformer",
        arxiv="2409.06443",
        bibtex="""@article{liu2024qskd,
  title = {Knowledge Distillation via Query Selection for Detection Transformer},
  author = {Liu, Yi and Wang, Luting and Tang, Zongheng and Liao, Yue and Sun, Yifan and Zhang, Lijun and Liu, Si},
  journal = {arXiv preprint arXiv:2409.06443},
  year = {2024}
}""",
    )
    config_class = QSKDConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        check_class_loss(self.name, config, student)
        self.predictions = any(config.weights[term] for term in ("class", "l1", "giou"))
        self.projector = None
        if config.weights["feature"]:
            if not teacher.provides & {"cross_attentions", "sampled_attentions"}:
                raise ValueError(
                    "method `qskd` needs the teacher's cross-attention for its feature term, which "
                    f"`{teacher.model.config.model_type}` doesn't provide. Set the weight of `feature` to 0."
                )
            self.projector = MapProjector(student, teacher, always=config.projection == "always")
            self.attentions = frozenset({"teacher"})
        self.matcher = HungarianMatcher()
        self.teacher_layers = pair_layers(student.num_layers, teacher.num_layers)

    def forward(self, student, teacher, targets, generator):
        terms = {name: student.boxes.new_zeros(()) for name in self.config.weights}
        of_teacher = self._groups(teacher, targets)
        if self.projector is not None:
            terms["feature"] = self._feature(student, teacher, of_teacher)
        if not self.predictions:
            return terms
        for s, (t, match) in enumerate(
            zip(self.teacher_layers, self._pairs(student, teacher, of_teacher, targets), strict=True)
        ):
            boxes = match.student(student.boxes[s]), match.teacher(teacher.boxes[t])
            terms["class"] = terms["class"] + class_kl(
                match.student(student.logits[s]),
                student.classification,
                match.teacher(teacher.logits[t]),
                teacher.classification,
                match.weight,
                temperature=self.config.temperature,
                form=self.config.class_loss,
            )
            terms["l1"] = terms["l1"] + l1(*boxes, match.weight)
            terms["giou"] = terms["giou"] + giou(*boxes, match.weight)
        return terms

    def _groups(self, view, targets):
        """Of every layer."""
        settings = self.config.hard_threshold, self.config.hard_per_target
        matches = ground_truth_matches(view, targets)
        return [
            group_queries(boxes, match, targets, *settings) for boxes, match in zip(view.boxes, matches, strict=True)
        ]

    def _feature(self, student, teacher, groups):
        maps, shapes = teacher.cross_attentions, teacher.memory_shapes
        masks = [
            attention_mask(
                maps,
                t,
                shapes,
                groups[t].selected * (1 + groups[t].overlap),
                teacher.memory_mask,
                self.config.mask_floor,
            )
            for t in self.teacher_layers
        ]
        pairs = self.projector(student, teacher)
        error = [(pair.student.float() - pair.teacher.float()).square().mean(1).flatten(1) for pair in pairs]
        error, real = torch.cat(error, 1), torch.cat([pair.mask.flatten(1) for pair in pairs], 1)
        if self.config.masks == "mean":
            masks = [torch.stack(masks).mean(0)]
        return sum(weighted_mean(mask.square() * error, real) for mask in masks)

    def _pairs(self, student, teacher, of_teacher, targets):
        """One match per student layer: positives of one target, then hard negatives."""
        groups = [
            (own, of_teacher[t]) for own, t in zip(self._groups(student, targets), self.teacher_layers, strict=True)
        ]
        number = max(len(image["boxes"]) for image in targets)
        positive = [
            pair_by_key((own.positive, own.target), (other.positive, other.target), number) for own, other in groups
        ]
        if self.config.pairing == "set":
            among = [(own.hard, other.hard) for own, other in groups]
            hard = self.matcher(student, teacher, self.teacher_layers, among)
        else:
            places = min(self.config.hard_per_target, max(student.boxes.shape[2], teacher.boxes.shape[2]))
            hard = [
                pair_by_key(
                    (own.hard, own.target * places + own.rank),
                    (other.hard, other.target * places + other.rank),
                    number * places,
                )
                for own, other in groups
            ]
        return [_both(*matches) for matches in zip(positive, hard, strict=True)]


def _both(first: Match, second: Match) -> Match:
    parts = ("student_index", "teacher_index", "weight")
    return Match(*(torch.cat([getattr(first, part), getattr(second, part)], dim=1) for part in parts))
