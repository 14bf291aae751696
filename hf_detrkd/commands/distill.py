"""Distil a teacher into a student, both DETR-like detectors of transformers.

    accelerate launch scripts/distill.py \\
        --teacher_model_name_or_path TEACHER --model_name_or_path STUDENT \\
        --dataset_name DATA --output_dir runs/student --method kd_detr --with_twin true

    accelerate launch scripts/distill.py --teacher_model_name_or_path TEACHER --student_backbone resnet18 \\
        --student_decoder_layers 3 --dataset_name DATA --output_dir runs/student --with_twin true

The second makes the student from the teacher (make_student.py), with the teacher's weights wherever they fit.
TEACHER and STUDENT are local folders or Hub ids, DATA is a folder (COCO, YOLO, Pascal VOC, imagefolder), a Hub id or
`shapes`. Every field of DistillationConfig (all of TrainingArguments and the settings of distillation) is a flag.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import AutoImageProcessor, PreTrainedModel, TrainerCallback, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from ..config import DistillationConfig
from ..detectors import digest, load_detector
from ..evaluation.cost import environment
from ..evaluation.detector import evaluate_detector
from ..families import adapter_for
from ..labels import LabelMap
from ..methods import settled
from ..publishing import finish, open_repository, repository_of
from ..reporting.card import write_card
from ..reporting.curves import plot_curves
from ..reporting.live import WriteReport
from ..reporting.report import write_report
from ..reporting.run import STATE, TWIN, UNFINISHED, write_state
from ..reporting.sheet import draw_comparison
from ..reporting.table import comparison_table
from ..reporting.writing import Reports, saving_weights
from ..students import inherit, make_student
from ..trainer import DistillationTrainer
from .arguments import DataArguments, ModelArguments, StudentArguments, parse
from .gate import finds_nothing, no_better
from .records import (
    StepClock,
    costs_of,
    data_of,
    forget_earlier,
    mean_shares,
    name_run,
    origin,
    peak_memory,
    settings,
    versions,
    write_unfinished,
)
from .setup import Data, augment, build_detector, build_image_processor, load_data, write_json


@dataclass
class DistillArguments(StudentArguments):
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
    evaluate_teacher: bool = field(default=True, metadata={"help": "Measure the teacher too."})
    only_teacher: bool = field(default=False, metadata={"help": "Measure the teacher, and train nothing."})
    license: str | None = field(
        default=None, metadata={"help": "The student's license for its model card, such as apache-2.0."}
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``results.json``."""
    model_arguments, data_arguments, extra, args = parse(
        (ModelArguments, DataArguments, DistillArguments, DistillationConfig), argv, __doc__
    )
    return distill(model_arguments, data_arguments, extra, args)


@dataclass(frozen=True)
class Prepared:
    """What a run is made of."""

    data: Data
    teacher: PreTrainedModel | None
    teacher_processor: BaseImageProcessor | None
    student: PreTrainedModel
    processor: BaseImageProcessor
    build: Callable[[], PreTrainedModel]
    """The student again, from the same weights."""


