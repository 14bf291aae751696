"""DRKD: dual relation distillation (arXiv 2302.05637, IJCAI 2023)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

from ..losses.relation import (
    ROI_SIZE,
    instance_loss,
    object_features,
    padded_boxes,
    pixel_loss,
    relation_loss,
    standardised,
    target_states,
)
from ..projectors import MapProjector, ObjectRelation, PixelRelation, identity_linear
from .base import DistillationMethod, Paper, check_choice

LIMIT = 100  # objects of an image, as the relation is quadratic in them (methods.md 8.5)


@dataclass(frozen=True)
class DRKDConfig:
    """Settings of `DRKD`. The paper's weights are not known; no result of a DETR pair is."""

    weights: dict[str, float] = field(default_factory=lambda: {"pixel": 1.0, "relation": 1.0, "instance": 1.0})
    """Of means; the authors' are not known (methods.md 8.3, which warms up over 500 steps: `kd_warmup_steps`)."""
    feature: str = "memory"
    """"memory": what the decoder reads, whose pixels self-attention has mixed already; "backbone": before that."""
    relation: str = "shared"
    """The unit phi: "shared" by both models, moved by the student's side alone (ours); "separate": one for each, both
    trained, the literal reading, which nothing keeps from shrinking; "frozen": shared, at random values."""
    graph: str = "paper"
    """Node update: "paper" ((I - A) V) W; "released" GloRe's code, with a bias and a ReLU before W."""
    instances: str = "roi"
    """"roi": 7 x 7 cells under each target, the paper's; "query": the decoder state of the query that each model's own
    assignment gives to it (ours). The default is the paper's and doesn't wait for the student's queries to settle."""
    filter: str = "none"
    """w of pairs of objects, alike for both models, mean 1: "none" 1; "teacher" raises pairs similar to the teacher;
    "learned" an MLP on the teacher's objects. The paper has one, its form is not known."""
    dim: str = "rows"
    """psi is normalised over the second index; "first": over the first, as notes on the paper write it."""
    embedding: str = "student"
    """Where g is learnt: "student", as its map into the teacher's space; "both", the literal reading, can collapse."""
    temperature: float = 0.125
    """Of the cosines that psi is made of. Ours: there the term's gradient is largest, a tenth of detection's, with a
    trained RT-DETR pair on BCCD; the dot product over sqrt(d) is 0.07 for its queries and 0.01 for its RoIs, whose psi
    then is the identity for both models, and the term 1e-8."""
    normalize: bool = True
    """Standardise the channels of every cell and state before all terms. Ours: the memory of that RT-DETR teacher has
    a deviation of 0.03, and the terms without it a ten-thousandth of detection's gradient, with it a fifth."""

    def __post_init__(self):
        check_choice(
            self,
            feature=("memory", "backbone"),
            relation=("shared", "separate", "frozen"),
            graph=("paper", "released"),
            instances=("roi", "query"),
            filter=("none", "teacher", "learned"),
            dim=("rows", "first"),
            embedding=("student", "both"),
        )
        if not self.temperature > 0:
            raise ValueError(f"`temperature` of drkd is {self.temperature}; it must be above 0.")


class DRKD(DistillationMethod):
    """How the pixels of an image relate to each other, and how its objects do, is to be the teacher's.

    **Terms**, with f the student's map in the teacher's channels (1x1 convolution) on the teacher's grid:

    - ``pixel`` (PR): mean over levels, real cells and channels of (phi(t) - phi(f(s)))^2, phi a GloRe unit: cells gather
      into nodes V = X P^T / cells, nodes exchange Z = ((I - A) V) W and hand back F = Z P, phi(x) = x + scale * E F
    - ``relation`` (IR): mean over objects a of sum_b (psi^T_ab - psi^S_ab)^2, psi_ab = softmax_b(w_ab cos(a, b) / T),
      over images with two objects or more
    - ``instance`` (INS): mean over objects and channels of (t_a - f(s_a))^2

    **Differs from the paper**: it has convolutional detectors; the DETR form is ours. Teacher outputs, phi's and psi's,
    are constants, and psi^T has no parameters: learnt on both sides, the terms can fall to 0 with nothing learnt. phi
    follows f and has no batch norm (`GloRe`). Means instead of sums, of standardised features. RoIs of several levels go
    by FPN's rule; with ``feature="backbone"``, whose stages differ in channels, they come from the last. At most 100
    objects of an image count.
    """

    name = "drkd"
    paper = Paper(
        title="Dual Relation Knowledge Distillation for Object Detection",
        arxiv="2302.05637",
        bibtex="""@inproceedings{ni2023drkd,
  title={Dual Relation Knowledge Distillation for Object Detection},
  author={Ni, Zhenliang and Yang, Fukui and Wen, Shengzhao and Zhang, Gang},
  booktitle={IJCAI},
  pages={1276--1284},
  year={2023}
}""",
    )
    config_class = DRKDConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        pixel, relation, instance = (config.weights[name] > 0 for name in ("pixel", "relation", "instance"))
        roi, objects = config.instances == "roi", relation or instance
        self.f = MapProjector(student, teacher, config.feature, always=True) if pixel or roi else None
        self.f_query = identity_linear(student.width, teacher.width) if objects and not roi else None
        channels = [teacher.memory_width] if config.feature == "memory" else teacher.feature_channels
        if self.f is not None and not pixel:
            self.f.levels = self.f.levels[-1:]  # objects need the last stage alone
        if pixel:
            channels = channels[-len(self.f.levels) :]
            self.phi = PixelRelation(channels, config.relation, config.graph == "released")
        if relation:
            width = channels[-1] * ROI_SIZE**2 if roi else teacher.width
            self.psi = ObjectRelation(width, config.embedding, config.filter, config.dim, config.temperature)
        if (pixel and config.relation == "separate") or (relation and config.embedding == "both"):
            warnings.warn(
                "drkd trains modules on the teacher's side (`relation='separate'` or `embedding='both'`): its terms can "
                "fall because both sides shrink, not because the student learns. Watch AP, not the terms.",
                stacklevel=2,
            )

    def forward(self, student, teacher, targets, generator):
        config, weights = self.config, self.config.weights
        terms = {name: student.boxes.new_zeros(()) for name in weights}
        maps = () if self.f is None else self.f(student, teacher)
        if config.normalize:
            maps = [replace(x, student=standardised(x.student, 1), teacher=standardised(x.teacher, 1)) for x in maps]
        if weights["pixel"]:
            levels = [pixel_loss(*self.phi(level, pair), pair.mask) for level, pair in enumerate(maps)]
            terms["pixel"] = sum(levels) / len(levels)
        if not (weights["relation"] or weights["instance"]):
            return terms

        if config.instances == "roi":
            boxes, present = padded_boxes(targets, LIMIT)
            maps = maps[-1:] if config.feature == "backbone" else maps
            masks = [pair.mask for pair in maps]
            s = object_features([pair.student for pair in maps], masks, boxes)
            t = object_features([pair.teacher for pair in maps], masks, boxes)
        else:
            (s, present), (t, in_teacher) = (target_states(view, targets, LIMIT) for view in (student, teacher))
            s, present = self.f_query(s), present & in_teacher
            if config.normalize:
                s, t = standardised(s), standardised(t)
        if weights["relation"]:
            terms["relation"] = relation_loss(*self.psi(s, t, present), present)
        if weights["instance"]:
            terms["instance"] = instance_loss(s, t, present)
        return terms
