"""Trained models side by side: tables, pictures and a page, all from what `compare_models` measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure

from .curves import PALETTE
from .table import comparison_table, difference, points, text_table
from .writing import save_figure

DPI = 110
PICTURES = {
    "precision_recall.png": "Precision against recall, mean over the classes; the area under a curve is the AP",
    "precision_recall_classes.png": "Precision against recall by class",
    "gains.png": "Gains over the baseline by size and class",
    "latency.png": "Latency and AP",
    "differences.png": "Images in which baseline and candidate differ most in their errors: first fewer, then more",
}
"""By file name, in the order of the page."""


def metric_table(results: Mapping[str, Any], markdown: bool = False) -> str:
    """AP and AR of the models, and differences to the baseline."""
    metrics = {name: model["metrics"] for name, model in results["models"].items()}
    return comparison_table(metrics, baseline=results["baseline"], teacher="", markdown=markdown)


def interval_table(results: Mapping[str, Any], markdown: bool = False) -> str:
    """The gain in AP with its interval."""
    rows = []
    for name, gain in results["gains"].items():
        value, low, high = (difference(gain[key], 0) for key in ("map", "low", "high"))
        rows.append([f"{name} - {results['baseline']}", value, "-" if low == high == "-" else f"{low} to {high}"])
    return text_table(["", "AP", "95 % interval"], rows, markdown)


def gain_table(results: Mapping[str, Any], markdown: bool = False) -> str:
    """AP of the baseline by size and class, and what the others gain."""
    gains, base = results["gains"], results["baseline"]
    rows = []
    for group in ("sizes", "classes"):
        for part, value in results["models"][base][group].items():
            others = (results["models"][name][group].get(part) for name in gains)
            objects = str(results["objects"][part]) if group == "classes" else ""
            rows.append([part, objects, points(value), *(difference(other, value) for other in others)])
    return text_table(["", "objects", base, *gains], rows, markdown)


def count_table(results: Mapping[str, Any], markdown: bool = False) -> str:
    """What the models' boxes are from their thresholds on."""
    rows = [
        [name, f"{model['score_from']:.2f}", *(str(model["counts"][kind]) for kind in ("hits", "missed", "false"))]
        for name, model in results["models"].items()
    ]
    return text_table(["", "score from", "hits", "missed", "false"], rows, markdown)


def plot_gains(results: Mapping[str, Any], path: str | Path, classes: Sequence[str]) -> None:
    """Writes a PNG with bars: what every model gains over the baseline in all, by size and by class.

    Args:
        classes: those to show, in this order.
    """
    gains, base = results["gains"], results["models"][results["baseline"]]
    lines = [("all", None, "")] + [(f"{name} objects", "sizes", name) for name in base["sizes"]]
    lines += [(f"{name} ({results['objects'][name]})", "classes", name) for name in classes if name in base["classes"]]
    thickness = 0.8 / len(gains)
    figure = Figure(figsize=(8, 1.6 + len(lines) * (0.16 + 0.16 * len(gains))), layout="constrained")
    axes = figure.subplots()
    for index, (name, gain) in enumerate(gains.items()):
        model = results["models"][name]
        values = [
            100 * (gain["map"] if group is None else model[group].get(part, float("nan")) - base[group][part])
            for _, group, part in lines
        ]
        places = [line + (index - (len(gains) - 1) / 2) * thickness for line in range(len(lines))]
        color = PALETTE[list(results["models"]).index(name) % len(PALETTE)]
        axes.barh(places, values, height=0.9 * thickness, color=color, label=name)
        if gain["low"] is not None:
            axes.plot([100 * gain["low"], 100 * gain["high"]], [places[0]] * 2, color="black", linewidth=1.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        title=f"AP gain over {results['baseline']}" + "; line: 95 % interval over images" * bool(results["resamples"]),
        yticks=range(len(lines)),
        yticklabels=[label for label, *_ in lines],
        ylim=(len(lines) - 0.5, -0.5),
    )
    axes.set_xlabel("AP points")
    axes.title.set_size(10)
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")
    save_figure(figure, path, DPI)


