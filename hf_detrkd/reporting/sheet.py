"""Sheets of detections: rows are images; columns are the ground truth and one model each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torchvision.ops import box_iou
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.collator import DetectionCollator
from ..evaluation.detector import detect, label_lookup
from .writing import save_figure

MATCH_IOU = 0.5  # PASCAL VOC's threshold, COCO's AP50
PANEL_INCHES, DPI = 3.6, 120  # panels are 432 pixels wide


@dataclass(frozen=True)
class Kind:
    """How a box of one kind is drawn; kinds differ in colour and, but for objects and hits, in line style."""

    label: str
    color: str
    style: str = "-"
    text: str = "white"


# Okabe and Ito's palette, told apart with any colour vision.
KINDS = {
    "object": Kind("object", "#0072B2"),
    "crowd": Kind("crowd region (not counted)", "#999999", ":"),
    "hit": Kind("hit: right class, IoU of 0.5 or more", "#009E73"),
    "false": Kind("false detection", "#D55E00", "-."),
    "missed": Kind("missed object", "#F0E442", "--", "black"),
}


@dataclass(frozen=True)
class Scene:
    """The objects of one image and what models found in it. Boxes are x1, y1, x2, y2 in pixels of the image."""

    boxes: torch.Tensor
    """(N, 4) of the objects."""
    labels: torch.Tensor
    """(N,) of the objects."""
    crowd: torch.Tensor
    """(N,) bool: a region with many objects, where detections are neither right nor wrong."""
    detections: Mapping[str, Mapping[str, torch.Tensor]]
    """By model, ``boxes`` (n, 4), ``scores`` (n,) and ``labels`` (n,)."""


@dataclass(frozen=True, kw_only=True)
class SheetRow(Scene):
    """A scene that is drawn."""

    image: torch.Tensor
    """(3, H, W) uint8."""
    caption: str = ""
    """Beside the row."""


def draw_comparison(
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]],
    dataset,
    path: str | Path,
    *,
    number: int = 8,
    threshold: float | None = None,
) -> None:
    """Draws what models find in images of a data set, spread evenly over it.

    Args:
        models: by title of the column, a detector and its image processor.
        dataset: a `DetectionDataset`.
        path: of the picture.
        number: of images.
        threshold: see `draw_sheet`.

    Raises:
        ValueError: if there is no image or no model to draw.
    """
    items = spread(dataset, number)
    found = {title: find(items, model, processor, dataset.id2label) for title, (model, processor) in models.items()}
    draw_sheet(sheet_rows(items, found), path, class_names=dataset.id2label, threshold=threshold)


def spread(dataset, number: int) -> list[dict]:
    """So many items of a data set, spread evenly over it: the same ones every time."""
    number = min(number, len(dataset))
    return [dataset[round(index)] for index in np.linspace(0, len(dataset) - 1, number)]


def find(
    items: Sequence[Mapping],
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    id2label: Mapping[int, str],
) -> list[dict[str, torch.Tensor]]:
    """All detections in the items, with the data set's labels, on the CPU. The model is left in the mode it was in."""
    batch = DetectionCollator(image_processor)(items)
    targets = batch.pop("labels")
    pixels = {name: value.to(model.device) for name, value in batch.items()}
    targets = [{name: value.to(model.device) for name, value in target.items()} for target in targets]
    was_training = model.training
    with torch.no_grad():
        found = detect(model.eval(), image_processor, pixels, targets, label_lookup(model, id2label).to(model.device))
    model.train(was_training)
    return [{name: value.cpu() for name, value in detections.items()} for detections in found]


def sheet_rows(items: Sequence[Mapping], found: Mapping[str, Sequence[Mapping[str, torch.Tensor]]]) -> list[SheetRow]:
    """The rows of a sheet.

    Args:
        items: of a `DetectionDataset`.
        found: by title of the column, what `find` returns for these items.
    """
    return [
        SheetRow(
            image=item["image"],
            boxes=item["target"]["boxes"],
            labels=item["target"]["labels"],
            crowd=item["target"]["iscrowd"].bool(),
            detections={title: detections[row] for title, detections in found.items()},
        )
        for row, item in enumerate(items)
    ]


