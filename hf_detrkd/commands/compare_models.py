"""Trained detectors side by side on one split: what each finds, what it costs, and in which images they differ.

    python scripts/compare_models.py --run runs/student --output_dir runs/comparison
    python scripts/compare_models.py --models teacher=PATH twin=PATH student=PATH --dataset_name DATA --split test

--run takes the output folder of a distillation run: teacher, twin and student, and the data they were measured on. Models are
folders or Hub ids. Gains are over the twin, or else the first model (--baseline). Written: comparison.md, comparison.json,
precision_recall.png, precision_recall_classes.png, gains.png, latency.png, and differences.png: the images in which the baseline
and the student (--candidate) differ most in missed objects and false detections.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data import DetectionDataset
from ..data.dataset import target_of
from ..evaluation.bootstrap import interval, resampled_ap
from ..evaluation.coco_detection.coco_evaluator import AREAS, CocoEvaluator, Tables
from ..evaluation.cost import ROUNDS, cost_rows, environment
from ..evaluation.detector import evaluated
from ..evaluation.streaming import flatten
from ..reporting import comparison
from ..reporting.differences import caption, most_different
from ..reporting.precision_recall import plot_class_curves, plot_precision_recall
from ..reporting.sheet import Counts, Scene, SheetRow, best_threshold, classify, count, draw_sheet
from ..reporting.table import cost_table
from ..reporting.versions import versions
from .arguments import DataArguments, parse
from .places import places, read_run
from .setup import check_part, load_part, write_json

DRAWN_CLASSES = 24
"""The most frequent ones have a place in the pictures; the tables have all."""


@dataclass
class CompareModelsArguments:
    """Which models, and how they are compared."""

    models: list[str] | None = field(
        default=None,
        metadata={"help": "NAME=PLACE of each model, a folder or a Hub id; also overrides those of --run."},
    )
    run: str | None = field(
        default=None,
        metadata={"help": "Output folder of distill.py: its teacher, twin and student, and by default its data."},
    )
    output_dir: str = field(default="runs/comparison", metadata={"help": "Folder for tables and pictures."})
    split: str = field(default="test", metadata={"help": "train, validation or test."})
    baseline: str | None = field(
        default=None, metadata={"help": "Model that gains are over; by default twin, or else the first."}
    )
    candidate: str | None = field(
        default=None,
        metadata={"help": "Model that differences.png sets against it; by default student, or else the last."},
    )
    threshold: float | None = field(
        default=None,
        metadata={"help": "Count and draw boxes with at least this score; by default each model's best by F1."},
    )
    sheet_images: int = field(default=8, metadata={"help": "Images in differences.png; 0: none."})
    resamples: int = field(default=1000, metadata={"help": "Of the images, for the intervals; 0: no intervals."})
    rounds: int = field(default=ROUNDS, metadata={"help": "Timed calls of each model."})
    batch_size: int = field(default=8, metadata={"help": "Images per step."})
    num_workers: int = field(default=2, metadata={"help": "Processes that load images."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``comparison.json``."""
    words = list(sys.argv[1:] if argv is None else argv)
    data_arguments, arguments = parse((DataArguments, CompareModelsArguments), words, __doc__)
    if arguments.run is not None:
        known = read_run(arguments.run)["settings"]["DataArguments"]
        known = {one.name: known[one.name] for one in fields(DataArguments) if one.name in known}
        (data_arguments, arguments) = parse((DataArguments, CompareModelsArguments), words, __doc__, defaults=known)
    where = places(arguments.run, arguments.models or [])
    baseline, candidate = check(arguments, list(where))
    dataset, split = load_part(arguments.split, data_arguments)
    if not any(objects_by_class(dataset).values()):
        raise ValueError(f"The split {split} of {data_arguments.dataset_name} has no object: there is no AP.")
    header = {
        "command": shlex.join(["hf-detrkd", "compare-models", *words]),
        "dataset": data_arguments.dataset_name,
        "split": split,
        "baseline": baseline,
        "candidate": candidate,
        "threshold": arguments.threshold,
        "resamples": arguments.resamples,
    }
    return compare(header, {name: place.load() for name, place in where.items()}, dataset, arguments)


