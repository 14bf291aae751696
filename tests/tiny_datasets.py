"""One tiny detection data set, written in every format the package reads."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

NAMES = ["cat", "dog", "bird"]

# per split: (file stem, (width, height), [(xywh box in pixels, class, iscrowd)])
SPLITS = {
    "train": [
        ("a1", (40, 30), [((4.0, 3.0, 20.0, 12.0), 0, 0), ((10.0, 6.0, 30.0, 24.0), 2, 0)]),
        ("a2", (20, 50), []),
        ("a3", (32, 32), [((0.0, 0.0, 32.0, 32.0), 1, 1), ((8.0, 16.0, 8.0, 4.0), 1, 0)]),
    ],
    "val": [("b1", (24, 16), [((6.0, 4.0, 12.0, 8.0), 2, 0)])],
}


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A random RGB image of (width, height)."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_pictures(folder: Path, split: str, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, (stem, size, _) in enumerate(SPLITS[split]):
        picture(size, index).save(folder / f"{stem}{suffix}")


def coco_content(split: str, numbers: tuple[int, ...] = (3, 17, 90)) -> dict:
    """A COCO json with sparse category ids, listed out of order."""
    images, annotations = [], []
    for index, (stem, (width, height), objects) in enumerate(SPLITS[split]):
        images.append({"id": 100 + 7 * index, "file_name": f"{stem}.png", "width": width, "height": height})
        for box, category, iscrowd in objects:
            annotations.append(
                {
                    "id": 1000 + len(annotations),
                    "image_id": 100 + 7 * index,
                    "category_id": numbers[category],
                    "bbox": list(box),
                    "area": box[2] * box[3] / 2,
                    "iscrowd": iscrowd,
                }
            )
    categories = [{"id": number, "name": name} for number, name in zip(numbers, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories[::-1]}


def write_coco(folder: Path) -> Path:
    """``annotations/instances_<split>.json`` and ``images/<split>/``."""
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        save_pictures(folder / "images" / split, split)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco_content(split)))
    return folder


def write_official_coco(folder: Path) -> Path:
    """``annotations/instances_<split>2017.json`` and ``<split>2017/``, and a file of captions beside them."""
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        save_pictures(folder / f"{split}2017", split)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco_content(split)))
        (folder / "annotations" / f"captions_{split}2017.json").write_text("{}")
    return folder


def write_roboflow(folder: Path) -> Path:
    """``<split>/_annotations.coco.json`` beside the images, with Roboflow's category 0 that heads the others."""
    for split, name in (("train", "train"), ("val", "valid")):
        save_pictures(folder / name, split)
        content = coco_content(split, (1, 2, 3))
        content["categories"] = [{**category, "supercategory": "animals"} for category in content["categories"]]
        content["categories"].append({"id": 0, "name": "animals", "supercategory": "none"})
        (folder / name / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def metadata_lines(split: str, names: bool = False) -> list[dict]:
    lines = []
    for index, (stem, (width, height), objects) in enumerate(SPLITS[split]):
        parts = {
            "id": list(range(len(objects))),
            "bbox": [list(box) for box, _, _ in objects],
            "category": [NAMES[category] if names else category for _, category, _ in objects],
            "area": [box[2] * box[3] / 2 for box, _, _ in objects],
            "iscrowd": [iscrowd for _, _, iscrowd in objects],
        }
        record = {"file_name": f"{stem}.png", "image_id": 100 + 7 * index, "width": width, "height": height}
        lines.append({**record, "objects": parts})
    return lines


def write_imagefolder(folder: Path, names: bool = False) -> Path:
    """``<split>/metadata.jsonl``; classes as ids with a ``categories.json``, or as names."""
    for split in SPLITS:
        save_pictures(folder / split, split)
        lines = map(json.dumps, metadata_lines(split, names))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    if not names:
        (folder / "categories.json").write_text(json.dumps({"id2name": dict(enumerate(NAMES))}))
    return folder


def write_yolo(folder: Path) -> Path:
    """``data.yaml``, ``images/<split>/`` and ``labels/<split>/``; an image without objects has no label file."""
    for split in SPLITS:
        save_pictures(folder / "images" / split, split)
        (folder / "labels" / split).mkdir(parents=True)
        for stem, (width, height), objects in SPLITS[split]:
            lines = []
            for (x, y, w, h), category, _ in objects:
                lines.append(f"{category} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}")
            if lines:
                (folder / "labels" / split / f"{stem}.txt").write_text("\n".join(lines) + "\n")
    names = "\n".join(f"  {index}: {name}" for index, name in enumerate(NAMES))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return folder


def write_voc(folder: Path, database: str = "mine") -> Path:
    """``Annotations/``, ``JPEGImages/`` and ``ImageSets/Main/``; crowds are marked difficult."""
    shift = 1 if "VOC" in database else 0
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split in SPLITS:
        save_pictures(folder / "JPEGImages", split, ".jpg")
        stems = []
        for stem, (width, height), objects in SPLITS[split]:
            stems.append(stem)
            items = "".join(
                f"<object><name>{NAMES[category]}</name><difficult>{crowd}</difficult><bndbox>"
                f"<xmin>{x + shift}</xmin><ymin>{y + shift}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
                "</bndbox></object>"
                for (x, y, w, h), category, crowd in objects
            )
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename><source><database>{database}</database></source>"
                f"<size><width>{width}</width><height>{height}</height></size>{items}</annotation>"
            )
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    (folder / "labels.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def hub_split(split: str, labels: bool = True, sizes: bool = True) -> datasets.Dataset:
    """A split as sets on the Hub are: embedded images, ``objects`` with or without class names."""
    category = datasets.ClassLabel(names=NAMES) if labels else datasets.Value("int64")
    features = {
        "image": datasets.Image(),
        "image_id": datasets.Value("int64"),
        "width": datasets.Value("int64"),
        "height": datasets.Value("int64"),
        "objects": {
            "id": datasets.Sequence(datasets.Value("int64")),
            "area": datasets.Sequence(datasets.Value("float32")),
            "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
            "category": datasets.Sequence(category),
            "iscrowd": datasets.Sequence(datasets.Value("bool")),
        },
    }
    rows = []
    for index, line in enumerate(metadata_lines(split)):
        line.pop("file_name")
        rows.append({"image": picture(SPLITS[split][index][1], index), **line})
    if not sizes:
        rows = [{key: value for key, value in row.items() if key not in ("width", "height")} for row in rows]
        del features["width"], features["height"]
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))
