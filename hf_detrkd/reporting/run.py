"""A run as it lies on disk, finished or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from .curves import History
from .writing import whole

UNFINISHED = "unfinished.json"
"""What ``results.json`` will hold, as far as it is known. It is there while the run isn't finished."""
STATE = "trainer_state.json"
TWIN = "twin"
"""The twin's folder in that of its run."""


@dataclass(frozen=True)
class Run:
    """What a run has written down. ``role`` is "student", or "model" where there is no teacher; "twin" is the other one."""

    folder: Path
    finished: bool
    role: str
    results: Mapping[str, Any]
    """As in ``results.json``. A detector that isn't evaluated yet has the validation metrics of its last evaluation."""
    states: Mapping[str, Mapping[str, Any]]
    """By role, Trainer's state at its last evaluation or at its end."""

    @property
    def histories(self) -> dict[str, History]:
        """By role, Trainer's log history."""
        return {role: state["log_history"] for role, state in self.states.items()}

    @property
    def training(self) -> str | None:
        """The role that is in training."""
        if self.finished:
            return None
        return TWIN if self.results[self.role].get("test") else self.role

    @property
    def methods(self) -> list[str]:
        """The names of the distillation methods."""
        named = self.results[self.role].get("method")
        config = self.results.get("settings", {}).get("DistillationConfig", {})
        names = named.split("+") if named else config.get("method", [])
        return [name for name in names if name != "none"]


def read_run(folder: str | Path) -> Run:
    """Reads the folder of `distill` or `finetune`, or of any `DistillationTrainer`, at any time.

    Raises:
        ValueError: it has neither results nor a state of Trainer's.
    """
    folder = Path(folder)
    file = results_file(folder)
    finished = file is not None and file.name != UNFINISHED
    results = {"student": None} if file is None else json.loads(file.read_text(encoding="utf-8"))
    role = "student" if "student" in results else "model"
    places = {role: folder}
    if not finished or results.get(TWIN):  # else it is an earlier run's
        places[TWIN] = folder / TWIN
    states = {name: state for name, its in places.items() if (state := _state(its))}
    if file is None and not states:
        raise ValueError(
            f"{folder} is not the folder of a run: it has no results.json, no {UNFINISHED} and no {STATE}. A run writes them "
            "at its first evaluation."
        )
    rows = {
        name: results.get(name) or _so_far(states.get(name))
        for name in (role, *(name for name in states if name != role))
    }
    results = {key: value for key, value in results.items() if value is not None} | rows
    return Run(folder, finished, role, results, states)


def results_file(folder: Path) -> Path | None:
    """What is known of the last run in a folder: ``results.json``, unless it isn't finished; None where nothing is."""
    return next((file for name in (UNFINISHED, "results.json") if (file := folder / name).is_file()), None)


def checkpoints(folder: Path) -> list[Path]:
    """Trainer's checkpoints, also those that were not written to their end, by step; not what only has such a name."""
    found = [its for its in folder.glob("checkpoint-*") if its.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda its: int(its.name.removeprefix("checkpoint-")))


def write_state(state: TrainerState, folder: str | Path) -> None:
    """Writes Trainer's state, whole or not at all: whoever watches the run reads all of it, and a full disk leaves the last one."""
    with whole(Path(folder) / STATE) as part:
        state.save_to_json(str(part))


def _state(folder: Path) -> dict[str, Any] | None:
    """Trainer's state: the folder's own, or that of its newest checkpoint."""
    files = (its / STATE for its in (folder, *reversed(checkpoints(folder))))
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))


def _so_far(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row of a detector in training."""
    if state is None:
        return {"steps": 0, "validation": {}}
    last = next((log for log in reversed(state["log_history"]) if "eval_map" in log), {})
    metrics = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    return {"steps": state["global_step"], "validation": metrics}
