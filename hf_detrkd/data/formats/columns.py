"""Any `datasets` set with the Hub's usual ``objects`` column, brought into the one schema; images stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import datasets

from ..findings import Finding
from ..images import name_of, read_header
from ..schema import detection_features, objects_of, whole_ids

BOX_KEYS = ("bbox", "bboxes", "boxes")
CATEGORY_KEYS = ("category", "categories", "category_id", "label", "labels", "class", "classes")
OPTIONAL_KEYS = {"id": ("id", "bbox_id", "ids"), "area": ("area", "areas"), "iscrowd": ("iscrowd", "is_crowd")}
"""Spellings of the parts of ``objects`` on the Hub; the first is the usual one (cppe-5)."""


@dataclass(frozen=True)
class ClassNames:
    """The classes of a data set: their names, and the place among them of what an object may be labelled with."""

    names: tuple[str, ...]
    position: dict[int | str, int]

    @classmethod
    def declared(cls, names: dict[int, str]) -> ClassNames:
        """From id -> name; an object has one or the other. Ids may be sparse."""
        ordered = sorted(names)
        by_name = {names[number]: index for index, number in enumerate(ordered)}
        by_number = {number: index for index, number in enumerate(ordered)}
        return cls(tuple(names[number] for number in ordered), by_name | by_number)

    @classmethod
    def seen(cls, values: Iterable[int | str]) -> ClassNames:
        """From the labels objects have: sorted, and ``class_<id>`` where they are only numbers."""
        ordered = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        names = tuple(value if isinstance(value, str) else f"class_{value}" for value in ordered)
        return cls(names, {value: index for index, value in enumerate(ordered)})


def first_key(columns: Iterable[str], keys: Sequence[str]) -> str | None:
    """The first of ``keys`` that is among the columns."""
    present = set(columns)
    return next((key for key in keys if key in present), None)


def listed(objects: dict | list) -> dict[str, list]:
    """``objects`` as a dict of lists, from that or from a list of dicts."""
    if isinstance(objects, dict):
        return objects
    keys = list(dict.fromkeys(key for item in objects for key in item))
    return {key: [item.get(key) for item in objects] for key in keys or ("bbox", "category")}


def read_objects(
    objects: dict[str, list], keys: dict[str, str], classes: ClassNames, file: str, row: str, findings: list[Finding]
) -> dict[str, list] | None:
    """One image's objects by the schema's names, ``category`` as places among the classes; None, and a finding, where
    they can't be understood."""
    parts = {part: objects.get(key) for part, key in keys.items()}
    parts = {part: values or [] for part, values in parts.items() if values is not None or part in ("bbox", "category")}
    lengths = {part: len(values) for part, values in parts.items()}
    if len(set(lengths.values())) > 1:
        findings.append(Finding("lists of unequal length in objects", file, row, lengths))
        return None
    for index, (box, value) in enumerate(zip(parts["bbox"], parts["category"], strict=True)):
        if not is_box(box):
            findings.append(Finding("a bbox needs four numbers", file, f"{row}, object {index}", box))
            return None
        if value not in classes.position:
            advice = f"the classes are {list(classes.position)}"
            findings.append(Finding("object of an unknown class", file, f"{row}, object {index}", value, advice=advice))
            return None
    return {**parts, "category": [classes.position[value] for value in parts["category"]]}


def is_box(box: object) -> bool:
    """Whether ``box`` is a list of four numbers."""
    return isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(value, int | float) for value in box)


def object_keys(available: Iterable[str]) -> dict[str, str | None]:
    """Part of the schema's objects -> what this set calls it; boxes and classes are None where nothing fits."""
    available = set(available)
    keys = {"bbox": first_key(available, BOX_KEYS), "category": first_key(available, CATEGORY_KEYS)}
    optional = {part: first_key(available, spellings) for part, spellings in OPTIONAL_KEYS.items()}
    return keys | {part: key for part, key in optional.items() if key is not None}


