"""``--method auto``: the methods and settings that our own runs are best with, by what a pair can carry.

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


def choose(student: FamilyAdapter, teacher: FamilyAdapter) -> Choice:
    """The methods for a pair, by what its families provide. Every pair has one."""
    if "proposals" in student.provides & teacher.provides:
        return Choice(
            ("proposals", "kd_detr"),
            {"kd_detr": _POINTS},
            "linear",
            "both models are of the RT-DETR line, whose first stage selects what the decoder gets",
        )
    if "replay" in student.provides:
        return Choice(("kd_detr",), _POINTS, "linear", "the student's decoder can answer the teacher's own queries")
    return Choice(("logit_kd",), None, "linear", "the student's decoder can't be replayed: predictions are matched")


def settled(args: DistillationConfig, student: FamilyAdapter, teacher: FamilyAdapter) -> DistillationConfig:
    """The settings with the methods chosen for a pair in place of ``auto``; where they name methods, these very settings.

    A decay that was asked for stays.
    """
    if args.method != ["auto"]:
        return args
    choice = choose(student, teacher)
    decay = choice.kd_decay if args.kd_decay == "none" else args.kd_decay
    logger.warning(f"method auto: {' + '.join(choice.method)}, kd_decay {decay}: {choice.reason}.")
    args = copy.copy(args)
    args.method, args.method_config, args.kd_decay = list(choice.method), choice.method_config, decay
    return args
