"""Images with boxes: one picture per image, or a sheet of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .sheet import DPI, KINDS, PANEL_INCHES, Kind, draw_box, show
from .writing import save_figure

# Okabe and Ito's palette again, one colour per class in turn; the text is readable on each
CLASS_COLORS = (
    ("#0072B2", "white"),
    ("#D55E00", "white"),
    ("#009E73", "white"),
    ("#CC79A7", "black"),
    ("#E69F00", "black"),
    ("#56B4E9", "black"),
    ("#F0E442", "black"),
)


def class_kind(label: int) -> Kind:
    """How boxes of a class are drawn; the eighth class looks like the first."""
    color, text = CLASS_COLORS[label % len(CLASS_COLORS)]
    return Kind(str(label), color, text=text)


def draw_boxes(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: Sequence[int],
    texts: Sequence[str],
    path: str | Path,
) -> None:
    """Writes a picture of one image with boxes, the last on top.

    Args:
        image: (3, H, W) uint8.
        boxes: (n, 4) x1, y1, x2, y2 in pixels.
        labels: n classes, which choose the colour.
        texts: n captions.
        path: of the picture; its ending chooses the format.
    """
    height, width = image.shape[1:]
    inches = max(2 * PANEL_INCHES, min(width / DPI, 12.0))  # small images are enlarged
    figure = Figure(figsize=(inches, inches * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    show(axes, image)
    for box, label, text in zip(boxes.tolist(), labels, texts, strict=True):
        draw_box(axes, box, text, class_kind(label))
    save_figure(figure, path, DPI)


def draw_dataset(dataset, indices: Sequence[int], path: str | Path, columns: int = 4) -> None:
    """Writes a sheet of images of a `DetectionDataset` with their objects, coloured by class; crowd regions are grey.

    Raises:
        ValueError: there is no image.
    """
    if not indices:
        raise ValueError("A sheet needs images; `indices` is empty.")
    names: Mapping[int, str] = dataset.id2label
    columns = min(columns, len(indices))
    rows = math.ceil(len(indices) / columns)
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(indices) :]:
        axes.axis("off")
    for axes, index in zip(panels, indices, strict=False):
        item = dataset[index]
        target = item["target"]
        show(axes, item["image"])
        axes.set_title(f"row {index}, image {int(target['image_id'])}", fontsize=8)
        for box, label, crowd in zip(
            target["boxes"].tolist(), target["labels"].tolist(), target["iscrowd"].tolist(), strict=True
        ):
            # Drawn before the checks have passed, a label may be one that no class has
            draw_box(axes, box, names.get(label, f"{label}?"), KINDS["crowd"] if crowd else class_kind(label))
    save_figure(figure, path, DPI)
