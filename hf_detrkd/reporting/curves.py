"""Training curves of one or several runs, from Trainer's log history."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .writing import save_figure

History = Sequence[Mapping[str, Any]]
Series = dict[tuple[str, str], tuple[list[float], list[float]]]

# Okabe and Ito's palette, told apart with any colour vision (https://jfly.uni-koeln.de/color/).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One diagram: which of the logged values it shows, and how."""

    title: str
    shows: Callable[[str], bool]
    factor: float = 1
    log: bool = False


PANELS = (
    Panel("loss", lambda key: key in ("loss", "detection_loss", "eval_loss")),
    Panel("distillation terms, unweighted", lambda key: key.startswith("kd_") and key != "kd_scale", log=True),
    Panel("distillation's share of the gradient norm (%)", lambda key: key == "gradient_share_kd", factor=100),
    Panel("AP on the validation split", lambda key: key in ("eval_map", "eval_map_50"), factor=100),
)


def plot_curves(histories: Mapping[str, History], path: str | Path) -> bool:
    """Writes a PNG with losses, distillation terms and AP against the optimisation step.

    A colour is a run, a line style a quantity. A panel without a value is left out.

    Args:
        histories: by name of the run, `trainer.state.log_history`: dicts with ``step`` and any of ``loss``,
            ``detection_loss``, ``kd_<term>``, ``gradient_share_kd``, ``eval_loss``, ``eval_map``, ``eval_map_50``.
        path: of the picture; its folder is made.

    Returns:
        whether there was something to draw; a run shorter than its ``logging_steps`` has logged nothing.
    """
    drawn = [(panel, series) for panel in PANELS if (series := series_of(histories, panel))]
    if not drawn:
        return False
    # A Figure of its own, without pyplot: no display is needed and no global state is touched.
    figure = Figure(figsize=(5.2 * len(drawn), 4), layout="constrained")
    for axes, (panel, series) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        _draw(axes, panel, series, list(histories))
    save_figure(figure, path, 110)
    return True


def series_of(histories: Mapping[str, History], panel: Panel, x: str = "step") -> Series:
    """By run and quantity, the steps (or another ``x`` that is logged, such as ``seconds``) and the values that ``panel``
    shows; what is not finite is left out."""
    series: Series = {}
    for run, history in histories.items():
        distilled = any(key.startswith("kd_") for entry in history for key in entry)
        for entry in history:
            for key, value in entry.items():
                if key == "detection_loss" and not distilled:
                    continue  # the same as the loss
                if panel.shows(key) and x in entry and math.isfinite(value):
                    steps, values = series.setdefault((run, key), ([], []))
                    steps.append(entry[x])
                    values.append(panel.factor * value)
    return series


def _draw(axes: Axes, panel: Panel, series: Series, runs: list[str]) -> None:
    quantities = list(dict.fromkeys(key for _, key in series))
    for (run, key), (steps, values) in series.items():
        axes.plot(
            steps,
            values,
            color=PALETTE[runs.index(run) % len(PALETTE)],
            linestyle=STYLES[quantities.index(key) % len(STYLES)],
            marker="o" if len(steps) < 25 else None,
            markersize=3,
            linewidth=1.4,
            label=f"{run}: {key.removeprefix('kd_').removeprefix('eval_') if panel.log else key}",
        )
    if panel.log and all(value > 0 for _, values in series.values() for value in values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set(title=panel.title, xlabel="optimisation step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