def plot_latency(results: Mapping[str, Any], path: str | Path) -> None:
    """Writes a PNG: AP against the median latency of the model alone, a line to the 95th percentile; the area of a circle goes by
    the parameters."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    most = max(model["parameters"] for model in results["models"].values())
    for index, (name, model) in enumerate(results["models"].items()):
        color = PALETTE[index % len(PALETTE)]
        median, p95 = (1000 * model["latency"][key] for key in ("median", "p95"))
        value, parameters = 100 * model["metrics"]["map"], model["parameters"]
        axes.plot([median, p95], [value, value], color=color, linewidth=1.4)
        label = f"{name}: AP {value:.1f}, {median:.1f} ms, {parameters / 1e6:.2f} M parameters"
        axes.scatter([median], [value], s=40 + 360 * parameters / most, color=color, alpha=0.75, label=label)
    axes.margins(x=0.15, y=0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="latency of one image, model alone (ms): median, line to the 95th percentile", ylabel="AP (points)")
    axes.set_title("\n".join(wrap(environment_line(results), 110)), fontsize=8)
    axes.grid(alpha=0.3)
    legend = figure.legend(loc="outside lower center", fontsize="small")
    for handle in legend.legend_handles:
        handle.set_sizes([60])
    save_figure(figure, path, DPI)


def environment_line(results: Mapping[str, Any]) -> str:
    """What the latencies depend on."""
    return ", ".join(f"{name} {value}" for name, value in results["environment"].items())


def text(results: Mapping[str, Any], cost: str) -> str:
    """The tables for a terminal.

    Args:
        cost: the table of what the models cost.
    """
    parts = [
        f"COCO AP on {results['split']} ({results['images']} images), in points\n{metric_table(results)}",
        f"{_interval_sentence(results)}\n{interval_table(results)}",
        f"{cost}\n{environment_line(results)}",
        f"AP by size and class, and gains over it\n{gain_table(results)}",
        f"Boxes at IoU 0.5\n{count_table(results)}",
    ]
    return "\n\n".join(parts)


def page(results: Mapping[str, Any], cost: str, pictures: Sequence[str]) -> str:
    """All of it as markdown.

    Args:
        cost: the table of what the models cost, as markdown.
        pictures: those of `PICTURES` that lie beside the page.
    """
    models = "\n".join(
        f"- {name}: `{model['name_or_path']}` ({model['model_type']})" for name, model in results["models"].items()
    )
    chosen = "scores from which on F1 is best on this split" if results["threshold"] is None else "the given score"
    parts = [
        f"# {', '.join(results['models'])} on {results['split']} of {results['dataset']}",
        f"{results['images']} images. Written by `{results['command']}`.",
        models,
        "## AP",
        "In points, as COCO has it.",
        metric_table(results, markdown=True),
        _interval_sentence(results),
        interval_table(results, markdown=True),
        "## Cost",
        cost,
        f"Latency of one image, the model alone, measured in turn in this run: {environment_line(results)}.",
        "## By size and class",
        f"AP of {results['baseline']}, and what the others gain.",
        gain_table(results, markdown=True),
        "## Boxes",
        f"Matched as in COCO at IoU 0.5, class by class; {chosen}.",
        count_table(results, markdown=True),
        "## Pictures",
        *(f"{PICTURES[name]}:\n\n![{name}]({name})" for name in PICTURES if name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def _interval_sentence(results: Mapping[str, Any]) -> str:
    if not results["resamples"]:
        return "No intervals: --resamples 0."
    return (
        f"Intervals: paired bootstrap over the images, {results['resamples']} resamples. They say how much a difference owes to "
        "the choice of these images, not what another seed of the training would give."
    )
