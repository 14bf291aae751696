"""Training one detector, and writing down what came of it: what distill.py and finetune.py share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor

from ..config import DistillationConfig
from ..detectors import digest
from ..reporting.card import write_card
from ..reporting.curves import plot_curves
from ..reporting.report import write_report
from ..reporting.run import STATE, UNFINISHED, write_state
from ..reporting.sheet import draw_comparison
from ..reporting.table import comparison_table
from ..reporting.writing import Reports, saving_weights
from ..trainer import DistillationTrainer
from .records import StepClock, mean_shares, peak_memory
from .resuming import last_complete_checkpoint
from .setup import Data, write_json


def train(
    model,
    args: DistillationConfig,
    data: Data,
    processor,
    teacher,
    teacher_processor,
    reports: Reports,
    *callbacks: TrainerCallback,
) -> tuple[dict, list]:
    """Trains one detector and evaluates it on the validation and test splits.

    Returns:
        the row for ``results.json`` and the log history.
    """
    initial, clock, peak_before = digest(model), StepClock(), peak_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        teacher_processing_class=teacher_processor,
        callbacks=[clock, *callbacks],
    )
    start = time.perf_counter()
    with saving_weights(args.output_dir, lambda: last_complete_checkpoint(Path(args.output_dir))):
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        seconds = time.perf_counter() - start
        trainer.save_model(_internal_call=True)  # which doesn't push: first everything is written
    if args.should_save:
        with reports.writing(STATE):
            write_state(trainer.state, args.output_dir)
    validation = trainer.evaluate(metric_key_prefix="validation")
    test = trainer.evaluate(data.test, metric_key_prefix="test")
    peak = peak_memory()
    row = {
        "method": "+".join(args.method),
        "model_type": model.config.model_type,
        "initial_digest": initial,
        "parameters": model.num_parameters(),
        "steps": result.global_step,
        "train_seconds": round(seconds, 1),
        "step_seconds": clock.typical(),
        # A process has one peak: of its second training only where that is higher
        "peak_memory_MiB": round(peak, 1) if torch.cuda.is_available() or peak > peak_before else None,
        "gradient_shares": mean_shares(trainer.state.log_history),
        "curve": [[log["step"], log["eval_map"]] for log in trainer.state.log_history if "eval_map" in log],
        "resumed_from": args.resume_from_checkpoint,
        "validation": {name.removeprefix("validation_"): value for name, value in validation.items()},
        "test": {name.removeprefix("test_"): value for name, value in test.items()},
    }
    for split, metrics in (("train", result.metrics), ("validation", validation), ("test", test)):
        with reports.writing(f"{split}_results.json"):
            trainer.save_metrics(split, metrics, combined=False)
    if args.should_save:
        # Trainer's own would read the file before it writes it, and fail for good after a disk was full
        with reports.writing("all_results.json"):
            write_json({**result.metrics, **validation, **test}, Path(args.output_dir) / "all_results.json")
    return row, trainer.state.log_history


def write_down(
    results: Mapping[str, Any],
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]],
    histories: Mapping[str, list],
    data: Data,
    args: DistillationConfig,
    reports: Reports,
    say: Callable[[str], None],
) -> None:
    """Results, curves, image sheet, report and card in the output folder, and the table of AP for the reader.

    Args:
        models: by role, for the sheet.
        histories: by role, the log history of those that were trained.
    """
    output = Path(args.output_dir)
    with reports.writing("results.json"):
        write_json(results, output / "results.json")
        (output / UNFINISHED).unlink(missing_ok=True)
    with reports.writing("curves.png"):
        plot_curves(histories, output / "curves.png")
    if args.sheet_images:
        with reports.writing("sheet.png"):
            draw_comparison(models, data.test, output / "sheet.png", number=args.sheet_images)
    with reports.writing("report.html"):
        write_report(output)
    with reports.writing("README.md"):
        write_card(output, results)
    measured = {role: results[role]["test"] for role in ("teacher", "twin", "student", "model") if results.get(role)}
    files = ("results.json", "report.html", "curves.png", "sheet.png", "README.md")
    written = ["model", *(name for name in files if (output / name).is_file())]  # a short run has logged no curve
    say(
        f"\nCOCO AP on {data.test_split}, in points\n{comparison_table(measured)}\n\nwritten to {output}: {', '.join(written)}"
    )
