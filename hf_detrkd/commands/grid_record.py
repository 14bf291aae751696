"""What a grid's ``<grid>.json`` has recorded of runs that aren't on this machine, beside those that are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..families import FAMILIES
from ..methods import ALIKE, attends_densely, choose, with_choice
from ..reporting.fairness import HARMLESS, METHOD_DEFAULTS, METHOD_FIELDS
from ..reporting.summary import TWIN, gain_rows, pair_name
from .arguments import parse
from .distill import ARGUMENTS
from .grid import OF_THE_HARNESS, TEACHER, Cell, Grid
from .records import settings

REPRODUCED = ("initial_digest", "steps", "validation", "test")
"""In what a twin that was run here must be as the recorded one, to the last digit."""
OF_THE_DEVICE = frozenset({"bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval"})
"""Flags that transformers refuses on a machine without the device, where nothing of the record is run."""


def continue_record(grid: Grid, here: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[dict, dict[str, str]]:
    """The runs that are here and the recorded ones that go with them.

    A recorded run counts as one that is here, unless something speaks against it: the grid says other settings than it
    had (of a method's fields also by leaving one out, which means its default); the pair's teacher, measured here, has
    other numbers; or the twin of its seed, trained here, began with other weights or ended with other numbers. A setting
    of all cells that the grid no longer names is noticed with the first twin that is run.

    Args:
        grid: whose cells count, in this order.
        here: of `reporting.summary.summarize`; it goes before the record.
        recorded: the same of another time or machine.

    Returns:
        a summary, and by name of every cell that is recorded and not here ``done``, or why its record is left out.
    """
    runs, pairs, verdicts = {}, {}, {}
    for cell in grid.cells:
        teacher = grid.teacher_of(cell)
        pair = pair_name(teacher.data, teacher.pair, teacher.seed)
        place, name, kept = ("pairs", pair, pairs) if cell.method == TEACHER else ("runs", cell.name, runs)
        if name in here[place]:
            kept[name] = here[place][name]
        elif name in recorded[place] and not cell.results.is_file():  # what ended here is unfair, or has changed
            reason = _against(cell, pair, here, recorded)
            if reason is None:
                kept[name] = recorded[place][name]
            verdicts[cell.name] = "done" if reason is None else f"to do; its record is left out: {reason}"
    return {**here, "rows": gain_rows(runs, pairs, grid.time_of), "pairs": pairs, "runs": runs}, verdicts


def _against(cell: Cell, pair: str, here: Mapping, recorded: Mapping) -> str | None:
    """What speaks against a recorded cell, in words."""
    was, now = recorded["pairs"].get(pair), here["pairs"].get(pair)
    if was is None:
        return "there is none of its teacher"
    shared = {**METHOD_DEFAULTS, **_flags(was["settings"])}
    ran = shared if cell.method == TEACHER else {**shared, **recorded["runs"][cell.name]}
    free = OF_THE_HARNESS | HARMLESS | (METHOD_FIELDS if cell.method == TEACHER else set())
    free |= {"max_steps"} if cell.time_of else set()
    asked = {name: value for name, value in {**METHOD_DEFAULTS, **cell.recipe}.items() if name not in free}
    if any(ran.get(name) != value for name, value in asked.items()):
        runs = [{name: run[name] for name in asked} for run in _as_runs(cell, ran)]
        asked = next((run for run in runs if all(ran.get(name) == value for name, value in run.items())), runs[0])
    for name, value in asked.items():
        if ran.get(name) != value:
            return f"{name} was {ran.get(name)!r} and is {value!r}"
    if now is not None and now["teacher"]["metrics"] != was["teacher"]["metrics"]:
        return "the teacher here has other numbers than the recorded one"
    twin = f"{cell.data}/{cell.pair}/{TWIN}/seed{cell.seed}"
    if twin in here["runs"]:
        was, now = recorded["runs"].get(twin), here["runs"][twin]
        if was is None or any(was[name] != now[name] for name in REPRODUCED):
            return "the twin here is not the recorded one"
    return None


def _as_runs(cell: Cell, ran: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A cell's flags as its run records them: numbers that YAML takes for text (1e-3) are numbers, and `auto` is what it chooses,
    with a teacher of another kind or of the student's own."""
    *groups, args = parse(ARGUMENTS, [], defaults={k: v for k, v in cell.recipe.items() if k not in OF_THE_DEVICE})
    several = [args]
    if cell.method != TEACHER and args.method == ["auto"]:
        family = FAMILIES[ran["model_type"]]
        choices = [choose(family), *([ALIKE] if attends_densely(family) else ())]
        several = [with_choice(args, choice) for choice in choices]
    of_device = {name: cell.recipe[name] for name in OF_THE_DEVICE & cell.recipe.keys()}
    return [
        {
            **_flags(json.loads(json.dumps(settings(*groups, one), default=str))),
            **of_device,
            "method": "+".join(one.method),
        }
        for one in several
    ]


def _flags(recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A run's settings without their groups."""
    return {name: value for group in recorded.values() for name, value in group.items()}
