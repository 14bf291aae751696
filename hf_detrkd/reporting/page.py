"""A grid's summary as text: the page of a grid, and its tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .summary import pair_of
from .table import COLUMNS, text_table


def number(name: str, value: Any) -> str:
    """A value of a row as text: gains with their sign, ratios with two decimals."""
    if value is None:
        return "-"
    if name == "seeds":
        return str(len(value))
    if name.startswith("delta"):
        return f"{value:+.1f}".replace("-0.0", "+0.0")
    if name in ("steps", "peak_memory_MiB"):
        return f"{value:.0f}"
    if name in ("gap_closed", "kd_share"):
        return f"{round(value)} %"
    return f"{value:.2f}" if name == "time_ratio" else f"{value:.1f}" if isinstance(value, float) else str(value)


def gain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per method: its gain over the twin, the interval, and what it costs; beside a longer twin what it gains over that."""
    titles = {
        **{"teacher_map": "teacher", "twin_map": "twin", "map": "AP", "delta": "gain"},
        **{
            "delta_validation": "on val",
            "gap_closed": "gap closed",
            "seeds": "seeds",
            "steps": "steps",
            "time_ratio": "time",
            "kd_share": "KD share",
        },
    }
    longer = ["over longer twin"] if any("delta_longer" in row for row in rows) else []
    header = ["", *list(titles.values())[:4], "95 % interval", "min to max", *longer, *list(titles.values())[4:]]
    lines = []
    for row in rows:
        cells = [number(name, row[name]) for name in titles]
        low, high, least, most = (number(f"delta_{end}", row[f"delta_{end}"]) for end in ("low", "high", "min", "max"))
        spread = ["-" if row["delta_low"] is None else f"{low} to {high}", f"{least} to {most}"]
        spread += [with_interval(row, "delta_longer")] * len(longer)
        lines.append([f"{row['dataset']}/{row['pair']}/{row['method']}", *cells[:4], *spread, *cells[4:]])
    return text_table(header, lines, markdown=True)


