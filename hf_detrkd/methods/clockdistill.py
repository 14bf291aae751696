"""CLoCKDistill: consistent location-and-context-aware knowledge distillation (arXiv 2502.10683)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..losses.boxes import giou, l1, teacher_is_better
from ..losses.features import scale_masks, squared_sums
from ..losses.logits import class_kl
from ..matching import pair_layers
from ..projectors import MapProjector
from ..sampling import TargetQueries, decode_targets
from .base import DistillationMethod, Paper, check_choice, check_class_loss

MEMORY_TERMS = ("lcmd_foreground", "lcmd_background")
QUERY_TERMS = ("tcld_class", "tcld_l1", "tcld_giou")


def _weights() -> dict[str, float]:
    # alpha, beta and the three lambdas of the paper, as the port in yandex-ml-juicers/Juicer-for-models quotes them;
    # 1, 5, 2 also in the first author's lanqz7766/GKD
    memory = {"lcmd_foreground": 5e-5, "lcmd_background": 1e-7}
    return {**memory, "tcld_class": 1.0, "tcld_l1": 5.0, "tcld_giou": 2.0}


@dataclass(frozen=True)
class CLoCKDistillConfig:
    """Settings of `CLoCKDistill`. A part whose weights are all 0 is not computed."""

    weights: dict[str, float] = field(default_factory=_weights)
    inclusive: bool = False
    """Rasterise boxes as FGD and the first author do, with the cell after their end too; else [floor, ceil), as the
    port."""
    content: str = "native"
    """Of the target-aware queries, see `TargetQueries`. The first author's is "random", which no decoder has seen;
    "denoising" queries see the model's own beside them in training, and not here."""
    groups: int = 1
    """The student decodes this many copies of the target-aware queries, which don't see each other; the average counts.
    3 in GKD. Without dropout copies answer alike, so more than 1 only costs time then."""
    class_loss: str = "bernoulli"
    """Of sigmoid students: "bernoulli" per class, or "softmax" over the classes, as GKD and the port. Softmax students
    always have the latter."""
    temperature: float = 1.0
    """Of the class term; 10 in GKD and 2 in the port, both for the softmax."""
    better_boxes_only: bool = False
    """Box terms only where the teacher's box is nearer to a target than the student's (TADF, arXiv 2006.13108)."""

    def __post_init__(self):
        check_choice(self, content=("native", "denoising", "random"), class_loss=("bernoulli", "softmax"))
        if self.groups < 1:
            raise ValueError(f"`groups` is {self.groups}; it must be 1 or more.")


class CLoCKDistill(DistillationMethod):
    """What the objects' places look like in the memory, and what the decoder says of a query that stands on an object.

    *LCMD*, location-and-context-aware memory distillation: the student's encoder memory is to be the teacher's, objects
    and background apart. *TCLD*, target-aware consistent logit distillation: both decoders are asked the same queries,
    one per ground-truth object, so answers correspond by index; the teacher's confidence weighs them.

    **Terms**, with A_p the memory at cell p, f a 1x1 convolution where widths differ, S_p one over the cells of the
    smallest object on p, or over the cells of the background:

    - ``lcmd_foreground``: sum over levels and cells in objects of S_p ||A_p^T - f(A_p^S)||^2 / B
    - ``lcmd_background``: the same over all other cells

    and with w_j = max_c p_jc^T of object j, summed over the student's layers with their teacher layers (`pair_layers`):

    - ``tcld_class``: sum_j w_j KL(p_j^T || p_j^S) / sum_j w_j
    - ``tcld_l1``: sum_j w_j ||b_j^T - b_j^S||_1 / sum_j w_j
    - ``tcld_giou``: sum_j w_j (1 - GIoU(b_j^T, b_j^S)) / sum_j w_j

    Without targets all but ``lcmd_background`` are 0.

    **Differs from the paper**, of which only abstract, a port and the first author's earlier code could be read: terms of
    objects are divided by the sum of their weights, so that crowded images don't weigh more; sigmoid heads have a
    Bernoulli KL; the queries are the models' own at the place; padded cells never count and padding queries are masked
    (in the earlier code the mask doesn't reach the decoder).
    """

    name = "clockdistill"
    paper = Paper(
        title="CLoCKDistill: Consistent Location-and-Context-aware Knowledge Distillation for DETRs",
        arxiv="2502.10683",
        bibtex="""@article{lan2025clockdistill,
  title = {{CLoCKDistill}: Consistent Location-and-Context-aware Knowledge Distillation for {DETRs}},
  author = {Lan, Qizhen and Tian, Qing},
  journal = {arXiv preprint arXiv:2502.10683},
  year = {2025}
}""",
    )
    config_class = CLoCKDistillConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        memory, queries = (any(config.weights[term] for term in terms) for terms in (MEMORY_TERMS, QUERY_TERMS))
        for role, adapter in (("student", student), ("teacher", teacher)):
            if queries and "replay" not in adapter.provides:
                raise ValueError(
                    f"method `clockdistill` asks a {role} about every object by decoding again, which "
                    f"`{adapter.model.config.model_type}` can't. Set the weights of {', '.join(QUERY_TERMS)} to 0."
                )
        check_class_loss(self.name, config, student)
        self.teacher_layers = pair_layers(student.num_layers, teacher.num_layers)
        # Only what is trained: a parameter without a gradient stops DDP
        self.maps = MapProjector(student, teacher) if memory else None
        self.queries = TargetQueries(student, teacher, config.content) if queries else None

    def forward(self, student, teacher, targets, generator):
        terms = {name: student.boxes.new_zeros(()) for name in self.config.weights}
        if self.maps is not None:
            boxes = [target["boxes"] for target in targets]
            for maps in self.maps(student, teacher):
                masks = scale_masks(boxes, maps.mask, inclusive=self.config.inclusive)
                sums = squared_sums(maps.student, maps.teacher, masks, maps.mask)
                for name, value in zip(MEMORY_TERMS, sums, strict=True):
                    terms[name] = terms[name] + value
        if self.queries is not None:
            points = self.queries(student, teacher, targets)
            with torch.no_grad():
                (answer,) = decode_targets(teacher, points.teacher, points)
            replies = decode_targets(student, points.student, points, self.config.groups)
            for reply in replies:
                for name, value in zip(QUERY_TERMS, self._compare(reply, answer, points.real, targets), strict=True):
                    terms[name] = terms[name] + value / len(replies)
        return terms

    def _compare(self, reply, answer, real, targets):
        confidence = answer.class_probs().amax(-1) * real
        for_class = for_l1 = for_giou = 0.0
        for s, t in enumerate(self.teacher_layers):
            logits = reply.logits[s], reply.classification, answer.logits[t], answer.classification
            boxes, weight = (reply.boxes[s], answer.boxes[t]), confidence[t]
            settings = {"temperature": self.config.temperature, "form": self.config.class_loss}
            for_class = for_class + class_kl(*logits, weight, **settings)
            if self.config.better_boxes_only:
                weight = weight * teacher_is_better(*boxes, targets)
            for_l1 = for_l1 + l1(*boxes, weight)
            for_giou = for_giou + giou(*boxes, weight)
        return for_class, for_l1, for_giou
