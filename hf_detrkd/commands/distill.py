"""Distil a teacher into a student, both DETR-like detectors of transformers.

    accelerate launch scripts/distill.py \\
        --teacher_model_name_or_path TEACHER --model_name_or_path STUDENT \\
        --dataset_name DATA --output_dir runs/student --method auto --with_twin true

    accelerate launch scripts/distill.py --teacher_model_name_or_path TEACHER --student_backbone resnet18 \\
        --student_decoder_layers 3 --dataset_name DATA --output_dir runs/student --with_twin true

The second makes the student from the teacher (make_student.py), with the teacher's weights wherever they fit.
TEACHER and STUDENT are local folders or Hub ids, DATA is a folder (COCO, YOLO, Pascal VOC, imagefolder), a Hub id or
`shapes`. Every field of DistillationConfig (all of TrainingArguments and the settings of distillation) is a flag.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from ..config import DistillationConfig
from ..detectors import PLACE, digest, load_detector
from ..evaluation.cost import environment
from ..evaluation.detector import evaluate_detector
from ..families import adapter_for
from ..inheritance import inherit
from ..labels import LabelMap
from ..methods import build_methods, settled
from ..publishing import finish, open_for
from ..reporting.live import WriteReport
from ..reporting.run import TWIN, UNFINISHED
from ..reporting.versions import versions
from ..reporting.writing import Reports
from ..students import make_student
from .arguments import DataArguments, ModelArguments, StudentArguments, parse
from .gate import finds_nothing, no_better
from .records import (
    costs_of,
    data_of,
    forget_earlier,
    name_run,
    origin,
    origins,
    settings,
    write_unfinished,
)
from .resuming import checkpoint_to_resume, found_by_all, has_finished, last_complete_checkpoint, same_settings
from .setup import Data, augment, build_detector, build_image_processor, load_data, normalise_for, write_json
from .training import train, write_down


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


ARGUMENTS = (ModelArguments, DataArguments, DistillArguments, DistillationConfig)
"""All flags, by the groups in which `parse` returns them."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``results.json``."""
    model_arguments, data_arguments, extra, args = parse(ARGUMENTS, argv, __doc__)
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
        hub = {"cache_dir": model_arguments.cache_dir, "token": model_arguments.token}
        options = (args.teacher_model_init_kwargs or {}) | hub
        if args.teacher_model_revision is not None:
            options["revision"] = args.teacher_model_revision
        teacher = load_detector(teacher_path, **options)
        processor_place = extra.teacher_image_processor_name or teacher_path
        if processor_place == teacher_path:
            hub |= {name: options[name] for name in PLACE if name in options}
        teacher_processor = AutoImageProcessor.from_pretrained(processor_place, **hub)
    elif args.method != ["none"]:
        raise ValueError("--teacher_model_name_or_path is missing; without a teacher use --method none.")

    made = extra.keywords()
    if made:
        _check_made(model_arguments, extra, teacher)

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
    _check_methods(args, student, teacher)
    # A student made from its teacher sees what that sees, unless flags say otherwise
    seen = copy.deepcopy(teacher_processor) if made and model_arguments.image_processor_name is None else None
    if seen is not None:
        normalise_for(seen, made)
    processor = build_image_processor(model_arguments, student, seen)
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
    if model_arguments.backbone_weights is not None or extra.inherit_from_teacher:
        raise ValueError(
            f"{flags} make the student from the teacher, with its weights wherever they fit: --backbone_weights and "
            "--inherit_from_teacher would be ignored. Leave them out; weights for another backbone are "
            "--student_backbone_weights."
        )


def _check_methods(args: DistillationConfig, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """Refuses methods, settings and pairs that can't work, before the teacher is measured; what auto takes always works."""
    if teacher is None or args.method in (["none"], ["auto"]):
        return
    labels = LabelMap.between(teacher.config.id2label, student.config.id2label)
    adapters = adapter_for(student, labels.student_classes), adapter_for(teacher, labels.teacher_classes)
    with torch.random.fork_rng(devices=[]):  # the trainer builds them again, and must draw the same numbers
        build_methods(args.method, args.method_config, *adapters)


def distill(
    model_arguments: ModelArguments, data_arguments: DataArguments, extra: DistillArguments, args: DistillationConfig
) -> dict[str, Any]:
    """Student, and where asked for its twin, from flags to ``results.json``, curves and an image sheet."""
    say = print if args.should_log else (lambda *_: None)
    output = Path(args.output_dir)
    if extra.only_teacher and has_finished(output):
        raise ValueError(
            f"{output} has the results of a finished run, which those of the teacher alone would replace. Choose another "
            "--output_dir."
        )
    args.resume_from_checkpoint = found_by_all(checkpoint_to_resume(args.resume_from_checkpoint, output))
    name_run(args)
    if args.push_to_hub and args.process_index == 0 and not extra.only_teacher:
        # A wrong token, name or branch shows before hours of training
        args.hub_model_id = open_for(args)
    run = prepare(model_arguments, data_arguments, extra, args, say)
    data, teacher, processor = run.data, run.teacher, run.processor
    if teacher is not None:
        args = settled(args, adapter_for(run.student), adapter_for(teacher))
    recorded = {"settings": settings(model_arguments, data_arguments, extra, args), "versions": versions()}
    if not extra.only_teacher:
        same_settings(args.resume_from_checkpoint, recorded["settings"])
    results: dict[str, Any] = {"teacher": None, "twin": None, "data": data_of(data)}
    results |= origins(model_arguments, data_arguments)
    models = {} if teacher is None else {"teacher": (teacher, run.teacher_processor)}
    if teacher is not None:
        results["teacher"] = teacher_row(run, args, measure=extra.evaluate_teacher or extra.only_teacher)
        results["teacher"] |= origin(teacher.name_or_path, args.teacher_model_revision, model_arguments.cache_dir)
        for split, metrics in ((data.validation_split, "validation"), (data.test_split, "test")):
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
        if teacher is not None and (its_teacher is None or args.shard_teacher):
            teacher.to("cpu")  # a twin's memory is its own; and of a sharded teacher the trainer takes a copy
        with reports.writing(UNFINISHED):
            write_unfinished({"student": None, **results}, args)
        say(f"\n{role}: {model.num_parameters() / 1e6:.2f} M parameters, method {'+'.join(arguments.method)}")
        results[role], histories[role] = train(
            model, arguments, data, processor, its_teacher, run.teacher_processor, reports, WriteReport(output)
        )
        models[role] = (model, processor)
        results[role] |= costs.get(role, {})

    if args.should_save:
        write_down(results, models, histories, data, args, reports, say)
        if results["twin"] and results["teacher"]["validation"]:
            validation = [results[role]["validation"]["map"] for role in ("teacher", "twin")]
            _warn(no_better(*validation), say)
        finish(reports, results, args, say)
    return results


def _warn(trouble: str | None, say: Callable[[str], None]) -> None:
    if trouble:
        say(f"\nWARNING: {trouble}.")


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


if __name__ == "__main__":
    main()
