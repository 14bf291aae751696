"""Feature distillation on the maps that the decoder reads: score-weighted, relative, FGD, MGD, CWD and PKD."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from ..losses.features import box_scores, cwd, feature_mse, fgd, pkd, relative_error, scale_masks
from ..losses.relation import standardised
from ..projectors import GlobalContext, MapProjector, MaskedGeneration, MatchedScale
from .base import DistillationMethod, check_choice

SCALES = {
    "score": 6.0,  # Ultralytics' `dis` (docs/en/guides/knowledge-distillation.md @ 08de290)
    "mse": 6.0,  # ours: as "score", with all cells alike
    "relative": 6.0,  # ours: as "score", which it equals where the teacher's squares are 1 on average
    "fgd": 0.05,  # TPRD, beside the four factors of fgd.py
    "mgd": 10.0,  # TPRD, mean form
    "cwd": 10.0,  # mmrazor, cwd_fpn_gfl_r101_gfl_r50
    "pkd": 10.0,  # mmrazor, pkd_fpn one-stage
}
"""By ``loss``: the factor at which its authors use it, so that the weight of the term is 1 for all of them."""
FGD_RELATION = 5e-6  # fgd.py, lambda


@dataclass(frozen=True)
class FeaturesConfig:
    """Settings of `Features`."""

    weights: dict[str, float] = field(default_factory=lambda: {"feature": 1.0})
    """Of the loss at the scale of its authors, see `SCALES`."""
    loss: str = "score"
    tap: str = "memory"
    """"memory": what the decoder cross-attends to; "backbone": the backbone's maps."""
    adapter: str = "auto"
    """A 1x1 convolution before the comparison: where the channels differ ("auto"), or always."""
    normalize: bool = False
    """Compare each cell's channels after standardising them, so that the scale of the two models doesn't matter
    ("score" and "mse" only; RT-DETR's and others' memories have scales of their own)."""
    temperature: float = 1.0
    """"cwd": mmrazor's detection preset."""
    masked_share: float = 0.5
    """"mgd": cells that are left out (TPRD)."""

    def __post_init__(self):
        check_choice(self, loss=tuple(SCALES), tap=("memory", "backbone"), adapter=("auto", "always"))
        if not 0 <= self.masked_share <= 1:
            raise ValueError(f"`masked_share` is {self.masked_share}; it is a share of cells, 0 to 1.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be above 0.")


class Features(DistillationMethod):
    """The student's maps are to be the teacher's, level by level; no query is matched with any.

    The cheapest method: no further decoder pass, and the one that teaches backbone and encoder directly. Works between
    all families; maps are paired by their grids, resized to the teacher's and, where channels differ, compared through
    a 1x1 convolution that is trained with the student.

    **Terms**: ``feature``, the sum over levels of F^S = f(student's map) against F^T, with s the weight of a cell:

    - "score": ``sum_p s_p |F^S_p - F^T_p|^2 / (C sum_p s_p)``, s the teacher's highest class probability of a box over
      the cell
    - "mse": the same with s = 1
    - "relative": ``sum_p s_p |F^S_p - F^T_p|^2 / sum_p s_p |F^T_p|^2``, which has the same size for maps of any scale
    - "fgd": ``a sum fg A^S A^C (F^T - F^S)^2 + b sum bg ... + c |A^T - A^S| + d |G(F^T) - G(F^S)|^2``
    - "mgd": ``|F^T - G(masked F^S)|^2``, mean
    - "cwd": ``T^2 KL(softmax_p(F^T_c / T) || softmax_p(F^S_c / T))``, mean over channels
    - "pkd": ``1 - Pearson's r`` of each channel, mean over channels

    **Differs from the papers**: padded cells never count. "score" takes the score of a cell from the boxes the teacher
    predicts (Ultralytics: from the class map of a dense head, which DETR-like models lack). "pkd" divides by the biased
    deviation. "mgd" is a mean, not a sum.
    """

    name = "features"
    config_class = FeaturesConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        if config.tap == "backbone" and not any(p.requires_grad for p in student.feature_module.parameters()):
            raise ValueError(
                "`tap='backbone'` compares the backbone's maps, but the student's backbone is frozen, so it can't learn "
                "from them. Unfreeze it, or use tap='memory'."
            )
        self.maps = MapProjector(student, teacher, config.tap, always=config.adapter == "always")
        channels = (
            [teacher.memory_width] if config.tap == "memory" else teacher.feature_channels[-len(self.maps.levels) :]
        )
        self.scale = MatchedScale() if config.loss == "relative" else None
        self.generation = nn.ModuleList(MaskedGeneration(c) for c in channels if config.loss == "mgd")
        self.context = nn.ModuleList(
            nn.ModuleList([GlobalContext(c), GlobalContext(c)]) for c in channels if config.loss == "fgd"
        )

    def forward(self, student, teacher, targets, generator):
        config, total = self.config, 0.0
        pairs = self.maps(student, teacher)
        if self.scale is not None:
            pairs = self.scale(pairs)
        for level, maps in enumerate(pairs):
            module = level if config.tap == "backbone" else 0
            if config.loss == "relative":
                loss = relative_error(maps.student, maps.teacher, _scores(teacher, maps.mask))
            elif config.loss in ("score", "mse"):
                weight = _scores(teacher, maps.mask) if config.loss == "score" else maps.mask.float()
                pair = (
                    [standardised(x, 1) for x in (maps.student, maps.teacher)]
                    if config.normalize
                    else (maps.student, maps.teacher)
                )
                loss = feature_mse(*pair, weight)
            elif config.loss == "fgd":
                masks = scale_masks([target["boxes"] for target in targets], maps.mask, inclusive=True)
                loss = fgd(maps.student, maps.teacher, masks, maps.mask)
                own, others = (
                    g(x, maps.mask)
                    for g, x in zip(self.context[module], (maps.student, maps.teacher.to(maps.student)), strict=True)
                )
                squared = (own.float() - others.float()).square().sum(1)
                loss = loss + FGD_RELATION * (squared * maps.mask).sum() / len(squared)
            elif config.loss == "mgd":
                generated = self.generation[module](maps.student, maps.mask, config.masked_share, generator)
                loss = feature_mse(generated, maps.teacher, maps.mask.float())
            elif config.loss == "cwd":
                loss = cwd(maps.student, maps.teacher, maps.mask, temperature=config.temperature)
            else:
                loss = pkd(maps.student, maps.teacher, maps.mask)
            total = total + SCALES[config.loss] * loss
        return {"feature": total}


def _scores(teacher, mask):
    """The highest class probability of the teacher's boxes over each cell, (B, h, w)."""
    return box_scores(teacher.boxes[-1], teacher.class_probs()[-1].amax(-1), mask)
