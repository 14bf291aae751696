"""The one schema every data set is read into, the Hub's: image, image_id, width, height, objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypedDict, get_args

import datasets
import numpy as np

BoxFormat = Literal["xywh", "xyxy", "cxcywh", "xywh_normalized", "xyxy_normalized", "cxcywh_normalized"]
"""``xywh``: left, top, width, height (COCO). ``xyxy``: left, top, right, bottom (Pascal VOC). ``cxcywh``: centre and
size (YOLO). In pixels, or ``_normalized``: in [0, 1] of the image's width and height."""

BOX_FORMATS: tuple[str, ...] = get_args(BoxFormat)


class Objects(TypedDict):
    """The objects of one image, as lists of one length."""

    id: list[int]
    bbox: list[list[float]]
    category: list[int]
    area: list[float]
    iscrowd: list[int]


class Row(TypedDict):
    """One image with its objects, as a reader of a format gives it: boxes already COCO xywh in pixels."""

    image: str
    image_id: int | str
    width: int
    height: int
    objects: Objects


def detection_features(class_names: Sequence[str]) -> datasets.Features:
    """The columns of a detection data set. ``bbox`` is (left, top, width, height) in pixels, ``area`` in square
    pixels."""
    lists = {
        "id": datasets.Sequence(datasets.Value("int64")),
        "bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"), length=4)),
        "category": datasets.Sequence(datasets.ClassLabel(names=list(class_names))),
        "area": datasets.Sequence(datasets.Value("float32")),
        "iscrowd": datasets.Sequence(datasets.Value("int64")),
    }
    return datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int64"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": lists,
        }
    )


def class_names_of(split: datasets.Dataset) -> list[str]:
    """The class names of a split in this schema, in the order of their ids."""
    return list(category_feature(split).names)


def category_feature(split: datasets.Dataset) -> datasets.ClassLabel:
    """The `ClassLabel` of a split in this schema."""
    objects = split.features.get("objects")
    category = objects.get("category") if isinstance(objects, dict) else None
    label = getattr(category, "feature", None)
    if not isinstance(label, datasets.ClassLabel):
        raise TypeError(
            f"the split has the columns {split.features}, but `objects` = {{id, bbox, category: ClassLabel, area, "
            "iscrowd}} is needed: read it with `load_detection_dataset`, which brings every format into that schema."
        )
    return label


def keep_classes(splits: datasets.DatasetDict, names: Sequence[str]) -> datasets.DatasetDict:
    """The splits with objects of these classes only, numbered in this order. Images that lose all objects stay.

    Raises:
        ValueError: a name that is no class of the splits, or is given twice.
    """
    known = class_names_of(next(iter(splits.values())))
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"the classes to keep are {list(names)}; each must be one of {known}, and only once.")
    index = {known.index(name): i for i, name in enumerate(names)}

    def filtered(row: dict) -> dict:
        objects = row["objects"]
        kept = [i for i, category in enumerate(objects["category"]) if category in index]
        objects = {key: [values[i] for i in kept] for key, values in objects.items()}
        return {"objects": {**objects, "category": [index[category] for category in objects["category"]]}}

    def keep(split: datasets.Dataset) -> datasets.Dataset:
        undecoded = split.cast_column("image", datasets.Image(decode=False))  # pictures are not read for this
        features = undecoded.features.copy()
        features["objects"] = detection_features(names)["objects"]
        return undecoded.map(filtered, features=features).cast_column("image", datasets.Image())

    return datasets.DatasetDict({name: keep(split) for name, split in splits.items()})


def split_name(name: str) -> str:
    """The split's usual name: ``val``, ``valid``, ``val2017`` and ``dev`` are ``validation``, ``train2017`` is
    ``train``."""
    plain = name.lower().rstrip("0123456789").rstrip("-_")
    for usual, spellings in _SPLITS.items():
        if plain in spellings:
            return usual
    return name


def split_names(names: Iterable[str]) -> dict[str, str]:
    """The names of a data set's splits -> their usual names (`split_name`); splits that would share one (``train2014``
    and ``train2017``) keep their own, for the user to choose."""
    usual = {name: split_name(name) for name in names}
    count = Counter(usual.values())
    return {own: name if count[name] == 1 else own for own, name in usual.items()}


_SPLITS = {
    "train": {"train", "training"},
    "validation": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing"},
}


def to_xywh(boxes: np.ndarray, box_format: str, width: int, height: int) -> np.ndarray:
    """(N, 4) boxes in ``box_format`` of an image of ``width`` by ``height`` pixels -> (N, 4) COCO xywh in pixels."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).copy()
    if box_format.endswith("_normalized"):
        boxes *= [width, height, width, height]
        box_format = box_format.removesuffix("_normalized")
    if box_format == "xyxy":
        boxes[:, 2:] -= boxes[:, :2]
    elif box_format == "cxcywh":
        boxes[:, :2] -= boxes[:, 2:] / 2
    return boxes


def objects_of(
    bbox: Iterable[Sequence[float]],
    category: Sequence[int],
    box_format: str,
    width: int,
    height: int,
    *,
    id: Sequence[int | str | None] | None = None,
    area: Sequence[float | None] | None = None,
    iscrowd: Sequence[int | None] | None = None,
) -> Objects:
    """The objects of one image in the schema; what a format doesn't have is filled in (ids from 0, area of the box),
    and so are areas and crowd flags that are None; ids by `whole_ids`."""
    xywh = to_xywh(np.array(list(bbox), dtype=np.float64), box_format, width, height)
    box_area = (xywh[:, 2] * xywh[:, 3]).tolist()
    if area is None or box_format.endswith("_normalized"):
        area = box_area
    else:
        area = [own if given is None else given for given, own in zip(area, box_area, strict=True)]
    return {
        "id": list(range(len(xywh))) if id is None else whole_ids(id),
        "bbox": xywh.tolist(),
        "category": list(category),
        "area": area,
        "iscrowd": [0] * len(xywh) if iscrowd is None else [int(flag or 0) for flag in iscrowd],
    }


LARGEST_ID = 2**53
"""Evaluation passes image ids in float64, which holds whole numbers up to here."""


def whole_ids(ids: Sequence[int | str | None]) -> list[int]:
    """Ids as integers: as they are, or their digits, or, for other names and beyond `LARGEST_ID`, numbered in order (a
    name used twice keeps one number, so that the checks find it)."""
    try:
        whole = [int(value) for value in ids if value is not None]
        distinct = len(whole) == len(ids) and len(set(whole)) == len(set(ids))
        if distinct and all(abs(number) <= LARGEST_ID for number in whole):
            return whole
    except ValueError:
        pass
    if all(value is None for value in ids):
        return list(range(len(ids)))
    number = {name: index for index, name in enumerate(dict.fromkeys(ids))}
    return [number[name] for name in ids]


def to_split(rows: Sequence[Row], class_names: Sequence[str]) -> datasets.Dataset:
    """The rows of one split as a `datasets.Dataset` in the schema. Images stay files on disk."""
    columns = {name: [row[name] for row in rows] for name in ("image", "width", "height", "objects")}
    columns["image_id"] = whole_ids([row["image_id"] for row in rows])
    return datasets.Dataset.from_dict(columns, features=detection_features(class_names))
