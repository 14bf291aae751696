"""Numbers in documents that come from ``docs/results``: what stands between two marks is written by a command.

<!-- results:bccd -->                                   the table of a grid
<!-- results:bccd bccd/rt_detr/* -->                    its lines that fit a pattern of data/pair/method
<!-- results:bccd bccd/* methods -->                    the gains of these, a line per method and a column per pair
<!-- results:bccd bccd/rt_detr/kd_detr delta -->+3.1    one number
<!-- results:bccd bccd/rt_detr/kd_detr gain -->         the gain and its interval; ``gain_longer``: over the longer twin
<!-- results:demo -->                                   the table of a single run with its twin, from ``demo.json``
<!-- results:demo student map -->11.0                   one number of it, in points: of the teacher, twin or student;
                                                        ``validation_map``: of the other split
<!-- results:cost_step -->                              what a benchmark measured, a line for each of its rows
<!-- /results -->                                       the end of each
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .page import gain_table, method_table, number, select, with_interval
from .summary import read_summaries
from .table import comparison_table, points, text_table

MARKS = re.compile(r"(<!-- results:(\S+)(?: (\S+))?(?: (\S+))? -->)(.*?)(<!-- /results -->)", re.DOTALL)

GAINS = {"gain": "delta", "gain_longer": "delta_longer"}
ROLES = ("teacher", "twin", "student")
BENCHMARKS = ("step", "task-loss")
"""What `hf_detrkd.commands.benchmark` writes as ``what``."""


def embed(text: str, summaries: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The text with everything between marks as the results have it.

    Args:
        summaries: of grids, by name.
        runs: what single runs wrote to ``results.json``, and benchmarks to their ``--output``, by name.

    Raises:
        ValueError: for a grid, a run, a line or a value that isn't there, and a number of more than one line.
    """

    def fresh(mark: re.Match) -> str:
        start, grid, pattern, name, _, end = mark.groups()
        if grid in runs:
            return f"{start}{of_run(start, runs[grid], pattern, name)}{end}"
        if grid not in summaries:
            raise ValueError(f"{start}: there is no grid or run {grid!r}; there are {sorted({*summaries, *runs})}.")
        rows = select(summaries[grid], pattern or "*")
        if name is None and rows:
            return f"{start}\n{gain_table(rows)}\n{end}"
        if name == "methods" and rows:
            return f"{start}\n{method_table(rows)}\n{end}"
        if len(rows) != 1:
            raise ValueError(f"{start}: {len(rows)} lines of {grid} fit; one is needed.")
        if name in GAINS:
            return f"{start}{with_interval(rows[0], GAINS[name])}{end}"
        if name not in rows[0]:
            raise ValueError(f"{start}: the line has no {name!r}; it has {sorted(rows[0])}.")
        return f"{start}{number(name, rows[0][name])}{end}"

    return MARKS.sub(fresh, text)


def of_run(start: str, run: Mapping[str, Any], role: str | None, metric: str | None) -> str:
    """The table of a run on its test split, or one number of it; the table of a benchmark."""
    if "rows" in run:
        return f"\n{benchmark_table(run['rows'])}\n"
    measured = {name: run[name]["test"] for name in (*ROLES, "model") if run.get(name) and run[name].get("test")}
    if role in measured:
        validation = run[role].get("validation") or {}
        measured[role] = measured[role] | {f"validation_{name}": value for name, value in validation.items()}
    if role is None:
        return f"\n{comparison_table(measured, markdown=True)}\n"
    if metric not in measured.get(role, {}):
        raise ValueError(f"{start}: the run has {sorted(measured)}, and no {metric!r} of {role!r}.")
    return points(measured[role][metric])


def benchmark_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of a benchmark, with a column for every name in them and three digits of every number."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # What was measured comes first, then the numbers
    columns.sort(key=lambda name: not any(isinstance(row.get(name), str) for row in rows))

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return value if isinstance(value, str) else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return text_table(columns, [[cell(row.get(name)) for name in columns] for row in rows], markdown=True)


def read_runs(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Single runs (``results.json``) and benchmarks in a folder and the folders in it, by path without the suffix."""
    contents = {path.relative_to(folder).with_suffix("").as_posix(): path for path in Path(folder).rglob("*.json")}
    contents = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in sorted(contents.items())}

    def known(content: Any) -> bool:  # of distill.py, finetune.py, benchmark.py
        return isinstance(content, dict) and bool(
            {"student", "model"} & content.keys() or content.get("what") in BENCHMARKS
        )

    return {name: content for name, content in contents.items() if known(content)}


def embed_files(paths: list[Path], folder: str | Path) -> list[Path]:
    """Rewrites the documents from the results in ``folder``; returns those that changed."""
    summaries, runs, changed = read_summaries(folder), read_runs(folder), []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        new = embed(text, summaries, runs)
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed
