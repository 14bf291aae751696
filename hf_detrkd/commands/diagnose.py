"""Why a method gains, or doesn't: measures on the validation split beside the cells of a grid.

python scripts/compare.py --config grid.yaml --diagnose "bccd/*/seed0"
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..config import DistillationConfig
from ..data import DetectionCollator
from ..detectors import load_detector
from ..diagnostics import diagnose
from ..families import adapter_for
from ..labels import LabelMap
from ..reporting.gains import plot_diagnoses
from ..reporting.summary import TWIN
from .arguments import parse
from .distill import ARGUMENTS, Prepared, prepare
from .grid import TEACHER, Cell, Grid
from .setup import write_json


def diagnose_cells(grid: Grid, cells: Sequence[Cell], output: Path, say=print) -> dict[str, Any]:
    """Diagnoses the finished cells of methods that stand beside a finished twin; writes <grid>_diagnostics.json and .png.

    Cells of the grid that the file has already, measured earlier or elsewhere, stay in it.

    Returns:
        by name of the cell, what `diagnose` says of student and twin, the shares of the terms in the gradient norm, and
        the gains by size and class in AP points of the validation split.
    """
    results = {}
    for cell in cells:
        twin = grid.cell(cell.data, cell.pair, TWIN, cell.seed)
        if cell.method in (TEACHER, TWIN) or cell.time_of or not (cell.state() == twin.state() == "done"):
            continue
        say(f"diagnosing {cell.name}")
        student_row, twin_row = (one.read()["student"] for one in (cell, twin))
        gains = {
            name.removeprefix("map_"): round(100 * (value - twin_row["validation"][name]), 2)
            for name, value in student_row["validation"].items()
            if name.startswith("map") and name in twin_row["validation"]
        }
        measured = _measure(cell, twin)
        results[cell.name] = {**measured, "gradient_shares": student_row["gradient_shares"], "gains": gains}
    if results:
        file = output / f"{grid.name}_diagnostics.json"
        recorded = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.is_file() else {}
        results = {
            cell.name: found for cell in grid.cells if (found := results.get(cell.name, recorded.get(cell.name)))
        }
        write_json({"cells": results}, file)
        plot_diagnoses(results, output / f"{grid.name}_diagnostics.png")
        say(f"written to {output / grid.name}_diagnostics.json and .png")
    return results


def flags_in(folder: Path) -> tuple:
    """The flags in a run's recipe.yaml, as distill.py reads them."""
    return parse(ARGUMENTS, ["--config", str(folder / "recipe.yaml")])


def _measure(cell: Cell, twin: Cell) -> dict[str, Any]:
    *arguments, args = flags_in(cell.folder)
    run = prepare(*arguments, args, say=lambda *_: None)
    classes = LabelMap.between(run.teacher.config.id2label, run.student.config.id2label)
    teacher = adapter_for(run.teacher.to(args.device), classes.teacher_classes)
    students = {
        name: adapter_for(load_detector(str(one.folder)).to(args.device), classes.student_classes)
        for name, one in (("student", cell), ("twin", twin))
    }
    return diagnose(students, teacher, _batches(run, args))


def _batches(run: Prepared, args: DistillationConfig) -> Iterator[dict[str, Any]]:
    """The validation split on the device."""
    collator = DetectionCollator(run.processor, run.teacher_processor)
    loader = DataLoader(run.data.validation, batch_size=args.per_device_eval_batch_size, collate_fn=collator)
    for batch in loader:
        labels = [{name: value.to(args.device) for name, value in image.items()} for image in batch.pop("labels")]
        yield {name: torch.as_tensor(value).to(args.device) for name, value in batch.items()} | {"labels": labels}
