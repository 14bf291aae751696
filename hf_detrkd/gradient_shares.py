"""Shares of the gradient norm: in which steps they are measured, and what is said of those that are too small."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from .methods import DistillationMethod

if TYPE_CHECKING:
    from .config import DistillationConfig

logger = logging.get_logger(__name__)

FIRST_STEP = 20
"""As `--after` of scripts/tune.py. In the first steps from random weights the task's gradient is a hundred times what it is soon
after (RT-DETR on `shapes`: 0.3 % of the gradient were distillation's, then 36 %), so that shares there mean nothing."""

LEAST_SHARE = 0.01
"""Of distillation. Shares of 10 to 40 % at the start are what helped in our runs (docs/results)."""

LEAST_TERM_SHARE = 0.001
"""Of one term. In docs/results/bccd_long.json no term that is on has a share between 0.0004 and 0.002; below are, at their default
weights, the maps of `clockdistill` and `detrdistill` with an RT-DETR, and the background of `clockdistill` with a Deformable DETR."""

USUAL_SHARE, USUAL_TERM_SHARE = 0.3, 0.1
"""That distillation, or a term of it, is proposed to have where it has too little: inside of the shares that helped, and about
what the maps of `clockdistill_maps` there had."""


def measured_in(step: int, max_steps: int, every: int, kd_every: int = 1) -> bool:
    """Whether the shares are measured in a step that has a teacher: in three after the first twenty, then in one of ``every``.

    Args:
        kd_every: how many steps there are to one with a teacher.
    """
    first = max(0, min(FIRST_STEP, max_steps - 3 * kd_every))
    if every == 0:
        return False
    return first <= step < first + 3 * kd_every or (step + 1 >= every and (step + 1) % every < kd_every)


def weight_for(target: float, share: float, weight: float) -> float:
    """The weight with which a share becomes the target; to three digits, which is more than it is known to.

    With the norms d of detection and k of distillation the share is k / (d + k), so k / d = share / (1 - share), and k is
    proportional to the weight.
    """
    return float(f"{weight * (target / (1 - target)) * ((1 - share) / share):.3g}")


def changed(config: Any) -> dict[str, Any]:
    """The settings of a method that aren't its defaults, and of its weights these alone: what `method_config` has to say."""
    default = type(config)()
    settings = {f.name: getattr(config, f.name) for f in fields(config)}
    settings = {name: value for name, value in settings.items() if value != getattr(default, name)}
    if "weights" in settings:
        usual = default.weights
        settings["weights"] = {term: value for term, value in config.weights.items() if value != usual.get(term)}
    return settings


class NoticeIdleTerms(TrainerCallback):
    """Warns once where distillation, or one of its terms, is too weak to change anything: the run would pass for a distilled one."""

    def __init__(self, methods: Iterable[DistillationMethod]):
        self.methods = tuple(methods)
        self.warned = False
        self.logged = 0
        """Steps of which the shares have been logged."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.logged = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        share = (logs or {}).get("gradient_share_kd")
        if share is None:
            return
        scale = self._measured_scale(args, range(self.logged, state.global_step), state.max_steps)
        self.logged = state.global_step
        if self.warned or scale < 0.5 or not state.is_world_process_zero:  # small by the schedule's wish
            return
        if share < LEAST_SHARE:
            self.warned = True
            logger.warning(
                f"Distillation has {share:.2g} of the gradient norm (`gradient_share_kd`): the student learns nothing from "
                f"the teacher. {self._more(share, scale, args.kd_weight)}"
            )
        elif idle := self._idle(logs):
            self.warned = True
            logger.warning(
                f"Terms with next to nothing of the gradient norm: {', '.join(f'{name} {share:.2g}' for name, share in idle.items())}. "
                "The student learns nothing from them. Leave them out with weights of 0, or give each about "
                f"{USUAL_TERM_SHARE:g} of it: --method {' '.join(method.name for method in self.methods)} --method_config "
                f"'{json.dumps(self._heavier(idle, scale))}'"
                + f" --kd_decay {args.kd_decay}"
                * (args.kd_decay != "none")
            )

    @staticmethod
    def _measured_scale(args: DistillationConfig, steps: range, max_steps: int) -> float:
        """The part of `kd_weight` that the schedule left of distillation in the steps that were measured, in the mean."""
        every = args.kd_every
        taught = (step for step in steps if measured_in(step, max_steps, args.gradient_share_steps, every))
        scales = [scale for step in taught if (scale := args.kd_scale(step, max_steps))]
        return statistics.mean(scales) / (args.kd_weight * every) if scales else 0.0

    def _more(self, share: float, scale: float, weight: float) -> str:
        if share == 0:
            return "No weight can change that: are all terms switched off, or is the student the teacher?"
        return (
            f"0.1 to 0.4 at the start are usual: --kd_weight {weight_for(USUAL_SHARE, share, scale * weight):g} (now "
            f"{weight:g}) would give it about {USUAL_SHARE:g}."
        )

    def _idle(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Share by name, as the log has it, of the terms that are on and hardly do anything."""
        terms = {name: logs.get(f"gradient_share_{name}") for name, _, _ in self._terms() if f"kd_{name}" in logs}
        return {name: share for name, share in terms.items() if share is not None and share < LEAST_TERM_SHARE}

    def _heavier(self, idle: Mapping[str, float], scale: float) -> dict:
        """The methods' settings with weights that give idle terms the usual share; those without a gradient keep theirs."""
        settings = {method.name: changed(method.config) for method in self.methods}
        for name, method, term in self._terms():
            if idle.get(name):
                weight = scale * method.config.weights[term] * USUAL_TERM_SHARE / idle[name]
                settings[method.name].setdefault("weights", {})[term] = float(f"{weight:.2g}")
        return settings if len(self.methods) > 1 else settings[self.methods[0].name]

    def _terms(self) -> Iterable[tuple[str, DistillationMethod, str]]:
        for method in self.methods:
            for term in method.config.weights:
                yield (f"{method.name}_{term}" if len(self.methods) > 1 else term), method, term
