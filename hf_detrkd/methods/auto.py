"""``--method auto``: the methods and settings that our own runs are best with, by what a pair can carry.

The evidence is docs/results, what it says docs/when_distillation_helps.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..families import FamilyAdapter

AUTO = "auto"

_POINTS = {"class_loss": "bernoulli", "weights": {"general_class": 0, "general_l1": 0, "general_giou": 0}}
"""KD-DETR with the teacher's own queries only: half the cost, and twice the gain of the defaults on BCCD (validation)."""


@dataclass(frozen=True)
class Choice:
    """What `DistillationConfig` would say had the user chosen it."""

    method: tuple[str, ...]
    method_config: Mapping[str, Any] | None
    kd_decay: str
    reason: str
    """Why these, for the log."""


def choose(student: FamilyAdapter, teacher: FamilyAdapter) -> Choice:
    """The methods for a pair.

    Raises:
        ValueError: a pair of which we have no run to judge by, and no method that is safe without one.
    """
    first_stages = "proposals" in student.provides & teacher.provides
    if first_stages:
        return Choice(
            ("proposals", "kd_detr"),
            {"kd_detr": _POINTS},
            "linear",
            "both models are two-stage: the student's first stage learns what to select, its decoder from the teacher's queries",
        )
    if "replay" in student.provides:
        return Choice(("kd_detr",), _POINTS, "linear", "the student's decoder can answer the teacher's own queries")
    return Choice(
        ("logit_kd",), None, "linear", "the student's decoder can't be replayed, so predictions are matched instead"
    )
