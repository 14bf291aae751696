"""KD-DETR: consistent distillation points for detection transformers (arXiv 2211.08071, CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..losses.boxes import giou, l1, teacher_is_better
from ..losses.logits import class_kl
from ..losses.reduction import mean_over_processes
from ..matching import pair_layers
from ..projectors import QueryProjector
from ..sampling import random_queries, teacher_queries
from .base import DistillationMethod, Paper, check_choice, check_class_loss


def _weights() -> dict[str, float]:
    # Boxes 5 and 2: kd_loss.py 55-66 of the released code. Class 2: the released sum over queries divided by 91 slots
    # is about twice the mean used here (methods.md 4.5; TPRD arrived at 2 for Deformable DETR too).
    group = {"class": 2.0, "l1": 5.0, "giou": 2.0}
    return {f"{points}_{term}": weight for points in ("specific", "general") for term, weight in group.items()}


@dataclass(frozen=True)
class KDDetrConfig:
    """Settings of `KDDetr`. A group of points whose three weights are 0 is not computed."""

    weights: dict[str, float] = field(default_factory=_weights)
    temperature: float = 10.0
    """Of the softmax form (kd_loss.py 45). The Bernoulli form has temperature 1."""
    class_loss: str = "softmax"
    """Of sigmoid students: "softmax" over the classes, as released, or "bernoulli" per class, which also teaches what is
    background. Softmax students always have the softmax form."""
    class_normalization: str = "weights"
    """"weights": a weighted mean, as the boxes; "released": a sum over queries and images divided by the class slots
    (kd_loss.py 128-145; its weight is then 1). It grows with the batch."""
    box_coordinates: str = "mean"
    """"mean" of the four |differences| as released, or "sum" as TPRD."""
    layers: str = "final"
    """"final": every student layer learns from the teacher's last layer, as released; "paired": layer by layer."""
    general_points: int = 300
    """kd tools/train.sh; 100 is a cheap alternative."""
    general_distribution: str = "uniform"
    """"uniform" as the paper, "logit_normal" as the released code."""
    general_weight_floor: float = 0.0
    """Least weight of a general point."""
    better_boxes_only: bool = False
    """Box terms only where the teacher's box is nearer to a target than the student's (TADF)."""
    content: str = "project"
    """Content of the specific points in the student: the teacher's through a linear map ("project") or the student's
    own at the same place ("own")."""

    def __post_init__(self):
        check_choice(
            self,
            class_loss=("softmax", "bernoulli"),
            class_normalization=("weights", "released"),
            box_coordinates=("mean", "sum"),
            layers=("final", "paired"),
            general_distribution=("uniform", "logit_normal"),
            content=("project", "own"),
        )
        if self.general_points < 1:
            raise ValueError(
                f"`general_points` is {self.general_points}; it must be 1 or more. To leave the general points out, "
                "set their three weights to 0."
            )


class KDDetr(DistillationMethod):
    """Both models decode the same queries, so their answers correspond without any matching.

    *Specific* points are the teacher's own decoder inputs (content, position, reference, after two-stage selection):
    what the teacher looks at. *General* points are random: how it looks at everything else. Each answer weighs as much
    as the teacher sees an object there, ``w_i = max_c p_ic^T`` (foreground rebalance).

    **Terms**, for each group of points, summed over the student's layers k, T the teacher's last layer:

    - ``class``: sum_i w_i KL(softmax(z_i^T / t) || softmax(z_i^k / t)) t^2 / sum_i w_i
    - ``l1``: sum_i w_i mean|b_i^T - b_i^k| / sum_i w_i
    - ``giou``: sum_i w_i (1 - GIoU(b_i^T, b_i^k)) / sum_i w_i

    **Differs from the paper**: the class term is normalised by the sum of weights as the boxes are (released: a sum over
    queries, which grows with the batch) and summed over classes (released: divided by the number of class slots).
    Content between decoders of image-dependent queries goes through a linear map; families without boxes in their
    queries get a learned embedding of the place. General points take each model's own content at the place.
    """

    name = "kd_detr"
    paper = Paper(
        title="KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling",
        arxiv="2211.08071",
        bibtex="""@inproceedings{wang2024kddetr,
  title = {{KD-DETR}: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling},
  author = {Wang, Yu and Li, Xin and Weng, Shengzhao and Zhang, Gang and Yue, Haixiao and Feng, Haocheng and Han, Junyu and Ding, Errui},
  booktitle = {CVPR},
  year = {2024}
}""",
    )
    config_class = KDDetrConfig
    needs_student = frozenset({"replay"})

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        self.groups = [
            group
            for group in ("specific", "general")
            if any(config.weights[f"{group}_{term}"] for term in ("class", "l1", "giou"))
        ]
        if "general" in self.groups and "replay" not in teacher.provides:
            raise ValueError(
                "method `kd_detr` needs a teacher whose decoder can be replayed for its general points, and "
                f"`{teacher.model.config.model_type}` can't. Set the weights of the general terms to 0."
            )
        check_class_loss(self.name, config, student)
        bernoulli = config.class_loss == "bernoulli" and student.classification == "sigmoid"
        self.temperature = 1.0 if bernoulli else config.temperature
        last = teacher.num_layers - 1
        paired = pair_layers(student.num_layers, teacher.num_layers)
        self.teacher_layers = paired if config.layers == "paired" else (last,) * student.num_layers
        # Only what is trained: a parameter without a gradient stops DDP
        contents = {"specific": config.content == "project", "general": False}
        self.projectors = nn.ModuleDict({g: QueryProjector(student, teacher, contents[g]) for g in self.groups})

    def forward(self, student, teacher, targets, generator):
        points = []
        if "specific" in self.groups:
            points.append(teacher_queries(student, teacher, self.projectors["specific"]))
        if "general" in self.groups:
            settings = self.config.general_points, generator, self.config.general_distribution
            points.append(random_queries(student, teacher, self.projectors["general"], *settings))
        replies = student.replay(*(p.student for p in points))
        replies = replies if len(points) > 1 else (replies,)

        terms = {name: student.boxes.new_zeros(()) for name in self.config.weights}
        for group, answer, reply in zip(self.groups, (p.answers for p in points), replies, strict=True):
            foreground = answer.class_probs().amax(-1)
            if group == "general":
                foreground = foreground.clamp(min=self.config.general_weight_floor)
            for s, t in enumerate(self.teacher_layers):
                weight = foreground[t]
                divergence = class_kl(
                    reply.logits[s],
                    reply.classification,
                    answer.logits[t],
                    answer.classification,
                    weight,
                    temperature=self.temperature,
                    form=self.config.class_loss,
                )
                if self.config.class_normalization == "released":
                    divergence = divergence * mean_over_processes(weight.sum()) / reply.logits.shape[-1]
                if self.config.better_boxes_only:
                    weight = weight * teacher_is_better(reply.boxes[s], answer.boxes[t], targets)
                terms[f"{group}_class"] = terms[f"{group}_class"] + divergence
                terms[f"{group}_l1"] = terms[f"{group}_l1"] + l1(
                    reply.boxes[s], answer.boxes[t], weight, coordinates=self.config.box_coordinates
                )
                terms[f"{group}_giou"] = terms[f"{group}_giou"] + giou(reply.boxes[s], answer.boxes[t], weight)
        return terms
