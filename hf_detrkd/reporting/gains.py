"""Pictures of a grid: gains with their intervals, and AP against steps and against time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import PALETTE, STYLES
from .summary import TWIN, step_ratio
from .writing import save_figure

DPI = 80
BLACK = "#000000"


def plot_gains(summary: Mapping[str, Any], path: str | Path) -> None:
    """Writes a PNG: for every pair the gain of each method with its interval and seeds, and the share of the gap closed."""
    groups = _groups(summary)
    heights = [0.4 * len(rows) + 1 for rows in groups.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for (gain, gap), (name, rows) in zip(panels, groups.items(), strict=True):
        labels = [row["method"] for row in rows]
        for place, row in enumerate(rows):
            if row["delta_low"] is not None:
                gain.plot([row["delta_low"], row["delta_high"]], [place, place], color=PALETTE[0], linewidth=2)
            gain.plot(row["deltas"], [place] * len(row["deltas"]), "|", color=PALETTE[1], markersize=9)
            gain.plot(row["delta"], place, "o", color=PALETTE[0])
        gain.axvline(0, color="black", linewidth=0.8)
        gain.set(title=f"{name}: gain over the twin (AP points)", yticks=range(len(rows)), yticklabels=labels)
        gap.barh(range(len(rows)), [row["gap_closed"] or 0 for row in rows], color=PALETTE[2], height=0.5)
        gap.axvline(100, color="black", linewidth=0.8, linestyle=":")
        gap.set(title="share of the gap to the teacher closed (%)", yticks=range(len(rows)), yticklabels=[])
        for axes in (gain, gap):
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path, DPI)


def plot_progress(summary: Mapping[str, Any], path: str | Path) -> None:
    """Writes a PNG: for every panel of `compared_runs` AP on the validation split against steps and against the time that
    they take."""
    panels, styles = compared_runs(summary), line_styles(summary)
    figure = Figure(figsize=(12, 3.6 * len(panels)), layout="constrained")
    for (by_step, by_time), (name, methods) in zip(
        figure.subplots(len(panels), 2, squeeze=False), panels.items(), strict=True
    ):
        twin = [run["step_seconds"] for run in methods[TWIN] if run["step_seconds"]]
        for method, runs in methods.items():
            ratios = [1] if method == TWIN else [ratio for run in runs if (ratio := step_ratio(run))]
            seconds = statistics.mean(twin) * statistics.mean(ratios) if twin and ratios else None
            _lines(by_step, by_time, runs, seconds, "twin" if method == TWIN else method, styles[method])
        by_step.set(title=f"{name}: AP, validation", xlabel="optimisation step")
        by_time.set(title="the same", xlabel="minutes of training steps")
        handles, labels = by_step.get_legend_handles_labels()
        # Outside: it has as many lines as the pair has methods.
        by_time.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, fontsize="small")
        for axes in (by_step, by_time):
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=0)
    save_figure(figure, path, DPI)


def compared_runs(summary: Mapping[str, Any]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """The runs of the twin and of the methods, by panel and method.

    A panel has a pair's methods that ran with the same seeds, and the twin with these alone: means over different seeds can't be
    compared.
    """
    panels: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, rows in _groups(summary).items():
        for row in rows:
            runs = {
                method: [summary["runs"][f"{name}/{method}/seed{seed}"] for seed in row["seeds"]]
                for method in (TWIN, row["method"])
            }
            seeds = f"seed{'s' * (len(row['seeds']) > 1)} {', '.join(map(str, sorted(row['seeds'])))}"
            panels.setdefault(f"{name}, {seeds}", {}).update(runs)
    return panels


def plot_diagnoses(cells: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Writes a PNG with a row per cell: agreement of the matchings by layer, gradient share of the terms, gains by size and
    class.

    Args:
        cells: by name, as `diagnose_cells` returns them.
    """
    figure = Figure(figsize=(13, 3.2 * len(cells)), layout="constrained")
    panels = figure.subplots(len(cells), 3, squeeze=False)
    for (matching, terms, gains), (name, cell) in zip(panels, cells.items(), strict=True):
        for color, (who, shares) in zip(PALETTE, cell["matching_agreement"].items(), strict=False):
            layers = range(1, len(shares) + 1)
            matching.plot(layers, [100 * share for share in shares], marker="o", color=color, label=who)
        alone = cell["without_partner"]
        share = "none" if alone is None else f"{100 * alone:.0f} % of {cell['teacher_detections']}"
        matching.set(title=f"{name}\ntargets matched as by the teacher (%)", xlabel="decoder layer", ylim=(0, 100))
        matching.set_xticks(range(1, 1 + max(map(len, cell["matching_agreement"].values()))))
        matching.text(
            0.02, 0.03, f"teacher's detections without object: {share}", transform=matching.transAxes, fontsize=8
        )
        matching.legend(fontsize="small")
        for axes, title, values in (
            (terms, "share of the gradient norm (%)", {k: 100 * v for k, v in cell["gradient_shares"].items()}),
            (gains, "gain over the twin (AP points, validation)", cell["gains"]),
        ):
            axes.barh(range(len(values)), list(values.values()), color=PALETTE[0])
            axes.set(title=title, yticks=range(len(values)), yticklabels=list(values))
            axes.axvline(0, color="black", linewidth=0.8)
            axes.invert_yaxis()
            axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path, DPI)


def line_styles(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How each method's line looks, in every panel alike; what is trained without a teacher is black and broken."""
    alone = {name.split("/")[2] for name, run in summary["runs"].items() if run["method"] == TWIN}
    colors = [color for color in PALETTE if color != BLACK]
    styles, longer = {TWIN: {"color": BLACK, "linestyle": "--"}}, itertools.cycle((":", "-."))
    for method in dict.fromkeys(row["method"] for row in summary["rows"]):
        if method in alone:
            styles[method] = {"color": BLACK, "linestyle": next(longer)}
        else:
            turn, color = divmod(sum(style["color"] != BLACK for style in styles.values()), len(colors))
            styles[method] = {"color": colors[color], "linestyle": STYLES[turn % len(STYLES)], "linewidth": 1.4}
    return styles


def _lines(
    by_step: Axes,
    by_time: Axes,
    runs: list[Mapping[str, Any]],
    seconds: float | None,
    label: str,
    style: Mapping[str, Any],
) -> None:
    """The mean over the seeds, as far as all of them have been evaluated; ``seconds`` are those of a step."""
    # A run evaluates once an epoch or every so many steps, so the seeds agree in the steps
    curves = [dict(map(tuple, run["curve"])) for run in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return
    points = [100 * statistics.mean(curve[step] for curve in curves) for step in steps]
    by_step.plot(steps, points, label=label, **style)
    if seconds:
        by_time.plot([step * seconds / 60 for step in steps], points, label=label, **style)


def _groups(summary: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary["rows"]:
        groups.setdefault(f"{row['dataset']}/{row['pair']}", []).append(row)
    return groups