def draw_sheet(
    rows: Sequence[SheetRow],
    path: str | Path,
    *,
    class_names: Mapping[int, str],
    threshold: float | Mapping[str, float] | None = None,
) -> None:
    """Writes a PNG, whole or not at all: one row per image; first column the ground truth, then each model's detections.

    Hits, false detections, missed objects and crowd regions differ in colour and line, and are counted below each image; a
    detection is a hit as in `classify`. Small images are enlarged.

    Args:
        rows: the images; all with detections of the same models.
        path: of the picture; its folder is made.
        class_names: by label.
        threshold: draw detections with this score or more; one for all models, or one for each. None: for each model the
            score with the best F1 on these images, since the scores of different models don't mean the same; it stands in the
            column's title.

    Raises:
        ValueError: if there are no rows or no models.
    """
    if not rows or not rows[0].detections:
        raise ValueError(f"A sheet needs images and models; it got {len(rows)} images" + " and no models." * bool(rows))
    titles = list(rows[0].detections)
    outcomes = {title: [classify(row, row.detections[title]) for row in rows] for title in titles}
    heights = [PANEL_INCHES * min(1.3, row.image.shape[1] / row.image.shape[2]) for row in rows]
    figure = Figure(figsize=(PANEL_INCHES * (1 + len(titles)), sum(heights) + 0.8), layout="constrained")
    panels = figure.subplots(len(rows), 1 + len(titles), squeeze=False, height_ratios=heights)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        show(axes, row.image)
        axes.set_ylabel(row.caption)
        for box, label, crowd in zip(row.boxes.tolist(), row.labels.tolist(), row.crowd.tolist(), strict=True):
            draw_box(axes, box, class_names[label], KINDS["crowd" if crowd else "object"])
    panels[0, 0].set_title("ground truth")
    for column, title in enumerate(titles, start=1):
        if threshold is None:
            least = best_threshold(rows, title, outcomes[title])
        else:
            least = threshold[title] if isinstance(threshold, Mapping) else threshold
        panels[0, column].set_title(f"{title} (score ≥ {least:.2f})")
        for axes, row, outcome in zip(panels[:, column], rows, outcomes[title], strict=True):
            show(axes, row.image)
            _outcome(axes, row, row.detections[title], outcome, class_names, least)
            axes.set_xlabel(str(count(row, title, outcome, least)), fontsize=8)
    kinds = [kind for name, kind in KINDS.items() if name != "crowd" or any(row.crowd.any() for row in rows)]
    handles = [Line2D([], [], color=kind.color, linestyle=kind.style, lw=2, label=kind.label) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), facecolor="#dddddd")
    # Constrained layout alone cuts the titles of few rows
    save_figure(figure, path, DPI, bbox_inches="tight", pad_inches=0.05)


@dataclass(frozen=True)
class Outcome:
    """What each detection of one image is, and which object it found."""

    kinds: tuple[str, ...]
    """(n,) "hit", "false" or "crowd"."""
    objects: tuple[int, ...]
    """(n,) the object of a hit, else -1."""


@dataclass(frozen=True)
class Counts:
    """Of one model's boxes in one image, or in many."""

    hits: int
    missed: int
    false: int

    @property
    def errors(self) -> int:
        return self.missed + self.false

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.hits + other.hits, self.missed + other.missed, self.false + other.false)

    def __str__(self) -> str:
        return f"{self.hits} hit, {self.missed} missed, {self.false} false"


def count(scene: Scene, title: str, outcome: Outcome, least: float) -> Counts:
    """Of the model ``title``, detections with the score ``least`` or more."""
    shown = (scene.detections[title]["scores"] >= least).tolist()
    kinds = [kind for kind, one in zip(outcome.kinds, shown, strict=True) if one]
    hits = kinds.count("hit")
    return Counts(hits, int((~scene.crowd).sum()) - hits, kinds.count("false"))


