"""Is this data set what it says it is? Every image's header and every box is looked at before the first step."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TypeVar

import datasets
from tqdm.auto import tqdm

from .box_checks import Boxes, object_lists
from .findings import DatasetError, Finding, Report
from .images import is_truncated, name_of, read_header
from .schema import category_feature

Splits = TypeVar("Splits", datasets.Dataset, datasets.DatasetDict)

LONG = 5000
"""Images from which on the check shows a progress bar: about a second."""


def check_dataset(dataset: Splits, *, strict: bool = False) -> tuple[Splits, Report]:
    """The data set with what could safely be repaired, and what was found.

    Images are judged by their headers (a file that lacks its end marker is decoded), boxes all at once, so that the
    check takes well under a millisecond an image.

    Stops the run: missing, unreadable, truncated images, more than 8 bits a channel, a declared size the file doesn't
    have; boxes that are not finite, negative, outside the image, all normalised, or in another format; unknown
    classes; image ids used twice in a split; an empty split, and a train or validation split without objects.
    Repaired: boxes that reach over the image's edge are clipped, zero-area boxes dropped, areas missing or larger than
    the box made the box's; images in grey, palette, CMYK or with alpha are converted to RGB and EXIF rotations
    resolved when they are read. Noted: class names that differ only in case or spaces, one file in two splits, a test
    split without objects.

    Args:
        dataset: a split or all of them, in the schema of `load_detection_dataset`.
        strict: stop at every finding, repairs and notes included.

    Raises:
        DatasetError: something stops the run; all findings are in its ``findings``.
    """
    splits = dataset if isinstance(dataset, dict) else {str(dataset.split or "data"): dataset}
    if not splits:
        raise DatasetError([Finding("no splits", "the data set", "-", {})])
    findings = _check_class_names(splits)
    files: dict[str, list[str]] = {}
    repaired: dict[str, datasets.Dataset] = {}
    for name, split in splits.items():
        if len(split) == 0:
            findings.append(Finding("empty split", name, "-", "0 images", advice="is the path to its images right?"))
            continue
        found, files[name] = _check_images(name, split)
        findings += found
        boxes = Boxes.of(name, split, files[name])
        found, keep = boxes.check()
        findings += found
        repairable = found and all(finding.action != "stop" for finding in found)
        repaired[name] = boxes.rebuild(split, keep) if repairable else split
    findings += _check_shared_files(files)
    stopping = [finding for finding in findings if strict or finding.action == "stop"]
    if stopping:
        raise DatasetError(stopping, strict)
    objects = sum(len(ids) for split in repaired.values() for ids in object_lists(split, "id"))
    report = Report(tuple(findings), sum(map(len, repaired.values())), objects)
    if isinstance(dataset, dict):
        return datasets.DatasetDict(repaired), report
    return next(iter(repaired.values())), report


def _check_class_names(splits: dict[str, datasets.Dataset]) -> list[Finding]:
    """Names that differ only in case or spaces are usually one class; classes that differ between splits always are
    wrong."""
    findings = []
    first, *others = splits
    names = category_feature(splits[first]).names
    for other in others:
        if category_feature(splits[other]).names != names:
            value = {first: names, other: category_feature(splits[other]).names}
            findings.append(Finding("splits with different classes", other, "classes", value))
    alike = defaultdict(list)
    for name in names:
        alike[" ".join(name.replace("_", " ").split()).casefold()].append(name)
    for same in alike.values():
        if len(same) > 1:
            problem, advice = "class names that differ only in case or spaces", "one class, if it is a slip of spelling"
            findings.append(Finding(problem, "the data set", "classes", same, "noted", advice))
    return findings


def _check_shared_files(files: dict[str, list[str]]) -> list[Finding]:
    """Files on disk that are in two splits: the score on one is then partly learnt by heart."""
    findings, place = [], {}
    for name, paths in files.items():
        for index, path in enumerate(paths):
            first = place.setdefault(path, name)
            if first != name and os.path.isabs(path):  # embedded images have a name at most
                findings.append(Finding("image in two splits", path, f"{name} row {index}", [first, name], "noted"))
    return findings


def _check_images(name: str, split: datasets.Dataset) -> tuple[list[Finding], list[str]]:
    """Findings, and what each image is called. One image at a time is in memory."""
    findings: list[Finding] = []
    files: list[str] = []
    first_row: dict[int, int] = {}
    rows = split.select_columns(["image", "image_id", "width", "height"])
    rows = rows.cast_column("image", datasets.Image(decode=False))
    for index, row in enumerate(tqdm(rows, "checking", disable=len(rows) < LONG)):
        file, image_id, where = row["image"], row["image_id"], f"{name} row {index}"
        files.append(name_of(file))
        if first_row.setdefault(image_id, index) != index:
            advice = f"row {first_row[image_id]} has it too"
            findings.append(Finding("image id used twice", files[-1], where, image_id, advice=advice))
        finding = _check_image(file, files[-1], where, row["width"], row["height"])
        if finding is not None:
            findings.append(finding)
    return findings, files


def _check_image(file: dict, where: str, row: str, width: int, height: int) -> Finding | None:
    try:
        header = read_header(file)
        if is_truncated(file):
            return Finding("truncated image", where, row, f"{header.width}x{header.height} {header.mode}")
    except (OSError, TypeError) as error:
        return Finding("missing or unreadable image", where, row, error)
    stored = (header.width, header.height)
    if (width, height) not in (stored, header.upright):
        advice = "the boxes belong to another version of this image, or the declared size is wrong"
        value = f"declared {width}x{height}, the file has {header.width}x{header.height}"
        return Finding("image of another size than declared", where, row, value, advice=advice)
    if header.is_deep:
        advice = "bring it to 8 bits with the contrast you want"
        return Finding("more than 8 bits a channel", where, row, header.mode, advice=advice)
    if header.orientation != 1:
        if stored == header.upright:
            advice = "turned upright, as viewers show it: the size can't tell in which orientation the boxes are"
        elif header.is_turned(width, height):
            advice = f"turned upright: the boxes are declared for {width}x{height}"
        else:
            advice = f"left as stored: the boxes are declared for {width}x{height}"
        return Finding("EXIF rotation", where, row, f"orientation {header.orientation}", "repaired", advice)
    if header.mode != "RGB":
        return Finding("image not in RGB", where, row, header.mode, "repaired", "converted to RGB when read")
    return None
