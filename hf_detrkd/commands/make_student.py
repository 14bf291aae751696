"""A smaller detector made from a teacher: its family, its classes, and its weights wherever they fit.

    python scripts/make_student.py --teacher_model_name_or_path TEACHER --output_dir students/r18 --student_backbone resnet18
    python scripts/make_student.py ... --student_decoder_layers 3 --student_num_queries 100

Writes a folder that `from_pretrained` reads, with the teacher's image processor, and student.json; prints a table of
parameters, FLOPs and latency of both. distill.py takes the same flags, and then needs no folder of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, set_seed

from ..detectors import load_detector
from ..evaluation.cost import cost_rows, environment
from ..reporting.table import cost_table
from ..students import make_student
from .arguments import StudentArguments, parse
from .setup import normalise_for, write_json


@dataclass
class MakeStudentArguments:
    """From which teacher, and where the student goes."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a folder or a Hub id."}
    )
    teacher_image_processor_name: str | None = field(
        default=None, metadata={"help": "Its image processor, where it is not beside it."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the student."})
    image_size: int | None = field(
        default=None, metadata={"help": "Have the student's processor resize to so many pixels square."}
    )
    seed: int = field(default=42, metadata={"help": "Of the weights that are new."})
    rounds: int = field(default=20, metadata={"help": "Calls of each model that are timed; 0: no timing."})
    token: str | None = field(default=None, metadata={"help": "Hub token; by default the one you logged in with."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``student.json``."""
    arguments, wanted = parse((MakeStudentArguments, StudentArguments), argv, __doc__)
    if arguments.teacher_model_name_or_path is None or arguments.output_dir is None:
        raise ValueError("--teacher_model_name_or_path and --output_dir are needed.")
    if Path(arguments.output_dir).resolve() == Path(arguments.teacher_model_name_or_path).resolve():
        raise ValueError(
            f"--output_dir {arguments.output_dir} is the teacher's own folder, which the student would overwrite. Choose another."
        )
    teacher = load_detector(arguments.teacher_model_name_or_path, token=arguments.token)
    place = arguments.teacher_image_processor_name or arguments.teacher_model_name_or_path
    processors = {
        role: AutoImageProcessor.from_pretrained(place, token=arguments.token) for role in ("teacher", "student")
    }
    normalise_for(processors["student"], wanted.keywords())
    if arguments.image_size is not None:
        processors["student"].do_resize = True
        processors["student"].size = {"height": arguments.image_size, "width": arguments.image_size}
    set_seed(arguments.seed)
    student = make_student(teacher, **wanted.keywords())
    student.save_pretrained(arguments.output_dir)
    processors["student"].save_pretrained(arguments.output_dir)
    models = {"teacher": teacher, "student": student}
    rows = cost_rows({role: (model, processors[role]) for role, model in models.items()}, arguments.rounds)
    results = {"teacher": teacher.name_or_path, "wanted": wanted.keywords(), "cost": rows, "environment": environment()}
    write_json(results, Path(arguments.output_dir) / "student.json")
    print(cost_table(rows))
    print(f"\nwritten to {arguments.output_dir}: model, image processor, student.json")
    return results


if __name__ == "__main__":
    main()
