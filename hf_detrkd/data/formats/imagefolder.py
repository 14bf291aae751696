"""Hugging Face imagefolder: images beside a ``metadata.jsonl`` with ``file_name`` and ``objects`` in every line."""

from __future__ import annotations

import json
from pathlib import Path

from ..findings import Finding
from ..images import read_header
from ..schema import Row, objects_of, split_name
from .columns import BOX_KEYS, CATEGORY_KEYS, ClassNames, first_key, listed

METADATA = "metadata.jsonl"
NAMES = ("categories.json", "../categories.json", "../annotations/categories.json")
"""Where the class names may stand, seen from the folder: an imagefolder itself has no place for them."""


def finds(folder: Path) -> bool:
    return bool(_metadata_files(folder))


def read(folder: Path, box_format: str | None, findings: list[Finding]) -> tuple[list[str], dict[str, list[Row]]]:
    """Class names and rows of every split. ``objects.category`` holds names, or ids into ``categories.json``."""
    lines = {split: _lines(path, findings) for split, path in _metadata_files(folder).items()}
    records = [record for split_lines in lines.values() for _, _, record in split_lines]
    declared = _named_classes(folder)
    if declared is None:
        classes = ClassNames.seen(value for record in records for value in record["objects"]["category"])
    else:
        classes = ClassNames.declared(declared)
    rows: dict[str, list[Row]] = {}
    for split, split_lines in lines.items():
        rows[split] = []
        for path, number, record in split_lines:
            row = _row(path, number, record, classes, box_format or "xywh", findings)
            if row is not None:
                rows[split].append(row)
    return list(classes.names), rows


def _metadata_files(folder: Path) -> dict[str, Path]:
    split_files = {split_name(path.parent.name): path for path in sorted(folder.glob(f"*/{METADATA}"))}
    return split_files or ({"train": folder / METADATA} if (folder / METADATA).is_file() else {})


def _named_classes(folder: Path) -> dict[int, str] | None:
    """Class id -> name from a list of names, ``{"id2name": {...}}`` or ``{id: name}``; None where there is no such file."""
    for place in NAMES:
        path = folder / place
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, list):
                return dict(enumerate(map(str, content)))
            return {int(number): name for number, name in content.get("id2name", content).items()}
    return None


def _lines(path: Path, findings: list[Finding]) -> list[tuple[Path, int, dict]]:
    """(file, line number, record) of every line that has what an image needs."""
    good = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = f"line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            findings.append(Finding("not valid JSON", str(path), row, error))
            continue
        if not isinstance(record.get("file_name"), str):
            findings.append(Finding("no file_name", str(path), row, record.get("file_name")))
            continue
        objects = listed(record.get("objects") or {"bbox": [], "category": []})
        boxes, categories = first_key(objects, BOX_KEYS), first_key(objects, CATEGORY_KEYS)
        if boxes is None or categories is None:
            advice = f"needed: one of {BOX_KEYS} and one of {CATEGORY_KEYS}"
            findings.append(Finding("objects without boxes or classes", str(path), row, sorted(objects), advice=advice))
            continue
        lengths = {key: len(value) for key, value in objects.items() if isinstance(value, list)}
        if len(set(lengths.values())) > 1:
            findings.append(Finding("lists of unequal length in objects", str(path), row, lengths))
            continue
        objects = {**objects, "bbox": objects[boxes], "category": objects[categories]}
        good.append((path, number, {**record, "objects": objects}))
    return good


def _row(
    path: Path, number: int, record: dict, classes: ClassNames, box_format: str, findings: list[Finding]
) -> Row | None:
    file, objects = path.parent / record["file_name"], record["objects"]
    width, height = record.get("width"), record.get("height")
    if not width or not height:
        try:
            width, height = read_header(str(file)).upright
        except OSError:
            findings.append(Finding("missing or unreadable image", str(path), f"line {number}", record["file_name"]))
            return None
    category = []
    for index, value in enumerate(objects["category"]):
        if value not in classes.position:
            advice = f"the classes are {list(classes.position)}"
            row = f"line {number}, object {index}"
            findings.append(Finding("object of an unknown class", str(path), row, value, advice=advice))
            return None
        category.append(classes.position[value])
    for index, box in enumerate(objects["bbox"]):
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            findings.append(Finding("a bbox needs four numbers", str(path), f"line {number}, object {index}", box))
            return None
    parts = {key: objects[key] for key in ("id", "area", "iscrowd") if key in objects}
    return {
        "image": str(file),
        "image_id": record.get("image_id"),
        "width": width,
        "height": height,
        "objects": objects_of(objects["bbox"], category, box_format, width, height, **parts),
    }