def classify(row: Scene, detections: Mapping[str, torch.Tensor]) -> Outcome:
    """Greedy matching as in COCO at IoU 0.5: the best score first, each takes the free object of its class that it
    overlaps most; what then lies in a crowd region of its class by half its area is neither right nor wrong."""
    boxes, labels = detections["boxes"].float().cpu(), detections["labels"].cpu()
    iou = box_iou(boxes, row.boxes.float())
    same = labels[:, None] == row.labels[None]
    overlap = torch.where(same & ~row.crowd, iou, 0.0)
    in_crowd = (torch.where(same & row.crowd, _share_inside(boxes, row.boxes), 0.0) >= MATCH_IOU).any(dim=1)
    kinds = ["crowd" if crowd else "false" for crowd in in_crowd.tolist()]
    objects = [-1] * len(boxes)
    near = (
        (overlap >= MATCH_IOU).any(dim=1).tolist()
    )  # most of a DETR's detections aren't, so they needn't be looked at
    for index in detections["scores"].argsort(descending=True, stable=True).tolist():
        if near[index] and overlap[index].max() >= MATCH_IOU:
            objects[index] = int(overlap[index].argmax())
            kinds[index] = "hit"
            overlap[:, objects[index]] = 0
    return Outcome(tuple(kinds), tuple(objects))


def best_threshold(rows: Sequence[Scene], title: str, outcomes: Sequence[Outcome]) -> float:
    """The score from which on the detections of a model have the best F1 over all rows; 0.5 where none is a hit."""
    scores = np.concatenate([row.detections[title]["scores"].float().cpu().numpy() for row in rows])
    kinds = np.array([kind for outcome in outcomes for kind in outcome.kinds])
    scores, kinds = scores[kinds != "crowd"], kinds[kinds != "crowd"]
    if not (kinds == "hit").any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(kinds[order] == "hit")
    objects = sum(int((~row.crowd).sum()) for row in rows)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + objects)
    return float(scores[order][f1.argmax()])


def _share_inside(boxes: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """(n, N): how much of each box's area lies in each region."""
    low = torch.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return (high - low).clamp(min=0).prod(dim=2) / area[:, None].clamp(min=1e-9)


def show(axes: Axes, image: torch.Tensor) -> None:
    """Draws a (3, H, W) image in its own pixels, without ticks."""
    height, width = image.shape[1:]
    axes.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), interpolation="lanczos")
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def _outcome(axes, row: SheetRow, detections, outcome: Outcome, class_names: Mapping[int, str], least: float) -> None:
    """The detections from a score on, the best on top, below them the objects that none of these found."""
    scores = detections["scores"].tolist()
    shown = [i for i in detections["scores"].argsort(stable=True).tolist() if scores[i] >= least]
    found = {outcome.objects[i] for i in shown}
    for index, (box, label) in enumerate(zip(row.boxes.tolist(), row.labels.tolist(), strict=True)):
        if row.crowd[index]:
            draw_box(axes, box, "", KINDS["crowd"])
        elif index not in found:
            draw_box(axes, box, class_names[label], KINDS["missed"])
    for i in shown:
        text = f"{class_names[int(detections['labels'][i])]} {scores[i]:.2f}"
        draw_box(axes, detections["boxes"][i].tolist(), text, KINDS[outcome.kinds[i]])


def draw_box(axes: Axes, box: Sequence[float], text: str, kind: Kind) -> None:
    x1, y1, x2, y2 = box
    casing = withStroke(linewidth=3, foreground=kind.text, alpha=0.6)  # lines stand out from any background
    line = {"edgecolor": kind.color, "linestyle": kind.style, "linewidth": 1.6, "path_effects": [casing]}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **line))
    if text:
        height = axes.get_ylim()[0]
        above = y1 > 0.06 * height  # room for the text above the box
        axes.text(
            max(x1, 0),
            max(y1, 0),
            text,
            fontsize=6.5,
            color=kind.text,
            verticalalignment="bottom" if above else "top",
            clip_on=True,
            bbox={"facecolor": kind.color, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
