"""Look at a data set before training on it: counts, sizes, classes, problems by file and row, and a sheet of images.

    python scripts/inspect_data.py --dataset_name DATA --output_dir runs/data

Writes data.json and one sheet_<split>.png per split; prints the tables. Ends with code 1 where something would stop a
training run (`--strict true`: where anything at all was found).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..data import DatasetError, DetectionDataset, Finding, check_dataset, keep_classes, load_detection_dataset
from ..data.schema import class_names_of
from ..reporting.boxes import draw_dataset
from ..reporting.table import text_table
from .arguments import DatasetArguments, parse
from .setup import write_json

SMALL, MEDIUM = 32**2, 96**2
"""COCO's limits of small and medium objects, in square pixels of the original image."""

UNREADABLE = frozenset({"missing or unreadable image", "truncated image"})
"""What the checks call images that can't be drawn."""

QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


@dataclass
class InspectArguments(DatasetArguments):
    """Which data, and what is written of it."""

    output_dir: str = field(default="runs/data", metadata={"help": "Folder for data.json and the sheets."})
    sheet_images: int = field(default=12, metadata={"help": "Images on each sheet; 0: no sheets."})
    listed: int = field(default=20, metadata={"help": "Problems printed; data.json has all."})
    strict: bool = field(default=False, metadata={"help": "Count repairable findings as problems too."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token; by default the one you logged in with."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``data.json``.

    Raises:
        SystemExit: with code 1, where the data set can't be trained on as it is; the files are written all the same.
    """
    (arguments,) = parse((InspectArguments,), argv, __doc__)
    try:
        splits = load_detection_dataset(
            arguments.dataset_name,
            config_name=arguments.dataset_config_name,
            format=arguments.dataset_format,
            bbox_format=arguments.bbox_format,
            cache_dir=arguments.cache_dir,
            token=arguments.token,
        )
    except DatasetError as error:  # the annotation files themselves are wrong
        results, sheets = {"trainable": False, "splits": {}, "problems": _written(error.findings)}, []
        write_json(results, Path(arguments.output_dir) / "data.json")
    else:
        if arguments.classes:
            splits = keep_classes(splits, arguments.classes)
        results, sheets = inspect(splits, Path(arguments.output_dir), arguments.sheet_images, arguments.strict)
    print(tables(results, arguments.listed))
    print(f"\nwritten to {arguments.output_dir}: {', '.join(['data.json', *sheets])}")
    if not results["trainable"]:
        print("\nThe data set can't be trained on as it is: see the problems above.")
        sys.exit(1)
    return results


def inspect(
    splits: datasets.DatasetDict, output: Path, sheet_images: int = 12, strict: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Counts, sizes, classes and problems of a data set, written to ``data.json``, and sheets of its splits.

    Returns:
        the numbers, and the names of the sheets. Images that can't be read are on none.
    """
    findings, trainable = _findings(splits, strict)
    unreadable = {finding.row for finding in findings if finding.problem in UNREADABLE}
    results = {
        "trainable": trainable,
        "splits": {name: split_numbers(split) for name, split in splits.items() if len(split)},
        "problems": _written(findings),
    }
    sheets = []
    for name, split in splits.items():
        readable = [index for index in range(len(split)) if f"{name} row {index}" not in unreadable]
        number = min(sheet_images, len(readable))
        if number:
            indices = sorted({readable[round(index)] for index in np.linspace(0, len(readable) - 1, number)})
            sheets.append(f"sheet_{name}.png")
            draw_dataset(DetectionDataset(split), indices, output / sheets[-1])
    write_json(results, output / "data.json")
    return results, sheets


def _written(findings: Iterable[Finding]) -> list[dict[str, str]]:
    return [{**asdict(finding), "value": str(finding.value)} for finding in findings]


def _findings(splits: datasets.DatasetDict, strict: bool) -> tuple[list[Finding], bool]:
    """Everything the checks find, and whether the data set can be trained on.

    The checks raise with what stops a run; a check of the set that tolerates nothing lists the rest too.
    """
    try:
        check_dataset(splits, strict=True)
    except DatasetError as error:
        findings = sorted(error.findings, key=lambda finding: finding.action != "stop")
        return findings, not strict and all(finding.action != "stop" for finding in findings)
    return [], True


def split_numbers(split: datasets.Dataset) -> dict[str, Any]:
    """Of one split: images, objects, sizes and classes."""
    names = class_names_of(split)
    objects = split["objects"]
    width, height = np.array(split["width"]), np.array(split["height"])
    per_image = np.array([len(image["category"]) for image in objects])
    category = np.array([label for image in objects for label in image["category"]], dtype=int)
    crowd = np.array([flag for image in objects for flag in image["iscrowd"]], dtype=bool)
    box = np.array([size for image in objects for size in image["bbox"]], dtype=float).reshape(-1, 4)[~crowd]
    area = box[:, 2] * box[:, 3]
    annotated = np.array([size for image in objects for size in image["area"]], dtype=float)[~crowd]
    of_image = np.repeat(width * height, per_image)[~crowd]
    count = Counter(category[~crowd].tolist())
    images_with = Counter(label for image in objects for label in set(image["category"]))
    return {
        "images": len(split),
        "images_without_objects": int((per_image == 0).sum()),
        "objects": int((~crowd).sum()),
        "crowd_regions": int(crowd.sum()),
        "objects_per_image": _quantiles(per_image),
        "image_width": _quantiles(width),
        "image_height": _quantiles(height),
        "image_sizes": dict(
            Counter(f"{w}x{h}" for w, h in zip(width.tolist(), height.tolist(), strict=True)).most_common(5)
        ),
        "box_width": _quantiles(box[:, 2]),
        "box_height": _quantiles(box[:, 3]),
        "box_share_of_image": _quantiles(area / of_image),
        "box_aspect_ratio": _quantiles(box[:, 2] / np.maximum(box[:, 3], 1e-9)),
        # By the annotated area, as AP of small, medium and large objects goes
        "small": int((annotated < SMALL).sum()),
        "medium": int(((annotated >= SMALL) & (annotated < MEDIUM)).sum()),
        "large": int((annotated >= MEDIUM).sum()),
        "classes": {
            name: {
                "objects": count[index],
                "images": images_with[index],
                "share": round(count[index] / max(1, (~crowd).sum()), 4),
            }
            for index, name in enumerate(names)
        },
        "imbalance": round(max(count.values()) / min(count.values()), 1) if count else None,
        "classes_without_objects": [name for index, name in enumerate(names) if not count[index]],
    }


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    if not len(values):
        return None
    return {name: round(float(np.quantile(values, share)), 4) for name, share in QUANTILES.items()}


def tables(results: dict[str, Any], listed: int = 20) -> str:
    """The numbers as text: splits, sizes, classes, problems."""
    splits = results["splits"]
    if not splits:
        return _problems(results["problems"], listed)
    counts = ("images", "images_without_objects", "objects", "crowd_regions", "small", "medium", "large")
    rows = [[name, *(str(numbers[count]) for count in counts)] for name, numbers in splits.items()]
    parts = [text_table(["split", "images", "without objects", "objects", "crowds", "small", "medium", "large"], rows)]
    sizes = (
        ("objects per image", "objects_per_image"),
        ("image width", "image_width"),
        ("image height", "image_height"),
        ("box width", "box_width"),
        ("box height", "box_height"),
        ("box share of image", "box_share_of_image"),
        ("box width / height", "box_aspect_ratio"),
    )
    for name, numbers in splits.items():
        rows = [
            [title, *(f"{value:.4g}" for value in numbers[key].values())]
            for title, key in sizes
            if numbers[key] is not None
        ]
        parts.append(text_table([name, *QUANTILES], rows))
    labels = dict.fromkeys(label for numbers in splits.values() for label in numbers["classes"])
    rows = [
        [label, *(str(numbers["classes"].get(label, {"objects": 0})["objects"]) for numbers in splits.values())]
        for label in labels
    ]
    parts.append(text_table(["objects of class", *splits], rows))
    for name, numbers in splits.items():
        if numbers["classes_without_objects"]:
            parts.append(f"{name}: no object of {', '.join(numbers['classes_without_objects'])}")
        if numbers["imbalance"] is not None and numbers["imbalance"] >= 10:
            parts.append(
                f"{name}: the most frequent class has {numbers['imbalance']:g} times the objects of the rarest"
            )
    parts.append(_problems(results["problems"], listed))
    return "\n\n".join(parts)


def _problems(problems: list[dict[str, str]], listed: int) -> str:
    if not problems:
        return "nothing wrong was found"
    kinds = Counter((problem["action"], problem["problem"]) for problem in problems)
    lines = [f"{sum(kinds.values())} findings", *(f"  {action}: {name} ({n}x)" for (action, name), n in kinds.items())]
    lines += [str(Finding(**problem)) for problem in problems[:listed]]
    if len(problems) > listed:
        lines.append(f"... and {len(problems) - listed} more in data.json")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