def prepare(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    extra: DistillArguments,
    args: DistillationConfig,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Data, teacher and student from flags.

    With method none a teacher is loaded where one is named: for the weights that the student inherits, and because the
    size to which augmented images are resized depends on both. So a twin trained alone is the twin of a distilled run.
    """
    with args.main_process_first(desc="data set"):
        data = load_data(data_arguments, args.seed, say, model_arguments.cache_dir, model_arguments.token)
    teacher = teacher_processor = None
    teacher_path = args.teacher_model_name_or_path
    if teacher_path is not None:
        options = dict(
            args.teacher_model_init_kwargs or {}, cache_dir=model_arguments.cache_dir, token=model_arguments.token
        )
        if args.teacher_model_revision is not None:
            options["revision"] = args.teacher_model_revision
        teacher = load_detector(teacher_path, **options)
        teacher_processor = AutoImageProcessor.from_pretrained(extra.teacher_image_processor_name or teacher_path)
    elif args.method != ["none"]:
        raise ValueError("--teacher_model_name_or_path is missing; without a teacher use --method none.")

    made = extra.keywords()
    if made:
        _check_made(model_arguments, extra, teacher)
        # The student sees what its teacher sees, unless flags say otherwise
        processor_place = model_arguments.image_processor_name or extra.teacher_image_processor_name or teacher_path
        model_arguments = replace(model_arguments, image_processor_name=processor_place)

    def build() -> PreTrainedModel:
        set_seed(args.seed)  # student and twin start from the same weights
        if made:
            return make_student(teacher, id2label=data.train.id2label, **made)
        model = build_detector(model_arguments, data.train.id2label)
        if extra.inherit_from_teacher:
            if teacher is None:
                raise ValueError("--inherit_from_teacher needs --teacher_model_name_or_path.")
            say(f"{inherit(model, teacher)} tensors inherited from the teacher")
        return model

    student = build()
    processor = build_image_processor(model_arguments, student)
    augment(data, data_arguments, processor, teacher_processor)
    return Prepared(data, teacher, teacher_processor, student, processor, build)


def _check_made(model_arguments: ModelArguments, extra: DistillArguments, teacher: PreTrainedModel | None) -> None:
    flags = ", ".join(f"--student_{name}" for name in extra.keywords())
    if teacher is None:
        raise ValueError(f"{flags}: the student is made from the teacher, so --teacher_model_name_or_path is needed.")
    if model_arguments.model_name_or_path is not None or model_arguments.config_name is not None:
        raise ValueError(
            f"{flags} make the student from the teacher, but --model_name_or_path or --config_name names a student too. "
            "Pass one of the two."
        )


def distill(
    model_arguments: ModelArguments, data_arguments: DataArguments, extra: DistillArguments, args: DistillationConfig
) -> dict[str, Any]:
    """Student, and where asked for its twin, from flags to ``results.json``, curves and an image sheet."""
    say = print if args.should_log else (lambda *_: None)
    output = Path(args.output_dir)
    args.resume_from_checkpoint = found_by_all(checkpoint_to_resume(args.resume_from_checkpoint, output))
    name_run(args)
    if args.push_to_hub and args.process_index == 0 and not extra.only_teacher:
        # A wrong token or name shows before hours of training
        args.hub_model_id = open_repository(repository_of(args), token=args.hub_token, private=args.hub_private_repo)
    run = prepare(model_arguments, data_arguments, extra, args, say)
    data, teacher, processor = run.data, run.teacher, run.processor
    if teacher is not None:
        args = settled(args, adapter_for(run.student), adapter_for(teacher))
    results: dict[str, Any] = {"teacher": None, "twin": None, "data": data_of(data)}
    results |= origins(model_arguments, data_arguments)
    models = {} if teacher is None else {"teacher": (teacher, run.teacher_processor)}
    if teacher is not None:
        results["teacher"] = teacher_row(run, args, measure=extra.evaluate_teacher or extra.only_teacher)
        results["teacher"] |= origin(teacher.name_or_path, args.teacher_model_revision, model_arguments.cache_dir)
        for split, metrics in (("validation", "validation"), (data.test_split, "test")):
            if results["teacher"][metrics]:
                say(f"teacher on {split}: AP {100 * results['teacher'][metrics]['map']:.1f}")
        if results["teacher"]["validation"]:
            _warn(finds_nothing(results["teacher"]["validation"]), say)
    costs = {}
    if args.process_index == 0 and not extra.only_teacher:
        costs = costs_of(models | {"student": (run.student, processor)}, data.test[0]["image"], args)
        results |= {"environment": environment(args.device)}
        if teacher is not None:
            results["teacher"] |= costs["teacher"]
    if teacher is not None and args.shard_teacher:
        teacher.to("cpu")  # the trainer shards a copy; the device has no room for a whole one beside it
    recorded = {"settings": settings(model_arguments, data_arguments, extra, args), "versions": versions()}
    if extra.only_teacher:
        results |= recorded
        if args.should_save:
            write_json(results, output / "results.json")
        return results

    distilled = args.method != ["none"]
    if distilled:
        results["label_map"] = LabelMap.between(teacher.config.id2label, run.student.config.id2label).rows()
    results |= recorded
    runs = {"student": (run.student, args, teacher if distilled else None)}
    if extra.with_twin and distilled:
        runs["twin"] = (run.build(), twin_of(args), None)
    histories, reports = {}, Reports()
    forget_earlier(args)
    for role, (model, arguments, its_teacher) in runs.items():
        with reports.writing(UNFINISHED):
            write_unfinished({"student": None, **results}, args)
        say(f"\n{role}: {model.num_parameters() / 1e6:.2f} M parameters, method {'+'.join(arguments.method)}")
        results[role], histories[role] = train(
            model, arguments, data, processor, its_teacher, run.teacher_processor, reports, WriteReport(output)
        )
        models[role] = (model, processor)
        results[role] |= costs.get(role, {})

    if args.should_save:
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
        table = comparison_table(
            {role: results[role]["test"] for role in ("teacher", "twin", "student") if results.get(role)}
        )
        say(
            f"\nCOCO AP on {data.test_split}, in points\n{table}\n\nwritten to {output}: model, results.json, report.html, "
            "curves.png, sheet.png, README.md"
        )
        if results["twin"] and results["teacher"]["validation"]:
            validation = [results[role]["validation"]["map"] for role in ("teacher", "twin")]
            _warn(no_better(*validation), say)
        finish(reports, results, args, say)
    return results


def _warn(trouble: str | None, say: Callable[[str], None]) -> None:
    if trouble:
        say(f"\nWARNING: {trouble}.")


def origins(model_arguments: ModelArguments, data_arguments: DataArguments) -> dict[str, Any]:
    """For ``results.json`` and the card: the checkpoint the student started from, and whether the data are on the Hub."""
    start, name = None, data_arguments.dataset_name
    if model_arguments.model_name_or_path is not None:
        start = origin(model_arguments.model_name_or_path, model_arguments.model_revision, model_arguments.cache_dir)
    local = name.partition(":")[0] == "shapes" or Path(name).expanduser().exists()
    return {"start": start, "dataset_on_hub": not local}


def teacher_row(run: Prepared, args: DistillationConfig, measure: bool) -> dict[str, Any]:
    """The teacher for ``results.json``; its metrics where they are to be measured."""
    row: dict[str, Any] = {
        "name_or_path": run.teacher.name_or_path,
        "digest": digest(run.teacher),
        "parameters": run.teacher.num_parameters(),
    }
    for split in ("validation", "test"):
        row[split] = {}
        if measure:
            row[split] = evaluate_detector(
                run.teacher,
                run.teacher_processor,
                getattr(run.data, split),
                batch_size=args.per_device_eval_batch_size,
                num_workers=args.dataloader_num_workers,
                mixed_precision=args.mixed_precision,
            )
    return row


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
    initial, clock = digest(model), StepClock()
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
    row = {
        "method": "+".join(args.method),
        "model_type": model.config.model_type,
        "initial_digest": initial,
        "parameters": model.num_parameters(),
        "steps": result.global_step,
        "train_seconds": round(seconds, 1),
        "step_seconds": clock.median(),
        "peak_memory_MiB": round(peak_memory(), 1),
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


def twin_of(args: DistillationConfig) -> DistillationConfig:
    """The same settings without a teacher, in the folder ``twin`` of the output folder."""
    twin = copy.deepcopy(args)
    twin.method, twin.method_config, twin.teacher_model_name_or_path = ["none"], None, None
    twin.output_dir = str(Path(args.output_dir) / TWIN)
    name_run(twin, args.run_name)
    twin.push_to_hub = False
    if args.resume_from_checkpoint is not None:
        twin.resume_from_checkpoint = found_by_all(last_complete_checkpoint(Path(twin.output_dir)))
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


def found_by_all(checkpoint: str | None) -> str | None:
    """The checkpoint, if every process has found one of the same step.

    Raises:
        ValueError: machines that share no disk would go on from different steps.
    """
    found = gather_object([checkpoint])
    if len({path and Path(path).name for path in found}) > 1:
        raise ValueError(
            f"The processes have found different checkpoints to resume from: {', '.join(map(str, found))}. Put --output_dir "
            "on a disk that all machines share, or let each machine write its own (--save_on_each_node true)."
        )
    return checkpoint


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes ``trainer_state.json`` last."""
    complete = [folder.parent for folder in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda folder: int(folder.name.split("-")[-1]))) if complete else None


if __name__ == "__main__":
    main()
