"""LD: localisation distillation on the distributions of box edges (arXiv 2102.12252), with D-FINE's GO-LSD as a form."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..losses.boxes import iou
from ..losses.distributions import decoupled_edge_kl, edge_kl
from ..matching import ground_truth_matches, pair_layers
from ..projectors import QueryProjector
from ..sampling import places_of
from .base import DistillationMethod, Paper, check_choice


@dataclass(frozen=True)
class LDConfig:
    """Settings of `LD`."""

    weights: dict[str, float] = field(default_factory=lambda: {"ld": 0.25})
    """LD's on its main region (HikariTJU/LD). For form "go_lsd" D-FINE has 1.5 (its configs, `ddf`)."""
    temperature: float = 10.0
    """LD's. For form "go_lsd" D-FINE has 5."""
    form: str = "ld"
    """"ld": the mean over bins, weighted by confidence; "go_lsd": D-FINE's, which takes queries that are matched with
    a target, weighted by their IoU, apart from the others."""
    confidence: str = "teacher"
    """Whose highest class score weighs a query: form "ld" only. LD takes the student's, among anchors assigned to
    objects; here all queries take part and the teacher says which are on objects."""
    layers: str = "final"
    """"final": every student layer learns from the teacher's last, as in D-FINE's self-distillation; "paired": layer by
    layer (`pair_layers`)."""
    content: str = "project"
    """Content of the points in the student: the teacher's through a linear map ("project") or the student's own at the
    same place ("own")."""

    def __post_init__(self):
        check_choice(
            self,
            form=("ld", "go_lsd"),
            confidence=("teacher", "student"),
            layers=("final", "paired"),
            content=("project", "own"),
        )
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0.")


class LD(DistillationMethod):
    """How sure the teacher is of each edge of a box, not only where it puts the edge.

    D-FINE and DEIMv2 predict every edge as a distribution over offsets from a box that the first decoder layer
    predicts; one box for the distributions of all layers. Distributions about different boxes say nothing about each
    other. So the student decodes the teacher's queries (content, reference) and, instead of predicting that first box
    itself, starts from the teacher's. Then the distributions of all layers, of both models, are about the same boxes,
    and any layer of one may learn from any layer of the other.

    **Terms**: ``ld``, summed over the student's layers, for each query i and each of its four edges e

    - form "ld": sum_i w_i mean_e T^2 mean_bins p_e log(p_e / q_e) / sum_i w_i, where p and q are the softmax of the
      teacher's and the student's logits over T, and w_i = max_c p_ic^T
    - form "go_lsd": (n mean_matched w KL + m mean_others w KL) / (n + m), n and m the roots of their numbers, KL with
      factor T^2, w the IoU with the target or max_c p_ic^T

    **Differs from the papers**: LD pairs by the anchor grid and adds a second region around objects, which queries don't
    have. GO-LSD is self-distillation, and matched there means in any layer or the encoder; here in any layer of the
    teacher, whose queries they are. Class heads learn nothing from this term: combine it with another method.
    """

    name = "ld"
    paper = Paper(
        title="Localization Distillation for Dense Object Detection",
        arxiv="2102.12252",
        bibtex="""@inproceedings{zheng2022ld,
  title = {Localization Distillation for Dense Object Detection},
  author = {Zheng, Zhaohui and Ye, Rongguang and Wang, Ping and Ren, Dongwei and Zuo, Wangmeng and Hou, Qibin and Cheng, Ming-Ming},
  booktitle = {CVPR},
  year = {2022}
}""",
    )
    config_class = LDConfig
    needs_student = frozenset({"edge_distributions", "replay"})
    needs_teacher = frozenset({"edge_distributions"})

    def __init__(self, config, student, teacher):
        for role, adapter in (("student", student), ("teacher", teacher)):
            if "edge_distributions" not in adapter.provides:
                raise ValueError(
                    f"method `ld` compares distributions of box edges, but the {role}, {adapter.model.config.model_type}, "
                    "predicts boxes as four numbers. Take D-FINE or DEIMv2 for both, or another method."
                )
        super().__init__(config, student, teacher)
        if student.edge_bins != teacher.edge_bins:
            names = "(max_num_bins, up, reg_scale)"
            raise ValueError(
                f"method `ld` compares distributions bin by bin, but the bins of the student are {student.edge_bins} "
                f"and those of the teacher {teacher.edge_bins} {names}, so the same bin means another offset. Build the "
                "student with the teacher's, or choose another method."
            )
        paired = pair_layers(student.num_layers, teacher.num_layers)
        self.teacher_layers = paired if config.layers == "paired" else (teacher.num_layers - 1,) * student.num_layers
        self.projector = QueryProjector(student, teacher, config.content == "project")

    def forward(self, student, teacher, targets, generator):
        queries = self.projector(teacher.queries, places_of(teacher), student)
        reply = student.replay(replace(queries, edge_reference=teacher.edge_reference))
        scores = teacher.class_probs().amax(-1)
        if self.config.form == "go_lsd":
            matched, target_boxes = _assigned(teacher, targets)
        total = 0.0
        for s, t in enumerate(self.teacher_layers):
            edges, temperature = (reply.edges[s], teacher.edges[t]), self.config.temperature
            if self.config.form == "go_lsd":
                weight = torch.where(matched, iou(reply.boxes[s].detach(), target_boxes), scores[t])
                total = total + decoupled_edge_kl(*edges, weight, matched, temperature=temperature)
            else:
                weight = scores[t] if self.config.confidence == "teacher" else reply.class_probs()[s].amax(-1).detach()
                total = total + edge_kl(*edges, weight, temperature=temperature)
        return {"ld": total}


def _assigned(view, targets):
    """(B, Q) True for the queries that any layer assigns to a target, and (B, Q, 4) the target's box, the last layer's."""
    batch, queries = view.boxes.shape[1:3]
    matched = torch.zeros(batch, queries, dtype=torch.bool, device=view.boxes.device)
    boxes = view.boxes.new_zeros(batch, queries, 4)
    for match in ground_truth_matches(view, targets):
        image, pair = match.weight.nonzero(as_tuple=True)
        query, target = match.student_index[image, pair], match.teacher_index[image, pair]
        matched[image, query] = True
        starts = torch.tensor([0, *(len(t["boxes"]) for t in targets)]).cumsum(0).to(image.device)
        boxes[image, query] = torch.cat([t["boxes"] for t in targets])[starts[image] + target].to(boxes)
    return matched, boxes
