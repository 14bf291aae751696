"""YOLO: ``data.yaml`` with class names and image folders, and ``labels/*.txt`` beside ``images/``."""

from __future__ import annotations

from math import prod
from pathlib import Path

import yaml
from PIL import Image

from ..findings import Finding
from ..images import read_header
from ..schema import Row, objects_of

SPLITS = ("train", "val", "valid", "validation", "test")
"""Keys of the yaml."""


def finds(folder: Path) -> bool:
    return _settings_file(folder) is not None


def read(folder: Path, box_format: str | None, findings: list[Finding]) -> tuple[list[str], dict[str, list[Row]]]:
    """Class names and rows of every split. A line is ``class cx cy w h``, normalised, with keypoints behind it where the
    yaml has a ``kpt_shape``, or a polygon, whose box is taken; an image without a label file has no objects."""
    path = _settings_file(folder)
    settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    names = settings["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else {int(key): name for key, name in names.items()}
    if settings.get("nc", len(names)) != len(names):
        findings.append(
            Finding("nc is not the number of names", str(path), "nc", settings["nc"], advice=f"{len(names)} names")
        )
    names = {number: str(names[number]) for number in sorted(names)}
    position = {number: index for index, number in enumerate(names)}
    keypoints = _keypoints(path, settings, findings)
    rows: dict[str, list[Row]] = {}
    for split in filter(settings.get, SPLITS):
        places = settings[split]
        images = [
            image
            for place in (places if isinstance(places, list) else [places])
            for image in _images(path, settings, str(place), findings)
        ]
        named = _ids(images)
        rows[split] = [
            row
            for image in images
            if (row := _row(image, named[image], position, keypoints, box_format or "cxcywh_normalized", findings))
        ]
    return list(names.values()), rows


def _settings_file(folder: Path) -> Path | None:
    """The yaml file: the path itself, ``data.yaml``, or the only yaml with ``names`` in the folder."""
    if folder.is_file():
        return folder if folder.suffix in (".yaml", ".yml") else None
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")], key=lambda path: path.stem != "data"):
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and "names" in content and {"train", "val", "test"} & content.keys():
            return path
    return None


def _keypoints(path: Path, settings: dict, findings: list[Finding]) -> list[int] | None:
    """How many keypoints the objects of a pose data set have, and how many values each; None where it is no pose data
    set. Nothing in the label files tells their lines from polygons."""
    shape = settings.get("kpt_shape")
    if shape is None or (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape)):
        return shape
    findings.append(
        Finding("kpt_shape needs two whole numbers", str(path), "kpt_shape", shape, advice="[keypoints, 2 or 3 values]")
    )
    return None


def _images(path: Path, settings: dict, place: str, findings: list[Finding]) -> list[Path]:
    """The images of one entry of the yaml: a folder, or a text file that lists them."""
    root = path.parent / str(settings.get("path") or ".")
    # Roboflow writes ../train/images for a folder beside the yaml, and `path` is often from the machine it was made on
    candidates = [base / name for base in (root, path.parent) for name in (place, place.removeprefix("../"))]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        advice = f"looked at {', '.join(dict.fromkeys(map(str, candidates)))}"
        findings.append(Finding("no such image folder", str(path), "path, train, val, test", place, advice=advice))
        return []
    if found.is_file():
        lines = [line.strip() for line in found.read_text(encoding="utf-8-sig").splitlines()]
        return [found.parent / line if line.startswith("./") else root / line for line in lines if line]
    extensions = Image.registered_extensions()
    return sorted(file for file in found.rglob("*") if file.suffix.lower() in extensions)


def _ids(images: list[Path]) -> dict[Path, str]:
    """The image ids: the files' names, or their paths where a name recurs in another folder (cameras that each count
    from 1). A file listed twice keeps one id, so that the checks find it."""
    files = set(images)
    unique = len({file.stem for file in files}) == len(files)
    return {file: file.stem if unique else str(file) for file in files}


def _label_file(image: Path) -> Path:
    """The label file of an image: the last ``images`` of its path becomes ``labels``; without one it is beside it."""
    parts = list(image.with_suffix(".txt").parts)
    for index in reversed(range(len(parts) - 1)):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts)


def _row(
    image: Path,
    image_id: str,
    position: dict[int, int],
    keypoints: list[int] | None,
    box_format: str,
    findings: list[Finding],
) -> Row | None:
    try:
        width, height = read_header(str(image)).upright
    except OSError as error:
        findings.append(Finding("missing or unreadable image", str(image), "file", error))
        return None
    boxes, category = [], []
    label_file = _label_file(image)
    lines = label_file.read_text(encoding="utf-8-sig").splitlines() if label_file.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            label, *values = (float(word) for word in line.split())
        except ValueError:
            findings.append(Finding("a label line needs numbers only", str(label_file), f"line {number}", line))
            continue
        if label not in position:
            advice = f"the classes are {list(position)}"
            findings.append(
                Finding("object of an unknown class", str(label_file), f"line {number}", line, advice=advice)
            )
        elif keypoints is not None and len(values) != 4 + prod(keypoints):
            problem = "a pose label needs a class, 4 box values and the keypoints"
            advice = f"kpt_shape {keypoints} makes {5 + prod(keypoints)} numbers a line"
            findings.append(Finding(problem, str(label_file), f"line {number}", line, advice=advice))
        elif keypoints is not None or len(values) == 4:
            boxes.append(values[:4])
            category.append(position[int(label)])
        elif len(values) >= 6 and len(values) % 2 == 0:
            boxes.append(_polygon_box(values, box_format))
            category.append(position[int(label)])
        else:
            problem = "a label line needs a class and 4 box values, or 3 or more polygon points"
            findings.append(Finding(problem, str(label_file), f"line {number}", line))
    objects = objects_of(boxes, category, box_format, width, height)
    return {"image": str(image), "image_id": image_id, "width": width, "height": height, "objects": objects}


def _polygon_box(values: list[float], box_format: str) -> list[float]:
    """The box around ``x1 y1 x2 y2 ...`` in ``box_format``."""
    left, top, right, bottom = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    if box_format.startswith("xyxy"):
        return [left, top, right, bottom]
    if box_format.startswith("xywh"):
        return [left, top, right - left, bottom - top]
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
