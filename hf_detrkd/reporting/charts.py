"""Training curves as SVG that stands in a page: it takes the page's font and colours, light or dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import History, Panel, Series, series_of

INK, GRID = "#010101", "#020202"
LINES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306", "#030307")
VARIABLES = {INK: "ink", GRID: "grid", **{color: f"line-{index}" for index, color in enumerate(LINES)}}
"""Colours that stand for the page's own: by what matplotlib draws with, the name of a CSS variable."""
DASHES = {"student": "-", "model": "-", "twin": (0, (5, 2)), "teacher": (0, (1.5, 1.5))}

WIDE, NARROW = (0.085, 0.17, 0.905, 0.76), (0.14, 0.24, 0.85, 0.65)
"""Left, bottom, width and height of the axes as shares of the figure, with room for tick labels of six characters."""


@dataclass(frozen=True)
class Line:
    """An entry of a legend, with the last value of its curve."""

    label: str
    variable: str
    value: str


@dataclass(frozen=True)
class Chart:
    """A diagram for a page."""

    title: str
    svg: str
    lines: tuple[Line, ...]


def chart(
    histories: Mapping[str, History],
    panel: Panel,
    *,
    x: str = "step",
    level: float | None = None,
    labels: Mapping[tuple[str, str], str] | None = None,
    wide: bool = True,
) -> Chart | None:
    """A panel's curves against the step, or against the seconds of the run.

    Args:
        histories: by run, as in `plot_curves`.
        panel: what is shown.
        x: "step" or "seconds".
        level: of the teacher, a horizontal line.
        labels: by run and quantity; the run's name otherwise.
        wide: for a column of half a page; else of a third.

    Returns:
        None where nothing is logged that the panel shows.
    """
    series = series_of(histories, panel, x)
    if not series:
        return None
    unit, factor = ("step", 1.0) if x == "step" else _time_unit(series)
    size = (4.6, 2.4) if wide else (3.0, 1.6)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title + x, "font.size": 8.5}):
        figure = Figure(figsize=size)  # margins by hand: a layout engine would take twice the time
        figure.patch.set_visible(False)
        axes = figure.add_axes(WIDE if wide else NARROW)
        lines = []
        runs = list(dict.fromkeys(run for run, _ in series))
        for index, ((run, key), (xs, values)) in enumerate(series.items()):
            color = LINES[(runs.index(run) if len(runs) > 1 else index) % len(LINES)]
            thin = len(runs) > 1 and key == "loss"
            axes.plot(
                [factor * value for value in xs],
                values,
                color=color,
                linestyle=DASHES[run],
                linewidth=0.8 if thin else 1.5,
                marker="o" if len(xs) < 3 else None,
                markersize=3,
            )
            label = (labels or {}).get((run, key), run)
            lines.append(Line(label, VARIABLES[color], _short(values[-1])))
        if level is not None:
            axes.axhline(level, color=INK, linestyle=DASHES["teacher"], linewidth=1)
            lines.append(Line("teacher", VARIABLES[INK], _short(level)))
        _dress(axes, unit, wide, level)
        figure_text = io.StringIO()
        figure.savefig(figure_text, format="svg", transparent=True, metadata={"Date": None})
    return Chart(panel.title, _for_page(figure_text.getvalue(), panel.title), tuple(lines))


def _dress(axes, unit: str, wide: bool, level: float | None) -> None:
    low, high = min(0.0, axes.dataLim.y0), max(axes.dataLim.y1, level or 0.0)
    axes.set_ylim(low, high + 0.06 * (high - low) or 1.0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 3, integer=unit == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(5 if wide else 3))
    axes.set_xlabel(unit, color=INK, loc="right", labelpad=1)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, colors=INK)


def _time_unit(series: Series) -> tuple[str, float]:
    longest = max(max(xs) for xs, _ in series.values())
    if longest > 2 * 3600:
        return "hours", 1 / 3600
    return ("minutes", 1 / 60) if longest > 180 else ("seconds", 1.0)


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _for_page(svg: str, title: str) -> str:
    """The SVG element alone, as wide as its place, in the page's colours; ids, which would come twice, only where used."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg


def charts_of(histories: Mapping[str, History], panels: Sequence[Panel], **options) -> list[Chart]:
    """Those of the panels that have something to show."""
    return [drawn for panel in panels if (drawn := chart(histories, panel, **options)) is not None]
