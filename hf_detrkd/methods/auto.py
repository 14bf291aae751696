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


def choose(student: FamilyAdapter | type[FamilyAdapter]) -> Choice:
    """The methods for a student of any teacher, by what its family provides."""
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


def settled(args: DistillationConfig, student: FamilyAdapter | type[FamilyAdapter]) -> DistillationConfig:
    """The settings with the methods chosen for a student in place of ``auto``; where they name methods, these very settings.

    A decay that was asked for stays.
    """
    if args.method != ["auto"]:
        return args
    choice = choose(student)
    decay = choice.kd_decay if args.kd_decay == "none" else args.kd_decay
    logger.warning(f"method auto: {' + '.join(choice.method)}, kd_decay {decay}: {choice.reason}.")
    args = copy.copy(args)
    args.method, args.method_config, args.kd_decay = list(choice.method), choice.method_config, decay
    return args
