"""Distil a teacher into a student, both DETR-like detectors of transformers.

    accelerate launch scripts/distill.py \\
        --teacher_model_name_or_path TEACHER --model_name_or_path STUDENT \\
        --dataset_name DATA --output_dir runs/student --method kd_detr --with_twin true

TEACHER and STUDENT are local folders or Hub ids, DATA is a folder (COCO, YOLO, Pascal VOC, imagefolder), a Hub id or
`shapes`. Every field of DistillationConfig (all of TrainingArguments and the settings of distillation) is a flag.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedModel, set_seed

from ..config import DistillationConfig
from ..evaluation.detector import evaluate_detector
from ..reporting.curves import plot_curves
from ..reporting.sheet import draw_comparison
from ..reporting.table import comparison_table
from ..students import inherit
from ..trainer import DistillationTrainer, load_detector
from .arguments import DataArguments, ModelArguments, parse
from .setup import Data, augment, build_detector, build_image_processor, load_data, write_json


@dataclass
class DistillArguments:
    """What else a distillation run does."""

    with_twin: bool = field(
        default=False,
        metadata={"help": "Also train the twin: the same student, data, seed and schedule without the teacher."},
    )
    teacher_image_processor_name: str | None = field(
        default=None, metadata={"help": "The teacher's image processor, where it is not beside the teacher."}
    )
    inherit_from_teacher: bool = field(
        default=False,
        metadata={"help": "Student (and twin) start from the teacher's weights wherever name and shape agree."},
    )
    sheet_images: int = field(default=8, metadata={"help": "Images on the sheet of detections; 0: no sheet."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``results.json``."""
    model_arguments, data_arguments, extra, args = parse(
        (ModelArguments, DataArguments, DistillArguments, DistillationConfig), argv, __doc__
    )
    return distill(model_arguments, data_arguments, extra, args)


def distill(
    model_arguments: ModelArguments, data_arguments: DataArguments, extra: DistillArguments, args: DistillationConfig
) -> dict[str, Any]:
    """Student, and where asked for its twin, from flags to ``results.json``, curves and an image sheet."""
    say = print if args.should_log else (lambda *_: None)
    output = Path(args.output_dir)
    args.resume_from_checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, output)
    with args.main_process_first(desc="data set"):
        data = load_data(data_arguments, args.seed, say, model_arguments.cache_dir, model_arguments.token)

    teacher = teacher_processor = None
    if args.method != ["none"]:
        teacher_path = args.teacher_model_name_or_path
        if teacher_path is None:
            raise ValueError("--teacher_model_name_or_path is missing; without a teacher use --method none.")
        options = dict(
            args.teacher_model_init_kwargs or {}, cache_dir=model_arguments.cache_dir, token=model_arguments.token
        )
        if args.teacher_model_revision is not None:
            options["revision"] = args.teacher_model_revision
        teacher = load_detector(teacher_path, **options)
        teacher_processor = AutoImageProcessor.from_pretrained(extra.teacher_image_processor_name or teacher_path)

    def build() -> PreTrainedModel:
        set_seed(args.seed)  # student and twin start from the same weights
        model = build_detector(model_arguments, data.train.id2label)
        if extra.inherit_from_teacher:
            if teacher is None:
                raise ValueError("--inherit_from_teacher needs a teacher, and --method none has none.")
            say(f"{inherit(model, teacher)} tensors inherited from the teacher")
        return model

    student = build()
    processor = build_image_processor(model_arguments, student)
    augment(data, data_arguments, processor, teacher_processor)
    results: dict[str, Any] = {"teacher": None, "twin": None}
    if teacher is not None:
        results["teacher"] = {
            "name_or_path": teacher.name_or_path,
            "parameters": teacher.num_parameters(),
            "test": evaluate_detector(
                teacher,
                teacher_processor,
                data.test,
                batch_size=args.per_device_eval_batch_size,
                num_workers=args.dataloader_num_workers,
                mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no",
            ),
        }
        say(f"teacher on {data.test_split}: AP {100 * results['teacher']['test']['map']:.1f}")

    runs = {"student": (student, args, teacher)}
    if extra.with_twin and teacher is not None:
        runs["twin"] = (build(), twin_of(args), None)
    histories, models = {}, {} if teacher is None else {"teacher": (teacher, teacher_processor)}
    for role, (model, arguments, its_teacher) in runs.items():
        say(f"\n{role}: {model.num_parameters() / 1e6:.2f} M parameters, method {'+'.join(arguments.method)}")
        results[role], histories[role] = train(model, arguments, data, processor, its_teacher, teacher_processor)
        models[role] = (model, processor)

    results |= {"settings": settings(model_arguments, data_arguments, extra, args), "versions": versions()}
    if args.should_save:
        write_json(results, output / "results.json")
        plot_curves(histories, output / "curves.png")
        if extra.sheet_images:
            draw_comparison(models, data.test, output / "sheet.png", number=extra.sheet_images)
        table = comparison_table(
            {role: results[role]["test"] for role in ("teacher", "twin", "student") if results.get(role)}
        )
        say(
            f"\nCOCO AP on {data.test_split}, in points\n{table}\n\nwritten to {output}: model, results.json, curves.png, sheet.png"
        )
    return results


