"""What lies in a checkpoint beside the plain student, and how a run goes on from it."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from .ema import ExponentialMovingAverage
from .model import DistillationModel

STATE_NAME = "distillation_state.pt"
"""In every checkpoint, beside the plain student: projectors, raw weights under the moving average, the teacher's digest."""


def training_state(
    model: DistillationModel,
    ema: ExponentialMovingAverage | None,
    teacher: PreTrainedModel | None,
    teacher_digest: str | None,
) -> dict[str, Any]:
    """What a resume needs besides the student as it was evaluated; to be called while the student has its raw weights."""
    state: dict[str, Any] = {"methods": model.methods.state_dict()}
    if teacher is not None:
        state["teacher"] = {"digest": teacher_digest, "name_or_path": teacher.name_or_path}
    if ema is not None:
        raw = {name: value.detach().clone() for name, value in model.student.state_dict().items()}
        state |= {"student": raw, "ema_updates": ema.updates}
    return state


def write_state(state: dict[str, Any], folder: str) -> None:
    """Writes a `training_state` into a checkpoint."""
    torch.save(state, os.path.join(folder, STATE_NAME))


def read_state(folder: str) -> dict[str, Any]:
    """What a checkpoint holds beside the plain student."""
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} has no {STATE_NAME}: it is no checkpoint of DistillationTrainer, or an unfinished one."
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(folder: str, model: DistillationModel, ema: ExponentialMovingAverage | None) -> None:
    """Every tensor of a checkpoint, as it was evaluated.

    Not by `load_state_dict(file)`: files have legacy names, which it would skip.
    """
    saved = type(model.student).from_pretrained(folder)
    model.student.load_state_dict(saved.state_dict())
    if ema is not None:
        ema.copy_from_model()
    model.methods.load_state_dict(read_state(folder)["methods"])


def resume(
    folder: str, model: DistillationModel, ema: ExponentialMovingAverage | None, teacher_digest: str | None
) -> None:
    """Everything as it was when the checkpoint was written: the average, and the raw weights under it.

    Raises:
        ValueError: the run that wrote it had another teacher, or only one of the two has a teacher or an average.
    """
    state = read_state(folder)
    if (ema is not None) != ("student" in state):
        raise ValueError(
            f"{folder} was written {'with' if 'student' in state else 'without'} a moving average, "
            f"and this run has `ema_decay={0 if ema is None else ema.decay}`. Resume with the settings of the first run."
        )
    recorded = state.get("teacher")
    if (recorded is None) != (teacher_digest is None):
        raise ValueError(
            f"{folder} was written {'without' if recorded is None else 'with'} a teacher. "
            "Resume with the method of the first run."
        )
    if recorded is not None and recorded["digest"] != teacher_digest:
        raise ValueError(
            f"The teacher's weights are not those of the run that wrote {folder} "
            f"(teacher {recorded['name_or_path']!r}). Resume with that teacher, or start a new run."
        )
    load_checkpoint(folder, model, ema)
    if ema is not None:
        ema.updates = state["ema_updates"]
        model.student.load_state_dict(state["student"])
