"""Precision against recall, read from COCO's own tables: the area under a curve is the AP reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..evaluation.coco_detection.coco_evaluator import Tables
from .curves import PALETTE, STYLES
from .writing import save_figure

IOUS = (0.5, 0.75)
RECALLS = np.linspace(0, 1, 101)
DPI = 110


def class_curves(tables: Tables, iou: float) -> dict[str, np.ndarray]:
    """By class its (101,) precision at the recalls 0, 0.01, ..., 1; the mean of a curve is the class's AP at this IoU.

    Objects of all sizes, 100 detections. Classes without an object are left out, as in the AP.

    Args:
        iou: one of COCO's thresholds, 0.5, 0.55, ..., 0.95.
    """
    place = round((iou - 0.5) / 0.05)
    curves = tables.precision[place, :, :, 0, 2].T
    return {name: curve for name, curve in zip(tables.class_names, curves, strict=True) if (curve > -1).all()}


def mean_curve(tables: Tables, iou: float) -> np.ndarray:
    """(101,) the mean over the classes; its mean is ``map_50`` at the IoU 0.5, ``map_75`` at 0.75. NaN without a class."""
    curves = class_curves(tables, iou)
    return np.mean(list(curves.values()), axis=0) if curves else np.full(101, math.nan)


def plot_precision_recall(tables: Mapping[str, Tables], path: str | Path) -> None:
    """Writes a PNG: the mean over the classes, a panel per IoU of `IOUS`, a line per model."""
    figure = Figure(figsize=(5.2 * len(IOUS), 4.6), layout="constrained")
    for axes, iou in zip(figure.subplots(1, len(IOUS)), IOUS, strict=True):
        for index, (name, of_model) in enumerate(tables.items()):
            curve = mean_curve(of_model, iou)
            axes.plot(RECALLS, curve, color=_color(index), label=f"{name}: AP{100 * iou:.0f} {100 * curve.mean():.1f}")
        axes.set(title=f"IoU {iou:g}, mean over the classes", xlabel="recall", ylabel="precision")
        _frame(axes)
        axes.legend(fontsize="small")
    save_figure(figure, path, DPI)


def plot_class_curves(tables: Mapping[str, Tables], path: str | Path, objects: Mapping[str, int]) -> None:
    """Writes a PNG: a small panel per class, a colour per model, a line style per IoU of `IOUS`.

    Args:
        objects: how many there are, by name of the classes to show, in this order; one without a curve gets no panel.
    """
    curves = {(name, iou): class_curves(of_model, iou) for name, of_model in tables.items() for iou in IOUS}
    shown = [name for name in objects if any(name in of_model for of_model in curves.values())]
    columns = min(4, max(len(shown), 1))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = Figure(figsize=(3 * columns, 2.7 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes in panels[len(shown) :]:
        axes.axis("off")
    for axes, class_name in zip(panels, shown, strict=False):
        for (name, iou), of_model in curves.items():
            style = {"color": _color(list(tables).index(name)), "linestyle": STYLES[IOUS.index(iou)]}
            axes.plot(RECALLS, of_model[class_name], label=f"{name}, IoU {iou:g}", linewidth=1.3, **style)
        axes.set_title(f"{class_name} ({objects[class_name]} objects)", fontsize=9)
        _frame(axes)
    for axes in panels[max(0, len(shown) - columns) : len(shown)]:
        axes.tick_params(labelbottom=True)  # the last panel of each column, also above an empty place
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    if shown:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * columns), fontsize="small"
        )
    save_figure(figure, path, DPI)


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _frame(axes: Axes) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
