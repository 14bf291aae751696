"""Measure a detector on a split: COCO metrics as a table and as JSON, with every class.

python scripts/evaluate.py --model_name_or_path CHECKPOINT --dataset_name DATA --split test --output results.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import PartialState

from ..detectors import load_detector
from ..evaluation.detector import evaluate_detector
from ..reporting.table import class_table, comparison_table
from ..reporting.versions import versions
from .arguments import DataArguments, ModelArguments, parse
from .setup import build_image_processor, check_part, load_part, write_json


@dataclass
class EvaluateArguments:
    """How the detector is measured."""

    split: str = field(default="test", metadata={"help": "train, validation or test."})
    batch_size: int = field(default=8, metadata={"help": "Images per step and process."})
    num_workers: int = field(default=2, metadata={"help": "Processes that load images."})
    backend: str = field(
        default="auto", metadata={"help": "pycocotools, faster_coco_eval, or auto: the faster one installed."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the metrics."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``--output``."""
    model_arguments, data_arguments, extra = parse((ModelArguments, DataArguments, EvaluateArguments), argv, __doc__)
    check_part(extra.split)
    if model_arguments.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the detector to measure.")
    model_arguments.refuse_building()
    main_process = PartialState().is_main_process  # under accelerate launch one speaks and writes for all
    say = print if main_process else (lambda *_: None)
    dataset, split = load_part(
        extra.split, data_arguments, say, cache_dir=model_arguments.cache_dir, token=model_arguments.token
    )
    model = load_detector(model_arguments.model_name_or_path, **model_arguments.hub())
    processor = build_image_processor(model_arguments, model)
    metrics = evaluate_detector(
        model, processor, dataset, batch_size=extra.batch_size, num_workers=extra.num_workers, backend=extra.backend
    )
    say(f"\nCOCO AP on {split} ({len(dataset)} images), in points")
    say(comparison_table({model.name_or_path: metrics}))
    say(class_table(metrics))
    results = {
        "model": model.name_or_path,
        "dataset": data_arguments.dataset_name,
        "split": split,
        "images": len(dataset),
        "metrics": metrics,
        "versions": versions(),
    }
    if extra.output is not None and main_process:
        write_json(results, extra.output)
        say(f"written to {extra.output}")
    return results


if __name__ == "__main__":
    main()