def train(model, args: DistillationConfig, data: Data, processor, teacher, teacher_processor) -> tuple[dict, list]:
    """Trains one detector and evaluates it on the validation and test splits.

    Returns:
        the row for ``results.json`` and the log history.
    """
    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=processor,
        teacher_processing_class=teacher_processor,
    )
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - start
    trainer.save_model()
    trainer.save_state()
    validation = trainer.evaluate(metric_key_prefix="validation")
    test = trainer.evaluate(data.test, metric_key_prefix="test")
    row = {
        "method": "+".join(args.method),
        "parameters": model.num_parameters(),
        "steps": result.global_step,
        "train_seconds": round(seconds, 1),
        "resumed_from": args.resume_from_checkpoint,
        "validation": {name.removeprefix("validation_"): value for name, value in validation.items()},
        "test": {name.removeprefix("test_"): value for name, value in test.items()},
    }
    for split, metrics in (("train", result.metrics), ("validation", validation), ("test", test)):
        trainer.save_metrics(split, metrics)
    return row, trainer.state.log_history


def twin_of(args: DistillationConfig) -> DistillationConfig:
    """The same settings without a teacher, in the folder ``twin`` of the output folder."""
    twin = copy.deepcopy(args)
    twin.method, twin.method_config, twin.teacher_model_name_or_path = ["none"], None, None
    twin.output_dir = str(Path(args.output_dir) / "twin")
    twin.push_to_hub = False
    if args.resume_from_checkpoint is not None:
        twin.resume_from_checkpoint = last_complete_checkpoint(Path(twin.output_dir))
    return twin


def checkpoint_to_resume(wish: str | None, output: Path) -> str | None:
    """The checkpoint to go on from.

    ``"true"`` means the last complete one in the output folder, if there is one; a path means that one.

    Raises:
        ValueError: the output folder has checkpoints of an earlier run and nothing was said about them.
    """
    last = last_complete_checkpoint(output)
    if wish is None or str(wish).lower() == "false":
        if last is not None and wish is None:
            raise ValueError(
                f"{output} has checkpoints of an earlier run (the last is {last}). Pass --resume_from_checkpoint true to "
                "go on from it, or choose another --output_dir."
            )
        return None
    return last if str(wish).lower() == "true" else str(wish)


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes ``trainer_state.json`` last."""
    complete = [folder.parent for folder in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda folder: int(folder.name.split("-")[-1]))) if complete else None


def settings(*groups) -> dict[str, Any]:
    """All flags of a run, by group."""
    return {
        type(group).__name__: group.to_dict() if isinstance(group, DistillationConfig) else vars(group)
        for group in groups
    }


def versions() -> dict[str, str]:
    """What a result depends on besides the settings."""
    packages = ("hf_detrkd", "torch", "torchvision", "transformers", "accelerate", "datasets", "numpy", "pycocotools")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}",
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
