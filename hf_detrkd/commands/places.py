"""Where trained detectors are: named ones, and those of a distillation run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..detectors import load_detector


@dataclass(frozen=True)
class Place:
    """A detector and its image processor, each in a folder or on the Hub."""

    model: str
    processor: str
    revision: str | None = None
    """Of the model, and of the processor where it is beside it."""

    def load(self) -> tuple[PreTrainedModel, BaseImageProcessor]:
        revision = {} if self.revision is None else {"revision": self.revision}
        processor = AutoImageProcessor.from_pretrained(
            self.processor, **(revision if self.processor == self.model else {})
        )
        return load_detector(self.model, **revision), processor


def read_run(folder: str | Path) -> dict[str, Any]:
    """What `distill` wrote to ``results.json``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is that of another command, or of a run that trained nothing.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"--run {folder}: there is no results.json in it, so it isn't the output folder of a finished distillation run. "
            "Models in other places are named with --models NAME=PLACE."
        )
    results = json.loads(path.read_text(encoding="utf-8"))
    if not results.get("student"):
        raise ValueError(
            f"--run {folder}: its results.json has {sorted(results)} and no student, so it isn't that of a distillation run. Name "
            "the model with --models NAME=PLACE."
        )
    return results


def places(run: str | Path | None, models: Sequence[str]) -> dict[str, Place]:
    """By name, the models of a run (teacher, twin and student, as far as there are) and named ones.

    Args:
        run: output folder of `distill`.
        models: ``NAME=PLACE``; a name that the run has too means this place.

    Raises:
        ValueError: an entry without a name or a place, or a name that is there twice.
        FileNotFoundError: the run's teacher was a folder, and is not there.
    """
    named = _named(models)
    return {**({} if run is None else _of_run(Path(run), read_run(run), named)), **named}


def _named(models: Sequence[str]) -> dict[str, Place]:
    named: dict[str, Place] = {}
    for entry in models:
        name, _, place = entry.partition("=")
        if not name or not place:
            raise ValueError(f"--models has {entry!r}; NAME=PLACE is needed, such as student=runs/student.")
        if name in named:
            raise ValueError(
                f"--models has the name {name!r} twice: {named[name].model} and {place}. Every model needs its own name."
            )
        named[name] = Place(place, place)
    return named


def _of_run(folder: Path, results: Mapping[str, Any], named: Mapping[str, Place]) -> dict[str, Place]:
    found = {}
    teacher = results["teacher"]
    if teacher is not None and "teacher" not in named:
        place, revision = teacher["name_or_path"], teacher.get("revision")
        if revision is None and not Path(place).is_dir():
            raise FileNotFoundError(
                f"--run {folder}: its teacher was the folder {place}, which isn't there, seen from {Path.cwd()}. Call from the "
                "folder where the run was started, or say where the teacher is: --models teacher=PLACE."
            )
        processor = results["settings"]["DistillArguments"].get("teacher_image_processor_name")
        found["teacher"] = Place(place, processor or place, revision)
    if results["twin"]:
        found["twin"] = Place(str(folder / "twin"), str(folder / "twin"))
    return {**found, "student": Place(str(folder), str(folder))}
