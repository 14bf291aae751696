"""A grid of runs: its cells, what each of them needs, and how far they are. `grid_file` reads one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..reporting.fairness import HARMLESS
from ..reporting.summary import TWIN
from .resuming import last_complete_checkpoint

TEACHER = "teacher"
OF_THE_HARNESS = frozenset(
    {"output_dir", "seed", "with_twin", "evaluate_teacher", "only_teacher", "resume_from_checkpoint"}
)
"""Flags of a recipe that the harness sets itself: no grid's file may."""
LENGTH = "time_of.yaml"
"""Beside the recipe of a longer twin, which has its own `max_steps`: what they were computed from."""


@dataclass(frozen=True)
class Cell:
    """One run: a distilled student, a twin, or the measurement of a teacher."""

    data: str
    pair: str
    method: str
    seed: int | None
    """None of a teacher that all seeds share."""
    recipe: Mapping[str, Any]
    """The flags of distill.py."""
    folder: Path
    time_of: str | None = None
    """A longer twin: the method whose time it gets."""

    @property
    def name(self) -> str:
        """data/pair/method/seed0, or data/pair/teacher (with a seed where every seed has its own)."""
        return "/".join([self.data, self.pair, self.method, *([] if self.seed is None else [f"seed{self.seed}"])])

    @property
    def results(self) -> Path:
        """The file that is there once the cell is done."""
        return self.folder / "results.json"

    def read(self) -> dict[str, Any]:
        """What the cell wrote."""
        return json.loads(self.results.read_text(encoding="utf-8"))

    @property
    def begun(self) -> bool:
        """Whether something of it is kept: a result or a checkpoint."""
        recipe = self.folder / "recipe.yaml"
        return recipe.is_file() and (self.results.is_file() or last_complete_checkpoint(self.folder) is not None)

    def length(self) -> dict[str, Any]:
        """What the steps of a longer twin depend on, besides the epochs in its recipe."""
        return {"time_of": self.time_of, "max_steps": self.recipe.get("max_steps")}

    def changes(self) -> list[str]:
        """Settings that differ from those the cell was begun with, in words; none where it hasn't begun."""
        if not self.begun:
            return []
        begun, now = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8")), dict(self.recipe)
        if self.time_of:
            length = self.folder / LENGTH  # earlier versions wrote none
            begun |= yaml.safe_load(length.read_text(encoding="utf-8")) if length.is_file() else self.length()
            now |= self.length()
        return [
            f"{name} {begun.get(name)!r} -> {now.get(name)!r}"
            for name in sorted((begun.keys() | now.keys()) - HARMLESS)
            if begun.get(name) != now.get(name)
        ]

    def state(self) -> str:
        """``done``, ``changed``, ``to do``, or the checkpoint from which it would go on."""
        if self.changes():
            return "changed"
        if self.results.is_file():
            return "done"
        checkpoint = last_complete_checkpoint(self.folder)
        return "to do" if checkpoint is None else Path(checkpoint).name


@dataclass(frozen=True)
class Grid:
    """All cells, in the order in which they are best run: seed by seed, the twin before the methods."""

    name: str
    split: str
    cells: tuple[Cell, ...]
    """The teachers' among them."""

    def cell(self, data: str, pair: str, method: str, seed: int | None = None) -> Cell | None:
        """The cell, where the grid has it."""
        found = (c for c in self.cells if (c.data, c.pair, c.method, c.seed) == (data, pair, method, seed))
        return next(found, None)

    @property
    def time_of(self) -> dict[str, str]:
        """By name of a longer twin, the method whose time it has."""
        return {cell.method: cell.time_of for cell in self.cells if cell.time_of}

    def teacher_of(self, cell: Cell) -> Cell | None:
        """The measurement of a cell's teacher, of its own seed where the pair has a teacher for each."""
        return self.cell(cell.data, cell.pair, TEACHER, cell.seed) or self.cell(cell.data, cell.pair, TEACHER)

    def steps_in_time(self, cell: Cell) -> int:
        """The steps a longer twin has: as many as take the time of the distilled run of the same seed.

        Raises:
            ValueError: where one of the two doesn't know, as it was resumed (after its last step, or with `kd_stop`), and where
                the distilled run was the faster one.
        """
        pair = [self.cell(cell.data, cell.pair, method, cell.seed) for method in (TWIN, cell.time_of)]
        twin, other = (run.read()["student"] for run in pair)
        for run, row in zip(pair, (twin, other), strict=True):
            if not row["step_seconds"]:
                raise ValueError(
                    f"{run.name} doesn't know how long its steps take; delete {run.folder} and run it again"
                )
        ratio = other["step_seconds"] / twin["step_seconds"]
        if ratio < 1:
            raise ValueError(
                f"A step of {pair[1].name} took {ratio:.2f} times that of {pair[0].name}, which is the same without a teacher: "
                f"other work slowed them unevenly. Delete {pair[0].folder} and {pair[1].folder} and run them again."
            )
        return round(twin["steps"] * ratio)

    def needs(self, cell: Cell) -> list[Cell]:
        """The cells that must be done before: of a twin its teacher, of the others the twin too."""
        if cell.method == TEACHER:
            return []
        methods = [TWIN] * (cell.method != TWIN) + [cell.time_of] * (cell.time_of is not None)
        others = [self.cell(cell.data, cell.pair, method, cell.seed) for method in methods]
        return [needed for needed in (self.teacher_of(cell), *others) if needed is not None]

    def selected(self, pattern: str) -> list[Cell]:
        """The cells whose name fits a pattern, and what they need."""
        chosen = [cell for cell in self.cells if fnmatchcase(cell.name, pattern)]
        if not chosen:
            raise ValueError(
                f"{pattern!r} fits no cell of {self.name}; cells are called {self.cells[-1].name} and so on."
            )
        wanted = {
            needed.name for cell in chosen for first in self.needs(cell) for needed in (first, *self.needs(first))
        }
        wanted |= {cell.name for cell in chosen}
        return [cell for cell in self.cells if cell.name in wanted]