def with_interval(row: Mapping[str, Any], of: str = "delta") -> str:
    """A gain, and in brackets its interval; the number of seeds in the place of an interval, or where it isn't the row's.

    Args:
        of: "delta" or, over the longer twin, "delta_longer"; a row may lack the second.
    """
    if of not in row:
        return "-"
    gain, low, high = (number("delta", row[f"{of}{end}"]) for end in ("", "_low", "_high"))
    seeds = row.get(f"{of}_seeds", row["seeds"])
    known = [f"{low} to {high}"] * (row[f"{of}_low"] is not None)
    known += [f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"] * (not known or len(seeds) != len(row["seeds"]))
    return f"{gain} ({', '.join(known)})"


def method_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per method and a column per pair: the gain and, in brackets, its seeds; bold where the interval leaves out 0."""
    pairs = list(dict.fromkeys(f"{row['dataset']}/{row['pair']}" for row in rows))
    cells = {(row["method"], f"{row['dataset']}/{row['pair']}"): _gain(row) for row in rows}
    lines = [
        [name, *(cells.get((name, pair), "-") for pair in pairs)]
        for name in dict.fromkeys(row["method"] for row in rows)
    ]
    return text_table(["", *pairs], lines, markdown=True)


def _gain(row: Mapping[str, Any]) -> str:
    gain, low, high = number("delta", row["delta"]), row["delta_low"], row["delta_high"]
    sure = low is not None and (low > 0 or high < 0)
    return f"{f'**{gain}**' if sure else gain} ({len(row['seeds'])})"


def markdown(summary: Mapping[str, Any], pictures: Sequence[str], unfinished: Mapping[str, str]) -> str:
    """The page of a grid.

    Args:
        summary: of `summarize`.
        pictures: file names beside the page.
        unfinished: by name of the cell, why it has no result.
    """
    parts = [
        f"# {summary['grid']}",
        f"Written by `python scripts/compare.py --config scripts/recipes/grids/{summary['grid']}.yaml --summarize_only`. AP in "
        f"points, {summary['split']} split, means over the seeds. A gain is the mean of the differences between the distilled "
        "run and its twin of the same seed, with Student's t-interval, the smallest and the largest, and (on val) the mean on the "
        "validation split; over longer twin is the same beside the twin that had the time of its own line; time is that of a training "
        "step (for a longer twin: of all steps) as a multiple of the twin's; gap closed is the gain as a share of teacher - twin; "
        "KD share is distillation's part of the gradient norm, as a mean over the run.",
    ]
    for name in dict.fromkeys(f"{row['dataset']}/{row['pair']}" for row in summary["rows"]):
        rows = [row for row in summary["rows"] if f"{row['dataset']}/{row['pair']}" == name]
        seeds = max((row["seeds"] for row in rows), key=len)
        drawn = [pair_of(summary["pairs"], name, seed) for seed in seeds]
        pair, data = drawn[0], drawn[0]["data"]["images"]
        student = summary["runs"][f"{name}/{rows[0]['method']}/seed{rows[0]['seeds'][0]}"]
        each = f" (seed {seeds[0]}; every seed has its own)" if f"{name}/seed{seeds[0]}" in summary["pairs"] else ""
        parts += [
            f"## {name}",
            f"{rows[0]['family']} student of {student['parameters'] / 1e6:.2f} M parameters, teacher "
            f"`{pair['teacher']['name_or_path']}`{each} of {pair['teacher']['parameters'] / 1e6:.2f} M; {data['train']} images to train, "
            f"{data['validation']} to validate, {data['test']} to test.",
            gain_table(rows),
            _metric_table(rows, summary["pairs"], name),
            f"Gain by size and class:\n\n{_gains_table(rows)}",
        ]
    parts += [f"![{Path(picture).stem}]({picture})" for picture in pictures]
    if unfinished:
        parts.append(f"Not done:\n\n{_not_done(unfinished)}")
    return "\n\n".join(parts) + "\n"


def _not_done(unfinished: Mapping[str, str]) -> str:
    """A line per method and reason, with its seeds."""
    seeds = defaultdict(list)
    for name, reason in unfinished.items():
        method, _, seed = name.partition("/seed")
        seeds[method, reason].append(seed)
    names = {key: f"{key[0]}/seed{', '.join(of)}" if any(of) else key[0] for key, of in seeds.items()}
    return "\n".join(f"- {names[key]}: {key[1]}" for key in seeds)


def _mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(one[name] for one in metrics) for name in metrics[0]}


def _metric_table(rows: Sequence[Mapping[str, Any]], pairs: Mapping[str, Mapping], name: str) -> str:
    """Every method below the twin of the same seeds, and below their teachers where every seed has its own."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(sorted(row["seeds"]))].append(row)
    lines: list[tuple[str, Mapping[str, float]]] = []
    for seeds in sorted(groups, key=len, reverse=True):
        of = f", seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if len(groups) > 1 else ""
        drawn = f"{name}/seed{seeds[0]}" in pairs
        if drawn or not lines:
            teachers = [pair_of(pairs, name, seed)["teacher"]["metrics"] for seed in seeds]
            lines.append((f"teacher{of * drawn}", _mean_metrics(teachers)))
        lines.append((f"twin{of}", groups[seeds][0]["twin_metrics"]))
        lines += [(row["method"] + of, row["metrics"]) for row in groups[seeds]]
    cells = [[label, *(number("map", metrics.get(key)) for key in COLUMNS.values())] for label, metrics in lines]
    return text_table(["", *COLUMNS], cells, markdown=True)


def _gains_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = sorted(name for name in rows[0]["gains"] if name.startswith("map_") and name not in ("map_50", "map_75"))
    cells = [[row["method"], *(number("delta", row["gains"].get(name)) for name in names)] for row in rows]
    return text_table(["", *(name.removeprefix("map_") for name in names)], cells, markdown=True)


def select(summary: Mapping[str, Any], pattern: str = "*") -> list[Mapping[str, Any]]:
    """The rows whose data/pair/method fits a pattern."""
    return [row for row in summary["rows"] if fnmatchcase(f"{row['dataset']}/{row['pair']}/{row['method']}", pattern)]
