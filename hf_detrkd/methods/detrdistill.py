"""DETRDistill: a universal knowledge distillation framework for DETR-families (arXiv 2211.10156, ICCV 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..losses.boxes import giou, l1, teacher_is_better
from ..losses.features import box_quality, target_aware_mask
from ..losses.logits import class_kl
from ..losses.reduction import weighted_mean
from ..losses.set_prediction import set_loss
from ..matching import HungarianMatcher, ground_truth_matches, pair_layers
from ..projectors import MapProjector, QueryProjector
from ..sampling import teacher_queries
from .base import DistillationMethod, Paper, check_choice


def _weights() -> dict[str, float]:
    # All from the student config of the release, lines 66-93, and distiller.py 233. The paper's lambdas 1, 20, 1 are
    # known from memory only, and belong to another normalisation of the feature loss (methods.md 3.5).
    logits = {"logits_class": 1.0, "logits_l1": 5.0, "logits_giou": 2.0}
    return {**logits, "feature": 1.0, "assign_class": 2.0, "assign_l1": 5.0, "assign_giou": 2.0}


@dataclass(frozen=True)
class DETRDistillConfig:
    """Settings of `DETRDistill`. A part whose weights are all 0 is not computed: logits_*, feature, assign_*."""

    weights: dict[str, float] = field(default_factory=_weights)
    matching: str = "split"
    """"split": class from the teacher's positives alone, boxes from all (the paper's division, methods.md 3.5); "all":
    both from all, as released."""
    better_boxes_only: bool = False
    """The ``logits`` boxes only where the teacher's is nearer to a target than the student's (TADF)."""
    quality: str = "product"
    """Of a teacher query: "product" score * IoU as released, "gamma" score^gamma * IoU^(1 - gamma) as the paper."""
    gamma: float = 0.5
    """Of the paper's quality (known from memory only)."""
    mask_queries: int = 100
    """Entries (query, class) of highest score that make the mask: ``max_per_img`` of the release."""
    mask_floor: float = 0.01
    """Least value of a mask before it is divided by its maximum (distiller.py)."""
    tap: str = "memory"
    """Maps that are compared: "memory", what the decoder attends to, or "backbone" (the release compares the maps
    between the two, after the channel mapper)."""
    assignment: str = "teacher"
    """Of the targets to the teacher's queries in the student: "teacher", fixed, as the paper, or "own", as the release
    in effect does."""

    def __post_init__(self):
        check_choice(
            self,
            matching=("split", "all"),
            quality=("product", "gamma"),
            tap=("memory", "backbone"),
            assignment=("teacher", "own"),
        )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma` of DETRDistillConfig is {self.gamma}; it is an exponent from 0 to 1.")
        if self.mask_queries < 1:
            raise ValueError(
                f"`mask_queries` is {self.mask_queries}; it must be 1 or more. To leave the features out, set the "
                "weight `feature` to 0."
            )
        if not 0 < self.mask_floor < 1:
            raise ValueError(f"`mask_floor` is {self.mask_floor}; it must be above 0 and below 1.")


class DETRDistill(DistillationMethod):
    """Predictions, maps and assignment: what the teacher says, where it says it, and which query is to say it.

    **Terms**, each the sum over the student's layers k with their teacher layers (`pair_layers`):

    *Hungarian-matching logits distillation*: one matching of all student queries i with all teacher queries j. P are the
    pairs of teacher positives, the queries that the teacher's own matching gives a target.

    - ``logits_class``: sum_P KL(p_j^T || p_i^S) / |P|
    - ``logits_l1``: sum ||b_i^S - b_j^T||_1 / M over all M pairs
    - ``logits_giou``: sum (1 - GIoU(b_i^S, b_j^T)) / M

    *Target-aware feature distillation*, summed over levels too; the mask m has maximum 1 in every image:

    - ``feature``: mean over cells and channels of (m F^T - m phi(F^S))^2 with
      m ~ max(sum_n q_n cos(h_n^T, F^T), floor), q_n = score_n * max IoU(b_n^T, targets), n the teacher's best entries

    *Query-prior assignment distillation*: the student decodes the teacher's queries, and query j is to find the target
    that it finds in the teacher (`set_loss`):

    - ``assign_class``: focal loss / N, varifocal in students whose scores are to be IoUs, or cross-entropy in softmax
      students; N targets
    - ``assign_l1``, ``assign_giou``: sum ||b_j - b*||_1 / N, sum (1 - GIoU(b_j, b*)) / N

    **Differs from the paper**: positives and negatives are matched together, with class and boxes, not one after the
    other (the release doesn't tell them apart). Class terms are KL forms: the release has the teacher's entropy on top.
    Where depths differ, every student layer has its teacher layer, in the assignment too. The maps are those that the
    decoder attends to, through a 1x1 convolution where the widths differ; padded cells don't count. The replay uses the
    memory that is there (the release encodes again) and the assignment is really the teacher's (the release loses it on
    the way). A query without a partner counts in no ``logits`` term (released: target 80 for every class). The release's
    contrastive loss, which the paper doesn't have, is left out.
    """

    name = "detrdistill"
    paper = Paper(
        title="DETRDistill: A Universal Knowledge Distillation Framework for DETR-families",
        arxiv="2211.10156",
        bibtex="""@inproceedings{chang2023detrdistill,
  title = {{DETRDistill}: A Universal Knowledge Distillation Framework for {DETR}-families},
  author = {Chang, Jiahao and Wang, Shuo and Xu, Haiming and Chen, Zehui and Yang, Chenhongyi and Zhao, Feng},
  booktitle = {ICCV},
  year = {2023}
}""",
    )
    config_class = DETRDistillConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        self.parts = {term.partition("_")[0] for term, weight in config.weights.items() if weight}
        self.teacher_layers = list(pair_layers(student.num_layers, teacher.num_layers))
        self.matcher = HungarianMatcher()
        self.quality = "quality_scores" in student.provides
        if "feature" in self.parts:
            _check_channels(config.tap, teacher)
            self.maps = MapProjector(student, teacher, config.tap)
        if "assign" in self.parts:
            if "replay" not in student.provides:
                raise ValueError(
                    "method `detrdistill` needs a student whose decoder can be replayed for its assignment terms, and "
                    f"`{student.model.config.model_type}` can't. Set the weights assign_class, assign_l1 and "
                    "assign_giou to 0."
                )
            self.queries = QueryProjector(student, teacher)

    def forward(self, student, teacher, targets, generator):
        # From here on the teacher has the student's number of layers
        per_layer = {name: getattr(teacher, name)[self.teacher_layers] for name in ("logits", "boxes", "hidden_states")}
        teacher = replace(teacher, **per_layer)
        terms = {name: student.boxes.new_zeros(()) for name in self.config.weights}
        found = ground_truth_matches(teacher, targets) if self.parts != {"feature"} else ()
        if "logits" in self.parts:
            self._logits(terms, student, teacher, found, targets)
        if "feature" in self.parts:
            self._feature(terms, student, teacher, [target["boxes"] for target in targets])
        if "assign" in self.parts:
            reply = student.replay(teacher_queries(student, teacher, self.queries).student)
            fixed = self.config.assignment == "teacher"
            for layer, match in enumerate(found if fixed else ground_truth_matches(reply, targets)):
                prediction = reply.logits[layer], reply.boxes[layer], reply.classification
                losses = set_loss(*prediction, match, targets, quality=self.quality)
                for name, value in losses.items():
                    terms[f"assign_{name}"] = terms[f"assign_{name}"] + value
        return terms

    def _logits(self, terms, student, teacher, found, targets):
        for layer, match in enumerate(self.matcher(student, teacher)):
            weight = match.weight
            if self.config.matching == "split":
                positive = torch.zeros_like(teacher.boxes[layer, ..., 0], dtype=weight.dtype)
                positive = positive.scatter_add(1, found[layer].student_index, found[layer].weight)
                weight = weight * match.teacher(positive)
            divergence = class_kl(
                match.student(student.logits[layer]),
                student.classification,
                match.teacher(teacher.logits[layer]),
                teacher.classification,
                weight,
            )
            boxes = match.student(student.boxes[layer]), match.teacher(teacher.boxes[layer])
            weight = match.weight
            if self.config.better_boxes_only:
                weight = weight * teacher_is_better(*boxes, targets)
            terms["logits_class"] = terms["logits_class"] + divergence
            terms["logits_l1"] = terms["logits_l1"] + l1(*boxes, weight)
            terms["logits_giou"] = terms["logits_giou"] + giou(*boxes, weight)

    def _feature(self, terms, student, teacher, target_boxes):
        gamma = self.config.gamma if self.config.quality == "gamma" else None
        seen = []
        for states, probs, boxes in zip(teacher.hidden_states, teacher.class_probs(), teacher.boxes, strict=True):
            # A query may stand there more than once, with different classes
            scores, entry = probs.flatten(1).topk(min(self.config.mask_queries, probs[0].numel()))
            query = (entry // probs.shape[-1])[..., None]
            quality = box_quality(scores, boxes.take_along_dim(query, 1), target_boxes, gamma=gamma)
            seen.append((states.take_along_dim(query, 1), quality))
        for maps in self.maps(student, teacher):
            floor = self.config.mask_floor
            # (m F^T - m F^S)^2 = m^2 (F^T - F^S)^2: the maps are the same for all layers, only the masks differ
            weight = sum(target_aware_mask(*layer, maps.teacher, maps.mask, floor=floor).square() for layer in seen)
            squared = (maps.student.float() - maps.teacher.float()).square().mean(1)
            terms["feature"] = terms["feature"] + weighted_mean(weight * squared, maps.mask)


def _check_channels(tap, teacher):
    channels = {teacher.memory_width} if tap == "memory" else set(teacher.feature_channels)
    if channels != {teacher.width}:
        raise ValueError(
            f"method `detrdistill` compares the teacher's decoder states with its maps, but in this "
            f"`{teacher.model.config.model_type}` the states have {teacher.width} channels and the {tap} has "
            f"{sorted(channels)}. Use tap='memory', or set the weight `feature` to 0."
        )
