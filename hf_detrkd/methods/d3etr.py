"""D3ETR: decoder distillation for detection transformers (arXiv 2211.09768, IJCAI 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..families import FamilyAdapter
from ..losses.attention import cross_attention_loss, on_memory_of, self_attention_loss
from ..losses.boxes import giou, l1
from ..losses.logits import class_kl
from ..losses.set_prediction import set_loss
from ..matching import HungarianMatcher, ground_truth_matches, identity_match, pair_layers
from ..projectors import LearnedQueries, QueryProjector
from ..sampling import teacher_queries
from .base import DistillationMethod, Paper, check_choice, check_class_loss


def _weights() -> dict[str, float]:
    # Predictions 1, 5, 2: TPRD (bb8ed01), the paper's own weights aren't public. Attention 1: the rows' KL doesn't
    # depend on the number of queries or cells (methods.md 5.5).
    matching = {"class": 1.0, "l1": 5.0, "giou": 2.0, "self_attention": 1.0, "cross_attention": 1.0}
    weights = {f"{name}_{term}": weight for name in ("adaptive", "fixed") for term, weight in matching.items()}
    # Those of Conditional DETR (main.py), the paper's detector
    return {**weights, "group_class": 2.0, "group_l1": 5.0, "group_giou": 2.0}


@dataclass(frozen=True)
class D3ETRConfig:
    """Settings of `D3ETR`. What has only weights of 0 is not computed.

    TPRD's form: ``attention_loss="mse"``, the weights of self-attention 10000 and of cross-attention 1000, those of the
    group 0.
    """

    weights: dict[str, float] = field(default_factory=_weights)
    temperature: float = 1.0
    class_loss: str = "bernoulli"
    """Of sigmoid students: "bernoulli" per class (TPRD), or "softmax" over the classes. Softmax students always have the
    latter."""
    attention_loss: str = "kl"
    """"kl" of rows, or "mse", the mean over their columns of the squared difference (TPRD), which falls as the square of
    the number of columns."""
    sampled_floor: float = 1e-3
    """Share of a row by which "kl" raises every cell where a model samples its memory: a cell without a point of the
    student has 0, whose logarithm is infinite. About what one point of one of 8 heads gives a cell. Ours."""
    content: str = "project"
    """Content of the group's queries: the teacher's through a linear map ("project") or the student's own at the same
    place ("own"), as in `KDDetr`."""
    control: bool = False
    """The group without a teacher (Group DETR, ICCV 2023): its queries are learned with it and assigned to the targets by
    the student itself; all distillation terms are left out, whatever their weights."""

    def __post_init__(self):
        check_choice(
            self, class_loss=("bernoulli", "softmax"), attention_loss=("kl", "mse"), content=("project", "own")
        )
        if not 0 < self.sampled_floor < 1:
            raise ValueError(f"`sampled_floor` is {self.sampled_floor}; it must lie between 0 and 1.")


class D3ETR(DistillationMethod):
    """MixMatcher: the student's decoder learns from the teacher's under two matchings, in every layer.

    *Adaptive* matching pairs the queries of both models by the cheapest cost of their predictions. *Fixed* matching puts
    the teacher's own queries, as they are, to the student's decoder as an auxiliary group that doesn't see the student's
    queries: its answers correspond to the teacher's one by one. The group is trained on the targets too.

    **Terms**, for each matching, summed over the student's layers, P the pairs (i, j) of a layer:

    - ``class``: mean_P KL(p_j^T || p_i^S)
    - ``l1``: mean_P ||b_i - b_j||_1
    - ``giou``: mean_P (1 - GIoU(b_i, b_j))
    - ``self_attention``: mean_P KL(A_j^T || A_i^S) of rows with their columns in the order of P too
    - ``cross_attention``: mean_P KL(A_j^T || A_i^S) of rows over the memory

    and ``group_class``, ``group_l1``, ``group_giou``: the detection loss of the group, summed over the layers, under the
    teacher's assignment of the same queries to the targets.

    **Differs from the paper**, whose full text and code are not public: the forms of the losses are reconstructed.
    Attention is compared as the KL of rows averaged over heads, sampled attention by splatting every query's points, and
    teachers' maps of other sizes on the student's grid. Content between decoders of image-dependent queries goes through
    a linear map.
    """

    name = "d3etr"
    paper = Paper(
        title="D3ETR: Decoder Distillation for Detection Transformer",
        arxiv="2211.09768",
        bibtex="""@inproceedings{chen2024d3etr,
  title = {{D3ETR}: Decoder Distillation for Detection Transformer},
  author = {Chen, Xiaokang and Chen, Jiahui and Liu, Yan and Tang, Jiaxiang and Zeng, Gang},
  booktitle = {IJCAI},
  pages = {668--676},
  year = {2024}
}""",
    )
    config_class = D3ETRConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        check_class_loss(self.name, config, student)
        self.used = {
            term for term, weight in config.weights.items() if weight and not (config.control and "group" not in term)
        }
        if not self.used:
            raise ValueError(
                "all `weights` of d3etr's group are 0, so its control (`control`) has nothing to learn. Use method none."
            )
        self.needs_group = any(term.startswith(("fixed", "group")) for term in self.used)
        self._check(student, teacher)
        if any(term.endswith("attention") for term in self.used):
            self.attentions = frozenset({"student", "teacher"})
        self.queries = None
        if self.needs_group and config.control:
            self.queries = LearnedQueries(student)
        elif self.needs_group:
            self.queries = QueryProjector(student, teacher, content=config.content == "project")
        self.matcher = HungarianMatcher()
        self.quality = "quality_scores" in student.provides
        self.teacher_layers = pair_layers(student.num_layers, teacher.num_layers)

    def forward(self, student, teacher, targets, generator):
        terms = {name: student.boxes.new_zeros(()) for name in self.config.weights}
        matchings, control = {}, self.config.control
        if self._uses("adaptive"):
            matchings["adaptive"] = student, self.matcher(student, teacher, self.teacher_layers)
        if self.needs_group:
            asked = self.queries(student) if control else teacher_queries(student, teacher, self.queries).student
            group = student.replay(asked)
        if self._uses("fixed"):
            same = identity_match(*teacher.boxes.shape[1:3], teacher.boxes.device)
            matchings["fixed"] = group, (same,) * len(self.teacher_layers)
        if self._uses("group"):
            assigned = ground_truth_matches(group if control else teacher, targets)

        for s, t in enumerate(self.teacher_layers):
            for name, value in self._distances(matchings, s, teacher, t):
                terms[name] = terms[name] + value
            if self._uses("group"):
                match = assigned[s if control else t]
                prediction = group.logits[s], group.boxes[s], group.classification
                losses = set_loss(*prediction, match, targets, quality=self.quality)
                for name, value in losses.items():
                    terms[f"group_{name}"] = terms[f"group_{name}"] + value
        return terms

    def _distances(self, matchings, s, teacher, t):
        """Names and values of the distillation terms of one layer."""
        form, floor = self.config.attention_loss, self.config.sampled_floor
        looks_at = None
        for matching, (view, matches) in matchings.items():
            match = matches[s]
            boxes = match.student(view.boxes[s]), match.teacher(teacher.boxes[t])
            yield f"{matching}_l1", l1(*boxes, match.weight)
            yield f"{matching}_giou", giou(*boxes, match.weight)
            yield (
                f"{matching}_class",
                class_kl(
                    match.student(view.logits[s]),
                    view.classification,
                    match.teacher(teacher.logits[t]),
                    teacher.classification,
                    match.weight,
                    temperature=self.config.temperature,
                    form=self.config.class_loss,
                ),
            )
            if f"{matching}_self_attention" in self.used:
                yield f"{matching}_self_attention", self_attention_loss(view, s, teacher, t, match, form)
            if f"{matching}_cross_attention" in self.used:
                looks_at = looks_at or on_memory_of(view, teacher, t)
                yield f"{matching}_cross_attention", cross_attention_loss(view, s, *looks_at, match, form, floor)

    def _uses(self, prefix: str) -> bool:
        return any(term.startswith(prefix) for term in self.used)

    def _check(self, student: FamilyAdapter, teacher: FamilyAdapter) -> None:
        both = student, teacher
        for parts, wanted, models in (
            (("fixed", "group"), {"replay"}, (student,)),
            (("self_attention",), {"self_attentions"}, both),
            (("cross_attention",), {"cross_attentions", "sampled_attentions"}, both),
        ):
            terms = [term for term in self.config.weights if term in self.used and any(part in term for part in parts)]
            for adapter in models:
                if terms and not wanted & adapter.provides:
                    raise ValueError(
                        f"the terms {', '.join(terms)} of method `d3etr` need {' or '.join(sorted(wanted))}, which "
                        f"`{adapter.model.config.model_type}` doesn't provide. Set their weights to 0."
                    )
