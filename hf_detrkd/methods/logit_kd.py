"""Distillation of predictions over a one-to-one matching of the two models' queries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..losses.boxes import giou, l1, teacher_is_better
from ..losses.logits import class_kl
from ..matching import HungarianMatcher, pair_layers
from .base import DistillationMethod, check_choice, check_class_loss


@dataclass(frozen=True)
class LogitKDConfig:
    """Settings of `LogitKD`."""

    weights: dict[str, float] = field(default_factory=lambda: {"class": 1.0, "l1": 5.0, "giou": 2.0})
    """Detection's own proportions (DETR, main.py; also the pairs of DETRDistill's released code)."""
    temperature: float = 1.0
    class_loss: str = "bernoulli"
    """Of sigmoid students: "bernoulli" per class, or "softmax" over the classes. Softmax students always have the latter."""
    layers: str = "all"
    """"all": every student layer with its teacher layer (`pair_layers`); "last": the last ones only."""
    better_boxes_only: bool = False
    """Box terms only where the teacher's box is nearer to a target than the student's (TADF, arXiv 2006.13108)."""

    def __post_init__(self):
        check_choice(self, class_loss=("bernoulli", "softmax"), layers=("all", "last"))


class LogitKD(DistillationMethod):
    """The plain baseline among the methods: Hungarian matching of student and teacher predictions, then soft classes and
    boxes, weighted by the teacher's confidence.

    **Terms**, per student layer l, over the pairs (i, j) of the matching with w_j = max_c p_jc of the teacher:

    - ``class``: sum_l sum w_j KL(p_j^T || p_i^S) / sum w_j
    - ``l1``: sum_l sum w_j ||b_i - b_j||_1 / sum w_j
    - ``giou``: sum_l sum w_j (1 - GIoU(b_i, b_j)) / sum w_j

    **Differs from the paper**: there is none. It is what users write first; DETRDistill refines it.
    """

    name = "logit_kd"
    config_class = LogitKDConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        check_class_loss(self.name, config, student)
        self.matcher = HungarianMatcher()
        layers = pair_layers(student.num_layers, teacher.num_layers)
        self.teacher_layers = layers[-1:] if config.layers == "last" else layers

    def forward(self, student, teacher, targets, generator):
        first = len(student.logits) - len(self.teacher_layers)
        student = replace(student, logits=student.logits[first:], boxes=student.boxes[first:])
        matches = self.matcher(student, teacher, self.teacher_layers)
        confidence = teacher.class_probs().amax(-1)
        terms = {name: student.boxes.new_zeros(()) for name in self.config.weights}
        for s, (t, match) in enumerate(zip(self.teacher_layers, matches, strict=True)):
            weight = match.weight * match.teacher(confidence[t])
            boxes = match.student(student.boxes[s]), match.teacher(teacher.boxes[t])
            terms["class"] = terms["class"] + class_kl(
                match.student(student.logits[s]),
                student.classification,
                match.teacher(teacher.logits[t]),
                teacher.classification,
                weight,
                temperature=self.config.temperature,
                form=self.config.class_loss,
            )
            if self.config.better_boxes_only:
                weight = weight * teacher_is_better(*boxes, targets)
            terms["l1"] = terms["l1"] + l1(*boxes, weight)
            terms["giou"] = terms["giou"] + giou(*boxes, weight)
        return terms
