"""Tables of COCO metrics and of costs, as aligned plain text or as markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Columns of a comparison: the names COCO's papers use, and the metrics.
COLUMNS = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
    "AR100": "mar_100",
}


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """A table whose columns are aligned: the first to the left, all others to the right.

    Args:
        header: a name per column.
        rows: cells, as many as the header has.
        markdown: with bars, for a README; otherwise for a terminal.
    """
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"`header` has {len(header)} columns, and `rows` have {sorted({len(row) for row in rows})}.")
    cells = [[cell.replace("|", "\\|") if markdown else cell for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    if markdown:
        lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def comparison_table(
    results: Mapping[str, Mapping[str, float]],
    *,
    baseline: str = "twin",
    teacher: str = "teacher",
    markdown: bool = False,
) -> str:
    """Models against each other in AP points (0 to 100), and what each gains over the baseline.

    Args:
        results: by name of the model, its metrics in [0, 1] (``map``, ``map_50``, ...); missing or NaN shows as "-".
        baseline: the model that the others, except ``teacher``, are compared with, where it is among the results.
        markdown: see `text_table`.
    """
    return text_table(["", *COLUMNS], comparison_rows(results, baseline, teacher), markdown)


def comparison_rows(
    results: Mapping[str, Mapping[str, float]], baseline: str = "twin", teacher: str = "teacher"
) -> list[list[str]]:
    """The cells of `comparison_table`: a name, then a number for each of `COLUMNS`."""
    rows = [[name, *(points(metrics.get(key)) for key in COLUMNS.values())] for name, metrics in results.items()]
    if baseline in results:
        for name in results:
            if name not in (baseline, teacher):
                gains = [difference(results[name].get(key), results[baseline].get(key)) for key in COLUMNS.values()]
                rows.append([f"{name} - {baseline}", *gains])
    return rows


def class_table(metrics: Mapping[str, float]) -> str:
    """AP and AR of every class in points, from the metrics `StreamingCocoMetrics` returns."""
    names = [key.removeprefix("mar_100_") for key in metrics if key.startswith("mar_100_")]
    summary = {key.removeprefix("map_") for key in COLUMNS.values()}
    rows = [
        [name, points(None if name in summary else metrics.get(f"map_{name}")), points(metrics[f"mar_100_{name}"])]
        for name in names
    ]
    return text_table(["class", "AP", "AR100"], rows)


def cost_table(rows: Mapping[str, Mapping[str, Any]], markdown: bool = False) -> str:
    """What models cost, side by side; ``rows`` are those of `hf_detrkd.evaluation.cost.cost_rows`."""
    header = ["", "parameters (M)", "GFLOPs", "input", "median (ms)", "p95 (ms)"]
    lines = []
    for role, row in rows.items():
        times = row.get("latency")
        milliseconds = ["-", "-"] if times is None else [f"{1000 * times[name]:.1f}" for name in ("median", "p95")]
        size = "x".join(map(str, row["input"]))
        lines.append([role, f"{row['parameters'] / 1e6:.2f}", f"{row['flops'] / 1e9:.2f}", size, *milliseconds])
    return text_table(header, lines, markdown)


def points(value: float | None) -> str:
    """A share in [0, 1] as points out of 100."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def difference(value: float | None, base: float | None) -> str:
    """``value - base`` in points, with its sign."""
    if value is None or base is None or math.isnan(value - base):
        return "-"
    return f"{round(100 * (value - base), 1) + 0.0:+.1f}"  # + 0.0: no -0.0
