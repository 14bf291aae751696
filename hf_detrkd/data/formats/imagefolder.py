"""Hugging Face imagefolder: images beside a ``metadata.jsonl`` with ``file_name`` and ``objects`` in every line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..findings import Finding
from ..images import read_header
from ..schema import Row, objects_of
from .columns import BOX_KEYS, CATEGORY_KEYS, ClassNames, listed, object_keys, read_objects

METADATA = "metadata.jsonl"
NAMES = ("categories.json", "annotations/categories.json", "../categories.json", "../annotations/categories.json")
"""Where the class names may stand, seen from the folder: an imagefolder itself has no place for them."""


@dataclass(frozen=True)
class Line:
    """One line of a metadata file."""

    path: Path
    number: int
    """Counted from 1."""
    record: dict
    objects: dict[str, list]
    keys: dict[str, str]
    """Part of the schema's objects -> what the line calls it."""

    @property
    def labels(self) -> list[int | str]:
        """The classes of its objects."""
        return self.objects.get(self.keys["category"]) or []


def finds(folder: Path) -> bool:
    return bool(_metadata_files(folder))


def read(folder: Path, box_format: str | None, findings: list[Finding]) -> tuple[list[str], dict[str, list[Row]]]:
    """Class names and rows of every split. ``objects.category`` holds names, or ids into ``categories.json``."""
    lines = {split: _lines(path, findings) for split, path in _metadata_files(folder).items()}
    declared = _named_classes(folder)
    if declared is None:
        classes = ClassNames.seen(
            value for split_lines in lines.values() for line in split_lines for value in line.labels
        )
    else:
        classes = ClassNames.declared(declared)
    rows: dict[str, list[Row]] = {}
    for split, split_lines in lines.items():
        rows[split] = []
        for line in split_lines:
            row = _row(line, classes, box_format or "xywh", findings)
            if row is not None:
                rows[split].append(row)
    return list(classes.names), rows


def _metadata_files(folder: Path) -> dict[str, Path]:
    files = sorted(folder.glob(f"*/{METADATA}")) or sorted(folder.glob(f"images/*/{METADATA}"))
    split_files = {path.parent.name: path for path in files}
    return split_files or ({"train": folder / METADATA} if (folder / METADATA).is_file() else {})


def _named_classes(folder: Path) -> dict[int, str] | None:
    """Class id -> name from a list of names or of COCO's categories, ``{"id2name": {...}}`` or ``{id: name}``; None where there
    is no such file."""
    for place in NAMES:
        path = folder / place
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if isinstance(content, list):
                if all(isinstance(one, dict) and {"id", "name"} <= one.keys() for one in content):
                    return {int(one["id"]): one["name"] for one in content}
                strange = [one for one in content if not isinstance(one, str)]
                if strange:
                    raise ValueError(
                        f"{path} must hold a list of names, or of COCO's categories with id and name; it has {strange[0]}."
                    )
                return dict(enumerate(content))
            return {int(number): name for number, name in content.get("id2name", content).items()}
    return None


def _lines(path: Path, findings: list[Finding]) -> list[Line]:
    """Every line that has what an image needs."""
    good = []
    # Not splitlines(), which also ends a line at characters that may stand in a JSON text
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
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
        objects = listed(record.get("objects") or {})
        keys = object_keys(objects) if objects else {"bbox": "bbox", "category": "category"}
        if None in keys.values():
            advice = f"needed: one of {BOX_KEYS} and one of {CATEGORY_KEYS}"
            findings.append(Finding("objects without boxes or classes", str(path), row, sorted(objects), advice=advice))
            continue
        good.append(Line(path, number, record, objects, keys))
    return good


def _row(line: Line, classes: ClassNames, box_format: str, findings: list[Finding]) -> Row | None:
    file, where, record = line.path.parent / line.record["file_name"], f"line {line.number}", line.record
    width, height = record.get("width"), record.get("height")
    if not width or not height:
        try:
            width, height = read_header(str(file)).upright
        except OSError as error:
            findings.append(Finding("missing or unreadable image", str(line.path), where, error))
            return None
    parts = read_objects(line.objects, line.keys, classes, str(line.path), where, findings)
    if parts is None:
        return None
    objects = objects_of(**parts, box_format=box_format, width=width, height=height)
    return {
        "image": str(file),
        "image_id": record.get("image_id"),
        "width": width,
        "height": height,
        "objects": objects,
    }
