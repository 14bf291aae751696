"""``--method auto``: the methods and settings that our own runs are best with, by what the student can carry.

The evidence is in docs/results; docs/when_distillation_helps.md says what follows from it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..families import FamilyAdapter

if TYPE_CHECKING:
    from ..config import DistillationConfig

logger = logging.get_logger(__name__)

_MAPS = {"loss": "relative", "weights": {"feature": 0.5}}
"""Maps by their relative error, of which no pair needs a weight of its own: with half the usual factor and `_POINTS` beside
it distillation had a third of the gradient norm on BCCD and on shapes (docs/results)."""
_POINTS = {"class_loss": "bernoulli", "weights": {"general_class": 0, "general_l1": 0, "general_giou": 0}}
"""KD-DETR on the teacher's own queries only: without a decoder pass of the teacher, and better on BCCD's validation split
than with random ones (docs/results/README.md)."""


@dataclass(frozen=True)
class Choice:
    """What a `DistillationConfig` would say had the user chosen it."""

    method: tuple[str, ...]
    method_config: Mapping[str, Any] | None
    kd_decay: str
    reason: str
    """Why these, for the log."""


ALIKE = Choice(
    ("d3etr",),
    None,
    "linear",
    "teacher and student are of one family and width and attend alike, so attention and predictions teach",
)
"""For a student that is its teacher with fewer layers, or could be. On the validation split, over the seeds that have both, it gained more
than maps and points in the mean with the DETRs and Conditional DETRs of docs/results' bccd_weights, bccd_finetuned (its terms balanced) and
bccd_long, where with the DETR neither gained."""


def choose(student: FamilyAdapter | type[FamilyAdapter], teacher: FamilyAdapter | None = None) -> Choice:
    """The methods for a student, by what its family provides, and by whether it could be made from its teacher.

    Args:
        teacher: None: not known, or attention maps can't be kept.
    """
    if (
        teacher is not None
        and attends_densely(student)
        and type(student) is type(teacher)
        and student.width == teacher.width
    ):
        return ALIKE
    maps = "the maps that the decoder reads teach backbone and encoder"
    if student.replays:
        return Choice(
            ("features", "kd_detr"),
            {"features": _MAPS, "kd_detr": _POINTS},
            "linear",
            f"{maps}, the teacher's own queries the decoder",
        )
    return Choice(
        ("features", "logit_kd"),
        {"features": _MAPS},
        "linear",
        f"{maps}; the student's decoder can't be replayed, so predictions are matched",
    )


def attends_densely(student: FamilyAdapter | type[FamilyAdapter]) -> bool:
    """Whether queries attend to all of the memory, in a decoder that can be replayed: DETR, Conditional DETR, DAB-DETR."""
    return student.replays and not student.sampled


def settled(args: DistillationConfig, student: FamilyAdapter, teacher: FamilyAdapter) -> DistillationConfig:
    """The settings with the methods chosen for a pair in place of ``auto``; where they name methods, these very settings.

    A decay that was asked for stays.
    """
    if args.method != ["auto"]:
        return args
    # With checkpointing attention maps need models in eager attention
    return with_choice(args, choose(student, None if args.gradient_checkpointing else teacher))


def with_choice(args: DistillationConfig, choice: Choice) -> DistillationConfig:
    """The settings with these methods in place of ``auto``."""
    decay = choice.kd_decay if args.kd_decay == "none" else args.kd_decay
    logger.warning(f"method auto: {' + '.join(choice.method)}, kd_decay {decay}: {choice.reason}.")
    args = copy.copy(args)
    args.method, args.method_config, args.kd_decay = list(choice.method), choice.method_config, decay
    return args