def check(arguments: CompareModelsArguments, names: list[str]) -> tuple[str, str]:
    """Refuses flags that make no sense; returns the names of baseline and candidate."""
    check_part(arguments.split)
    if len(names) < 2:
        raise ValueError(
            f"A comparison needs two models or more, and there are {names}. Name them with --models NAME=PLACE NAME=PLACE, or a "
            "distillation run's output folder with --run. One model is measured by evaluate.py."
        )
    for flag in ("baseline", "candidate"):
        name = getattr(arguments, flag)
        if name is not None and name not in names:
            raise ValueError(f"--{flag} is {name!r}; the models are {', '.join(names)}.")
    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold is {arguments.threshold}; a score is between 0 and 1.")
    for flag, least in (("sheet_images", 0), ("resamples", 0), ("rounds", 1), ("batch_size", 1)):
        if getattr(arguments, flag) < least:
            raise ValueError(f"--{flag} is {getattr(arguments, flag)}; it must be {least} or more.")
    baseline = arguments.baseline or ("twin" if "twin" in names else names[0])
    others = [name for name in names if name != baseline]
    candidate = arguments.candidate or ("student" if "student" in others else others[-1])
    if candidate == baseline:
        raise ValueError(f"--baseline and --candidate are both {baseline!r}; their differences are to be shown.")
    return baseline, candidate


def compare(
    header: Mapping[str, Any],
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]],
    dataset: DetectionDataset,
    arguments: CompareModelsArguments,
) -> dict[str, Any]:
    """Measures the models, writes tables and pictures, and returns the numbers; ``header`` begins them."""
    evaluators, tables = {}, {}
    for name, (model, processor) in models.items():
        evaluators[name] = evaluated(
            model, processor, dataset, batch_size=arguments.batch_size, num_workers=arguments.num_workers
        )
        tables[name] = evaluators[name].tables()
        print(f"{name}: {len(dataset)} images done")
    costs = cost_rows(dict(models), arguments.rounds, dataset[0]["image"])
    scenes = scenes_of(evaluators, dataset)
    thresholds, counts = {}, {}
    for name in models:
        thresholds[name], counts[name] = counted(scenes, name, arguments.threshold)
    results = {
        **header,
        "images": len(dataset),
        "objects": objects_by_class(dataset),
        "models": {
            name: {
                "name_or_path": model.name_or_path,
                "model_type": model.config.model_type,
                **costs[name],
                **accuracy(tables[name]),
                "score_from": thresholds[name],
                "counts": asdict(sum(counts[name], Counts(0, 0, 0))),
            }
            for name, (model, _) in models.items()
        },
        "environment": environment(next(iter(models.values()))[0].device),
        "versions": versions(),
    }
    results["gains"] = gains(results, evaluators, arguments.resamples)
    output = Path(arguments.output_dir)
    pictures = draw(results, tables, output)
    path = output / "differences.png"
    results["differences"] = draw_differences(results, dataset, scenes, counts, path, arguments.sheet_images)
    if results["differences"]:
        pictures.append(path.name)
    write_json(results, output / "comparison.json")
    (output / "comparison.md").write_text(
        comparison.page(results, cost_table(costs, markdown=True), pictures), encoding="utf-8"
    )
    print(f"\n{comparison.text(results, cost_table(costs))}")
    print(f"\nwritten to {output}: {', '.join(['comparison.md', 'comparison.json', *pictures])}")
    return results


def accuracy(tables: Tables) -> dict[str, dict[str, float]]:
    """``metrics`` as `evaluate` has them, and AP in [0, 1] by ``sizes`` and ``classes``; without what has no object."""
    metrics = tables.metrics()
    sizes = {name: metrics[f"map_{name}"] for name in AREAS if name != "all"}
    groups = {"sizes": sizes, "classes": metrics["map_per_class"]}
    present = {
        group: {name: value for name, value in values.items() if not math.isnan(value)}
        for group, values in groups.items()
    }
    return {"metrics": flatten(metrics), **present}


