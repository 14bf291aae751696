"""COCO json: ``annotations/instances_<split>.json`` with image folders, or Roboflow's
``<split>/_annotations.coco.json``."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from ..findings import Finding
from ..images import read_header
from ..schema import Row, objects_of, split_name
from .columns import is_box

ROBOFLOW = "_annotations.coco.json"
CROWD_FLAGS = (None, 0, 1, "0", "1")


def finds(folder: Path) -> bool:
    return bool(_annotation_files(folder))


def read(folder: Path, box_format: str | None, findings: list[Finding]) -> tuple[list[str], dict[str, list[Row]]]:
    """Class names and rows of every split. Sparse category ids become positions in the order of the ids; crowds keep
    their flag."""
    files = _annotation_files(folder)
    contents = {split: _load(path, findings) for split, path in files.items()}
    categories = _categories(files, contents, findings)
    position = {category: index for index, category in enumerate(categories)}
    return list(categories.values()), {
        split: _rows(folder, split, files[split], content, position, box_format or "xywh", findings)
        for split, content in contents.items()
    }


def _annotation_files(folder: Path) -> dict[str, Path]:
    """Split -> annotation file. Beside the instances, official COCO has keypoints and captions, which are not
    detection."""
    roboflow = {path.parent.name: path for path in sorted(folder.glob(f"*/{ROBOFLOW}"))}
    instances = {
        path.stem.removeprefix("instances_"): path for path in sorted(folder.glob("annotations/instances_*.json"))
    }
    plain = {
        path.stem: path
        for path in sorted(folder.glob("annotations/*.json"))
        if split_name(path.stem) in ("train", "validation", "test")
    }
    return roboflow or instances or plain


def _load(path: Path, findings: list[Finding]) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        findings.append(Finding("not valid JSON", str(path), "file", error))
        content = {}
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            findings.append(
                Finding("a COCO json needs the lists images, annotations, categories", str(path), key, "missing")
            )
            return {"images": [], "annotations": [], "categories": []}
    return content


def _categories(files: dict[str, Path], contents: dict[str, dict], findings: list[Finding]) -> dict[int, str]:
    """Category id -> name over all splits, in the order of the ids."""
    names: dict[int, str] = {}
    source: dict[int, Path] = {}
    supercategories: dict[int, str | None] = {}
    for split, content in contents.items():
        in_file: set[int] = set()
        for index, category in enumerate(content["categories"]):
            number, name = category.get("id"), category.get("name")
            row = f"categories[{index}]"
            if not isinstance(number, int) or not isinstance(name, str):
                findings.append(
                    Finding("a category needs a whole-number id and a name", str(files[split]), row, category)
                )
            elif number in in_file:
                findings.append(Finding("category id used twice", str(files[split]), row, category))
            elif names.setdefault(number, name) != name:
                advice = f"{source[number].name} calls it {names[number]!r}: number the classes alike in every split"
                findings.append(Finding("category id with two names", str(files[split]), row, category, advice=advice))
            else:
                source.setdefault(number, files[split])
                supercategories[number] = category.get("supercategory")
                in_file.add(number)
    used = {annotation.get("category_id") for content in contents.values() for annotation in content["annotations"]}
    for number in _roboflow_roots(names, supercategories, used):
        findings.append(
            Finding(
                "category that only heads the others",
                str(source[number]),
                f"category {number}",
                names[number],
                action="noted",
                advice="left out of the classes, as it has no object in any split",
            )
        )
        del names[number]
    return dict(sorted(names.items()))


def _roboflow_roots(names: dict[int, str], supercategories: dict[int, str | None], used: set) -> list[int]:
    """Roboflow's exports start with category 0, which is the supercategory of all others and has no objects."""
    return [
        number
        for number, name in names.items()
        if number not in used
        and len(names) > 1
        and all(supercategories[other] == name for other in names if other != number)
    ]


def _rows(
    folder: Path,
    split: str,
    path: Path,
    content: dict,
    position: dict[int, int],
    box_format: str,
    findings: list[Finding],
) -> list[Row]:
    known = {image.get("id") for image in content["images"]}
    annotations = defaultdict(list)
    numbers: set[int] = set()
    for index, annotation in enumerate(content["annotations"]):
        row = f"annotations[{index}] (id {annotation.get('id')})"
        box, number = annotation.get("bbox"), annotation.get("id")
        if number in numbers:
            findings.append(Finding("annotation id used twice", str(path), row, number))
        if number is not None:
            numbers.add(number)
        if annotation.get("image_id") not in known:
            findings.append(
                Finding("object of an image that is not listed", str(path), row, annotation.get("image_id"))
            )
        elif annotation.get("category_id") not in position:
            advice = f"the categories are {sorted(position)}"
            problem = "object of an unknown class"
            findings.append(Finding(problem, str(path), row, annotation.get("category_id"), advice=advice))
        elif not is_box(box):
            findings.append(Finding("a bbox needs four numbers", str(path), row, box))
        elif annotation.get("iscrowd") not in CROWD_FLAGS:
            findings.append(Finding("iscrowd must be 0 or 1", str(path), row, annotation["iscrowd"]))
        else:
            annotations[annotation["image_id"]].append(annotation)
    images = _image_folder(folder, split, path, content["images"])
    rows: list[Row] = []
    for index, image in enumerate(content["images"]):
        file = images / str(image.get("file_name"))
        width, height = image.get("width"), image.get("height")
        if not width or not height:
            try:
                width, height = read_header(str(file)).upright
            except OSError as error:
                findings.append(Finding("missing or unreadable image", str(path), f"images[{index}]", error))
                continue
        own = annotations[image.get("id")]
        objects = objects_of(
            [annotation["bbox"] for annotation in own],
            [position[annotation["category_id"]] for annotation in own],
            box_format,
            width,
            height,
            id=[annotation.get("id", number) for number, annotation in enumerate(own)],
            area=[annotation.get("area") for annotation in own],
            iscrowd=[annotation.get("iscrowd") for annotation in own],
        )
        rows.append(
            {"image": str(file), "image_id": image.get("id"), "width": width, "height": height, "objects": objects}
        )
    return rows


def _image_folder(folder: Path, split: str, path: Path, images: list[dict]) -> Path:
    """The folder the file names are relative to: beside a Roboflow json, else one named after the annotation file."""
    if path.name == ROBOFLOW:
        return path.parent
    usual = split_name(split)
    candidates = [folder / place for place in (f"images/{split}", split, f"images/{usual}", usual, "images", ".")]
    for candidate in candidates:
        if any((candidate / str(image.get("file_name"))).is_file() for image in images[:10]):
            return candidate
    return candidates[0]