def to_schema(
    splits: dict[str, datasets.Dataset], box_format: str | None, findings: list[Finding]
) -> datasets.DatasetDict:
    """Every split in the schema of `detection_features`. Of several image columns the one called ``image`` is taken.

    Raises:
        ValueError: the columns are not detection's, or of several image columns none is called ``image``.
    """
    first = next(iter(splits.values()))
    image_columns = [name for name, kind in first.features.items() if isinstance(kind, datasets.Image)]
    if not image_columns or "objects" not in first.features:
        raise ValueError(
            f"The data set has the columns {list(first.features)}, but an image column and `objects` with boxes "
            "and classes are needed, as in https://huggingface.co/datasets/cppe-5. Rename the columns, or save the set "
            "as COCO json, YOLO, Pascal VOC or imagefolder with metadata.jsonl."
        )
    if len(image_columns) > 1 and "image" not in image_columns:
        raise ValueError(
            f"The data set has several image columns, {image_columns}, and none of them is called `image`: boxes belong "
            "to one. Rename that column to `image`, with `rename_column`, or remove the others."
        )
    image_column = "image" if "image" in image_columns else image_columns[0]
    keys, declared, annotations = {}, {}, {}
    for name, split in splits.items():
        keys[name], declared[name] = _spelling(split)
        columns = [key for key in ("image_id", "width", "height", "objects") if key in split.features]
        annotations[name] = split.select_columns(columns)[:]
        annotations[name]["objects"] = [listed(objects or {}) for objects in annotations[name]["objects"]]
    classes = _classes(annotations, keys, declared, findings)
    result = datasets.DatasetDict()
    for name, split in splits.items():
        columns = _split_columns(
            name, split, image_column, annotations[name], keys[name], classes, box_format or "xywh", findings
        )
        features = detection_features(classes.names)
        image = split.select_columns([image_column])
        image = image if image_column == "image" else image.rename_column(image_column, "image")
        others = datasets.Dataset.from_dict(columns, features=features.__class__({k: features[k] for k in columns}))
        result[name] = datasets.concatenate_datasets([image, others], axis=1)
    return result


def _spelling(split: datasets.Dataset) -> tuple[dict[str, str], list[str] | None]:
    """Part of the schema's objects -> what the split calls it, and the names that it declares for its classes."""
    inner = _inner(split.features["objects"])
    keys = object_keys(inner)
    if None in keys.values():
        raise ValueError(
            f"`objects` has {list(inner)}, but boxes (one of {BOX_KEYS}) and classes (one of {CATEGORY_KEYS}) are "
            "needed: rename its parts."
        )
    label = inner[keys["category"]]
    label = getattr(label, "feature", label)
    return keys, label.names if isinstance(label, datasets.ClassLabel) else None


def _classes(
    annotations: dict[str, dict[str, list]],
    keys: dict[str, dict[str, str]],
    declared: dict[str, list[str] | None],
    findings: list[Finding],
) -> ClassNames:
    """The classes of all splits. Those that count the same names otherwise than the first get them in the place of numbers; a
    finding, where the names are others."""
    first, names = next(iter(declared.items()))
    for split, own in declared.items():
        if own is None or names is None or own == names:
            continue
        if sorted(own) != sorted(names):
            advice = f"the classes of {first} are {names}"
            findings.append(Finding("splits with different classes", split, "features", own, advice=advice))
            continue
        for objects in annotations[split]["objects"]:
            part = keys[split]["category"]
            objects[part] = [
                own[value] if isinstance(value, int) and 0 <= value < len(own) else value
                for value in objects.get(part) or ()
            ]
    if names is not None:
        return ClassNames.declared(dict(enumerate(names)))
    return ClassNames.seen(
        value
        for split, columns in annotations.items()
        for objects in columns["objects"]
        for value in objects.get(keys[split]["category"]) or ()
    )


def _inner(objects) -> dict:
    """The parts of ``objects``, whether its feature is a dict of lists or a list of dicts."""
    inner = objects[0] if isinstance(objects, list) else objects
    return getattr(inner, "feature", inner)


def _split_columns(
    name: str,
    split: datasets.Dataset,
    image_column: str,
    annotations: dict[str, list],
    keys: dict[str, str],
    classes: ClassNames,
    box_format: str,
    findings: list[Finding],
) -> dict[str, list]:
    files = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    columns: dict[str, list] = {"image_id": [], "width": [], "height": [], "objects": []}
    for index, objects in enumerate(annotations["objects"]):
        width = annotations["width"][index] if "width" in annotations else None
        height = annotations["height"][index] if "height" in annotations else None
        if not width or not height:
            source = files[index][image_column]
            try:
                width, height = read_header(source).upright
            except (OSError, TypeError) as error:
                findings.append(
                    Finding("missing or unreadable image", name_of(source or {}), f"{name} row {index}", error)
                )
                width = height = 1
        parts = read_objects(objects, keys, classes, name, f"row {index}", findings) or {"bbox": [], "category": []}
        columns["width"].append(width)
        columns["height"].append(height)
        columns["objects"].append(objects_of(**parts, box_format=box_format, width=width, height=height))
    columns["image_id"] = whole_ids(annotations.get("image_id") or [None] * len(split))
    return columns
