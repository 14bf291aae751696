"""Distillation of the first stage of two-stage detectors: what is where, at every token of the memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..grids import frames_differ, nearest_grid, on_grid
from ..losses.boxes import giou, l1
from ..losses.logits import focal_kl
from ..view import DetrView
from .base import DistillationMethod, Paper


@dataclass(frozen=True)
class ProposalsConfig:
    """Settings of `ProposalKD`."""

    weights: dict[str, float] = field(default_factory=lambda: {"class": 1.0, "l1": 5.0, "giou": 2.0})
    """The proportions of DETR's own losses (main.py)."""
    gamma: float = 1.0
    """Exponent of |p^S - p^T|, BCKD (gfl_increment_head.py: binary_cross_entropy weighted by the distance)."""

    def __post_init__(self):
        if not self.gamma >= 0:
            raise ValueError(f"`gamma` is {self.gamma}; it must be 0 or more.")


class ProposalKD(DistillationMethod):
    """A two-stage model (RT-DETR, D-FINE, ...) predicts class and box at every token of its memory and makes queries of
    the best. Methods that put the teacher's queries to the student's decoder teach this first stage nothing; here every
    token of the student learns what the teacher says at the same place. It is the distillation of a dense detector
    (BCKD), and needs no matching and no further decoder pass.

    **Terms**, p the class probabilities of a token, w = max_c p_c^T, over the tokens that both may select:

    - ``class``: sum_tokens sum_c |p_c^S - p_c^T|^gamma KL(p_c^T || p_c^S) / sum_tokens w
    - ``l1``: sum w ||b^S - b^T||_1 / sum w
    - ``giou``: sum w (1 - GIoU(b^S, b^T)) / sum w

    **Differs from the paper**, which distils the heads of one-stage detectors: boxes are compared by DETR's two losses
    instead of IoU alone. Where the grids differ a token has the teacher's nearest one.
    """

    name = "proposals"
    paper = Paper(
        title="Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection",
        arxiv="2308.14286",
        bibtex="""@inproceedings{yang2023bckd,
  title = {Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection},
  author = {Yang, Longrong and Zhou, Xianpan and Li, Xuewei and Qiao, Liang and Li, Zheyang and Yang, Ziwei and Wang, Gaoang and Li, Xi},
  booktitle = {ICCV},
  year = {2023}
}""",
    )
    config_class = ProposalsConfig
    needs_student = needs_teacher = frozenset({"proposals"})

    def forward(self, student, teacher, targets, generator):
        own = student.proposals
        logits, boxes, valid = on_grid_of(student, teacher)
        probs = logits.sigmoid().amax(-1)
        both = own.valid & valid
        weight = torch.where(both, probs, 0.0)
        return {
            "class": focal_kl(own.logits, logits, both, weight, gamma=self.config.gamma),
            "l1": l1(own.boxes, boxes, weight),
            "giou": giou(own.boxes, boxes, weight),
        }


def on_grid_of(student: DetrView, teacher: DetrView) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's proposals at the student's tokens: (B, S, K) logits, (B, S, 4) boxes and (B, S) whether valid."""
    proposals = teacher.proposals
    everything = torch.cat([proposals.logits, proposals.boxes, proposals.valid[..., None].float()], -1).detach()
    padded = frames_differ(student, teacher)
    if padded or student.memory_shapes != teacher.memory_shapes:
        sizes = [height * width for height, width in teacher.memory_shapes]
        masks = teacher.memory_masks()
        levels = [x.mT.unflatten(-1, m.shape[1:]) for x, m in zip(everything.split(sizes, dim=1), masks, strict=True)]
        onto = []
        for mask in student.memory_masks():
            nearest = nearest_grid(mask.shape[1:], teacher.memory_shapes)
            moved = on_grid(levels[nearest], masks[nearest], mask, padded=padded, mode="nearest")
            onto.append(moved.flatten(2).mT)
        everything = torch.cat(onto, dim=1)
    logits, boxes, valid = everything.split([everything.shape[-1] - 5, 4, 1], dim=-1)
    return logits, boxes, valid[..., 0] > 0