def gains(
    results: Mapping[str, Any], evaluators: Mapping[str, CocoEvaluator], resamples: int
) -> dict[str, dict[str, float | None]]:
    """By model, but for the baseline: AP over the baseline's in [0, 1], and the ends of its interval over the images."""
    names, baseline = list(evaluators), results["baseline"]
    drawn = resampled_ap(list(evaluators.values()), resamples) if resamples else None
    rows = {}
    for name in names:
        if name != baseline:
            low = high = None
            if drawn is not None:
                low, high = interval(drawn[:, names.index(name)] - drawn[:, names.index(baseline)])
            value, base = (results["models"][one]["metrics"].get("map", math.nan) for one in (name, baseline))
            rows[name] = {"map": value - base, "low": low, "high": high}
    return rows


def objects_by_class(dataset: DetectionDataset) -> dict[str, int]:
    """How many a split has, crowds aside; the most frequent class first."""
    count = Counter({name: 0 for name in dataset.class_names})
    for objects in dataset.split["objects"]:
        labels = zip(objects["category"], objects["iscrowd"], strict=True)
        count.update(dataset.id2label[label] for label, crowd in labels if not crowd)
    return dict(count.most_common())


def scenes_of(evaluators: Mapping[str, CocoEvaluator], dataset: DetectionDataset) -> list[Scene]:
    """The objects of all images, without pixels, and what each model found in them."""
    scenes = []
    for row in dataset.split.select_columns(["image_id", "objects"]):
        target = target_of(row)
        found = {name: evaluator[row["image_id"]][0] for name, evaluator in evaluators.items()}
        scenes.append(
            Scene(
                boxes=target["boxes"],
                labels=target["labels"],
                crowd=target["iscrowd"].bool(),
                detections={
                    name: {
                        "boxes": torch.from_numpy(one["boxes"]).float(),
                        "scores": torch.from_numpy(one["scores"]).float(),
                        "labels": torch.from_numpy(one["labels"]),
                    }
                    for name, one in found.items()
                },
            )
        )
    return scenes


def counted(scenes: Sequence[Scene], name: str, threshold: float | None) -> tuple[float, list[Counts]]:
    """The score from which on a model's boxes count, the best by F1 where none is given, and the counts of each image."""
    outcomes = [classify(scene, scene.detections[name]) for scene in scenes]
    least = best_threshold(scenes, name, outcomes) if threshold is None else threshold
    return least, [count(scene, name, outcome, least) for scene, outcome in zip(scenes, outcomes, strict=True)]


def draw(results: Mapping[str, Any], tables: Mapping[str, Tables], output: Path) -> list[str]:
    """Writes the pictures that need no image; returns their names."""
    objects = dict(list(results["objects"].items())[:DRAWN_CLASSES])
    plot_precision_recall(tables, output / "precision_recall.png")
    plot_class_curves(tables, output / "precision_recall_classes.png", objects)
    comparison.plot_gains(results, output / "gains.png", list(objects))
    comparison.plot_latency(results, output / "latency.png")
    return ["precision_recall.png", "precision_recall_classes.png", "gains.png", "latency.png"]


def draw_differences(
    results: Mapping[str, Any],
    dataset: DetectionDataset,
    scenes: Sequence[Scene],
    counts: Mapping[str, Sequence[Counts]],
    path: Path,
    number: int,
) -> list[dict[str, Any]]:
    """Writes the sheet of the images in which baseline and candidate differ most, if they differ in any.

    Returns:
        per image on it ``image_id`` and, by model, ``counts``.
    """
    baseline, candidate = results["baseline"], results["candidate"]
    rows, chosen = [], []
    for index in most_different(counts[baseline], counts[candidate], number):
        item = dataset[index]
        of_models = {name: of_images[index] for name, of_images in counts.items()}
        image_id = int(item["target"]["image_id"])
        chosen.append({"image_id": image_id, "counts": {name: asdict(one) for name, one in of_models.items()}})
        text = f"image {image_id}\n{caption(baseline, of_models[baseline], candidate, of_models[candidate])}"
        rows.append(SheetRow(**vars(scenes[index]), image=item["image"], caption=text))
    if rows:
        thresholds = {name: model["score_from"] for name, model in results["models"].items()}
        draw_sheet(rows, path, class_names=dataset.id2label, threshold=thresholds)
    return chosen


if __name__ == "__main__":
    main()
