"""Reading any usual detection data set, from a folder or the Hub, into the one schema of `hf_detrkd.data.schema`."""

from __future__ import annotations

import logging
from collections import Counter
from difflib import get_close_matches
from pathlib import Path

import datasets

from ..findings import DatasetError, Finding
from ..schema import BOX_FORMATS, BoxFormat, split_names, to_split
from ..shapes import SHAPES, generate_shapes
from . import coco, columns, imagefolder, voc, yolo

READERS = {"coco": coco, "yolo": yolo, "voc": voc, "imagefolder": imagefolder}
"""Folder formats in the order they are tried: each has ``finds(folder)`` and ``read(folder, box_format, findings)``,
with splits under their own names."""

logger = logging.getLogger(__name__)

FORMATS = ("auto", *READERS, "datasets")


def load_detection_dataset(
    path_or_name: str | Path,
    *,
    config_name: str | None = None,
    format: str = "auto",
    bbox_format: BoxFormat | None = None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> datasets.DatasetDict:
    """A detection data set in one schema, with the splits it has among train, validation, test (others keep their
    name, and so do several that would have one of these, as train2014 and train2017).

    Args:
        path_or_name: a folder (COCO json, YOLO with its data.yaml or the yaml itself, Pascal VOC, imagefolder with
            metadata.jsonl, or anything `datasets` saved or can load), a data set on the Hub, or the built-in
            ``shapes``, with settings as in ``shapes:train=1600,size=128`` (`ShapesConfig`).
        config_name: the configuration of a `datasets` set that has several.
        format: one of ``coco``, ``yolo``, ``voc``, ``imagefolder``, ``datasets``; ``auto`` looks at the folder.
        bbox_format: what the four numbers of a box are; None takes the format's own (COCO xywh in pixels for coco,
            imagefolder and datasets; cxcywh_normalized for yolo; xyxy for voc).
        cache_dir: where `datasets` and ``shapes`` keep what they make.
        revision, token: passed to the Hub.

    Returns:
        Every split with image (`datasets.Image`), image_id, width, height, objects {id, bbox (xywh, pixels), category
        (`ClassLabel`), area, iscrowd}, one list of classes for all. Values are as the source has them: `check_dataset`
        says what is wrong with them.

    Raises:
        ValueError: an unknown format or box format, a folder that is in none, columns that are not detection's.
        DatasetError: annotations that can't be read; all of them are listed with file, row and value.
    """
    _check_choice("format", format, FORMATS)
    if bbox_format is not None:
        _check_choice("bbox_format", bbox_format, BOX_FORMATS)
    name = str(path_or_name)
    findings: list[Finding] = []
    if name.partition(":")[0] == SHAPES and not Path(name).exists():
        folder, format = generate_shapes(name, cache_dir), "imagefolder"
    else:
        folder = Path(name).expanduser().absolute()
        if name.startswith((".", "/", "~")) and not folder.exists():
            raise ValueError(
                f"There is no folder `{folder}`. Give one that exists, or the id of a data set on the Hub."
            )
        format = detect_format(folder) if format == "auto" else format
    if format == "datasets":
        splits = _load_datasets(folder, name, config_name, cache_dir, revision, token)
        result = columns.to_schema(splits, bbox_format, findings)
    else:
        class_names, rows = READERS[format].read(folder, bbox_format, findings)
        for twice in (name for name, count in Counter(class_names).items() if count > 1):
            numbers = [index for index, name in enumerate(class_names) if name == twice]
            findings.append(Finding("class name used twice", str(folder), f"classes {numbers}", twice))
        _stop_at(findings)
        result = datasets.DatasetDict({split: to_split(split_rows, class_names) for split, split_rows in rows.items()})
    _stop_at(findings)
    usual = split_names(result)
    return datasets.DatasetDict({usual[name]: split for name, split in result.items()})


def detect_format(folder: Path) -> str:
    """The format of a folder; a name that is no local path is a data set on the Hub."""
    if not folder.exists():
        return "datasets"
    if folder.is_dir() and _is_saved(folder):
        return "datasets"
    for format, reader in READERS.items():
        if reader.finds(folder):
            return format
    data_files = ("*.parquet", "*.arrow", "*.jsonl", "*.json", "*.csv", "*.tar")
    if folder.is_dir() and any(next(folder.rglob(pattern), None) for pattern in data_files):
        return "datasets"
    raise ValueError(
        f"`{folder}` is in none of the known formats: annotations/instances_<split>.json or "
        "<split>/_annotations.coco.json (COCO), a data.yaml with names and train (YOLO), Annotations/ and JPEGImages/ "
        "(Pascal VOC), metadata.jsonl beside the images (imagefolder), or what `datasets` saved or can load (parquet, "
        f"...). Give the folder that holds these, and `format`, one of {', '.join(FORMATS)}, to say which it is."
    )


def split_off_validation(
    splits: datasets.DatasetDict,
    train_val_split: float = 0.15,
    seed: int = 0,
    train: str = "train",
    validation: str = "validation",
) -> datasets.DatasetDict:
    """The splits with a validation split: their own, or a share of train, always the same one for a seed.

    ``train_val_split``: the share of train in (0, 1) that is split off; 0.15 is the default of transformers'
    run_object_detection.py. ``train`` and ``validation``: the names of the two splits.
    """
    if validation in splits:
        return splits
    if train not in splits:
        raise ValueError(
            f"The data set has the splits {list(splits)}: there is no {train} to split a validation set off."
        )
    if not 0 < train_val_split < 1 or len(splits[train]) < 2:
        raise ValueError(
            f"`train_val_split` is {train_val_split} and {train} has {len(splits[train])} images: a share between 0 "
            "and 1 of at least two images is needed. Give the data set a validation split."
        )
    parts = splits[train].train_test_split(train_val_split, seed=seed)
    return datasets.DatasetDict({**splits, train: parts["train"], validation: parts["test"]})


def _check_choice(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = get_close_matches(str(value).replace("normalised", "normalized"), allowed, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ValueError(f"`{argument}` is {value!r}, but must be one of {', '.join(allowed)}.{hint}")


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_datasets(folder, name, config_name, cache_dir, revision, token) -> dict[str, datasets.Dataset]:
    if folder.is_dir() and _is_saved(folder):
        loaded = datasets.load_from_disk(str(folder))
    else:
        cache = None if cache_dir is None else str(cache_dir)
        loaded = datasets.load_dataset(
            str(folder) if folder.exists() else name, config_name, cache_dir=cache, revision=revision, token=token
        )
    loaded = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    # `save_to_disk` keeps numpy's, torch's, ...
    return {name: split.with_format(None) for name, split in loaded.items()}


def _stop_at(findings: list[Finding]) -> None:
    """Raise what can't be read; tell the rest."""
    stopping = [finding for finding in findings if finding.action == "stop"]
    for finding in findings:
        if finding.action != "stop":
            logger.warning("%s", finding)
    findings.clear()
    if stopping:
        raise DatasetError(stopping)
