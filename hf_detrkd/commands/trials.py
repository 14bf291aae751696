"""Settings chosen by whole runs on the validation split: a twin's learning rate, a method's share of the gradient."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..reporting.fairness import METHOD_FIELDS
from ..reporting.summary import TWIN
from .compare import Runner
from .grid import OF_THE_HARNESS, TEACHER, Cell, Grid
from .grid_file import read_grid


def search(
    grid: Grid, cell: Cell, fields: Mapping[str, Any], weights: Mapping[float, float], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Whole runs with each weight.

    Returns:
        by share ``kd_weight``, ``validation_map`` and ``twin_map`` in AP points of the validation split.
    """
    methods = {f"{cell.method}@{share}": {**fields, "kd_weight": weight} for share, weight in weights.items()}
    points = _whole_runs(grid, cell, {cell.pair: {}}, methods, "search", arguments)
    if None in points.values():
        raise RuntimeError(f"The search of {cell.name} is not complete. Start the command again when that is mended.")
    return [
        {
            "share": share,
            "kd_weight": weight,
            "validation_map": points[cell.pair, f"{cell.method}@{share}"],
            "twin_map": points[cell.pair, TWIN],
        }
        for share, weight in weights.items()
    ]


def tune_rate(grid: Grid, cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """The learning rate with which a twin is best, and the AP on the validation split with each; None where it failed."""
    name = f"{cell.data}/{cell.pair}"
    pairs = {f"{cell.pair}@{rate:g}": {"learning_rate": rate} for rate in arguments.learning_rates}
    points = _whole_runs(grid, cell, pairs, {TWIN: {}}, "rates", arguments)
    rows = [
        {"learning_rate": flags["learning_rate"], "validation_map": points[pair, TWIN]} for pair, flags in pairs.items()
    ]
    ended = [row for row in rows if row["validation_map"] is not None]
    if not ended:
        raise RuntimeError(f"With these learning rates no twin of {name} ended; the reasons stand above.")
    best = max(ended, key=lambda row: row["validation_map"])["learning_rate"]
    print(f"{name}: learning_rate {best:g}, for `pairs: {cell.pair}` of the grid")
    for row in rows:
        reached = "failed" if row["validation_map"] is None else f"AP {row['validation_map']} on val"
        print(f"  learning_rate {row['learning_rate']:g}: {reached}")
    for end, extreme in (("largest", max), ("smallest", min)):
        if best == extreme(arguments.learning_rates):
            print(f"  {best:g} is the {end} that was tried: try beyond it too")
    return {"learning_rate": best, "search": rows, "seed": cell.seed}


def _whole_runs(
    grid: Grid,
    cell: Cell,
    pairs: Mapping[str, Mapping[str, Any]],
    methods: Mapping[str, Mapping[str, Any]],
    purpose: str,
    arguments: argparse.Namespace,
) -> dict[tuple[str, str], float | None]:
    """A cell's run with other flags and other methods, in a grid of its own that sees the validation split only.

    Returns:
        by pair and method, the twin among them, the AP in points; None of runs that failed.
    """
    flags = {name: value for name, value in cell.recipe.items() if name not in METHOD_FIELDS | OF_THE_HARNESS}
    own = {"teacher": flags.pop("teacher_model_name_or_path"), **flags}
    pairs = {name: {**own, **others} for name, others in pairs.items()}
    content = {"data": {cell.data: {}}, "pairs": pairs, "methods": dict(methods), "seeds": [cell.seed]}
    path = Path(arguments.runs) / f"{grid.name}_{purpose}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, "split": "validation"}, sort_keys=False), encoding="utf-8")
    trials = read_grid(path, arguments.runs)
    outcomes = Runner(trials, arguments.jobs).run(trials.cells)
    return {
        (trial.pair, trial.method): round(100 * trial.read()["student"]["validation"]["map"], 2)
        if outcomes[trial.name] == "done"
        else None
        for trial in trials.cells
        if trial.method != TEACHER
    }
