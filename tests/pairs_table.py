"""Which student can learn from which teacher by which method: every cell is run, and the table written.

    python tests/pairs_table.py            # makes docs/pairs.md anew; goes on where it was stopped (build/pairs.json)

"works" means: ten optimiser steps on task loss and distillation together, with finite losses, and after the first
a gradient in every trainable parameter of the method and of the student, but those that transformers' own loss of the
student's family doesn't reach either.
"""

from __future__ import annotations

import copy
import json
import sys
from functools import cache
from pathlib import Path

import torch
import zoo
from transformers import PreTrainedModel

from hf_detrkd import DistillationModel
from hf_detrkd.families import FamilyAdapter, adapter_for
from hf_detrkd.labels import LabelMap
from hf_detrkd.methods import METHODS, build_methods

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "pairs.md"
CACHE = ROOT / "build" / "pairs.json"
STEPS = 10
SETTINGS = {"kd_detr": {"general_points": 5}}
"""So that it is fast."""


@cache
def student_of(name: str) -> tuple[PreTrainedModel, frozenset[str]]:
    """A student, and its parameters that transformers' own loss of its family never reaches."""
    student = zoo.build(name, seed=1)
    trained = copy.deepcopy(student)
    DistillationModel(trained, adapter_for(trained)).train()(**zoo.batch()).loss.backward()
    return student, frozenset(n for n, p in trained.named_parameters() if p.requires_grad and p.grad is None)


@cache
def teacher_of(name: str) -> PreTrainedModel:
    """A teacher, which nothing changes."""
    return zoo.build(name, seed=2).eval().requires_grad_(False)


def adapters(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[FamilyAdapter, FamilyAdapter]:
    """Of the classes they share."""
    labels = LabelMap.between(teacher.config.id2label, student.config.id2label)
    return adapter_for(student, classes=labels.student_classes), adapter_for(teacher, classes=labels.teacher_classes)


def run_cell(student_name: str, teacher_name: str, method: str) -> str:
    """ "works", or the sentence that refuses the pair.

    Raises:
        AssertionError: the pair was accepted and doesn't train.
    """
    torch.manual_seed(0)
    student, unreached = student_of(student_name)
    student = copy.deepcopy(student)
    adapter, teacher_adapter = adapters(student, teacher_of(teacher_name))
    try:
        methods = build_methods([method], SETTINGS.get(method), adapter, teacher_adapter)
    except ValueError as refusal:
        return str(refusal)
    module = DistillationModel(student, adapter, methods).train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    batch = zoo.batch()
    images = {name: value for name, value in batch.items() if name != "labels"}
    attentions = any("teacher" in method.attentions for method in methods)
    with torch.no_grad():
        view = teacher_adapter.forward(images, attentions=attentions)[1]
    for step in range(STEPS):
        output = module(**batch, teacher_view=view, generator=torch.Generator().manual_seed(step))
        assert output.loss.isfinite(), f"the loss of step {step} is {output.loss}"
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            without = {n for n, p in module.named_parameters() if p.requires_grad and p.grad is None}
            without -= {f"student.{name}" for name in unreached}
            assert not without, f"no gradient in {sorted(without)}"
        optimizer.step()
    return "works"


def cells() -> list[tuple[str, str, str]]:
    """(student, teacher, method), all of them."""
    return [(student, teacher, method) for method in METHODS for student in zoo.NAMES for teacher in zoo.NAMES]


def render(results: dict[str, str]) -> str:
    """The page, from the outcome of every cell by "student teacher method"."""
    refusals: dict[str, int] = {}
    lines = [
        "# Which pairs work",
        "",
        "Written by `python tests/pairs_table.py`, which runs every cell: ten optimiser steps of a tiny student of the",
        "row's family under a tiny teacher of the column's family, with finite losses and a gradient in every trainable",
        "parameter (but those named at the end). ✓ works; a number is the sentence, below, with which the pair is refused",
        "before training.",
    ]
    for method in METHODS:
        lines += ["", f"## {method}", "", "| student \\ teacher | " + " | ".join(zoo.NAMES) + " |"]
        lines += ["| --- |" + " :-: |" * len(zoo.NAMES)]
        for student in zoo.NAMES:
            row = []
            for teacher in zoo.NAMES:
                outcome = results[f"{student} {teacher} {method}"]
                row.append("✓" if outcome == "works" else str(refusals.setdefault(outcome, len(refusals) + 1)))
            lines.append(f"| {student} | " + " | ".join(row) + " |")
    if refusals:
        lines += ["", "## Refusals", ""]
        lines += [f"{number}. {sentence}" for sentence, number in refusals.items()]
    lines += [
        "",
        "## Parameters without a gradient",
        "",
        "transformers' own loss of these families doesn't reach them:",
        "",
    ]
    for student in zoo.NAMES:
        if unreached := student_of(student)[1]:
            lines.append(f"- {student}: " + ", ".join(f"`{name}`" for name in sorted(unreached)))
    return "\n".join(lines) + "\n"


def main() -> None:
    CACHE.parent.mkdir(exist_ok=True)
    results = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    for done, cell in enumerate(cells()):
        key = " ".join(cell)
        if key not in results:
            try:
                results[key] = run_cell(*cell)
            except Exception as error:  # one broken cell must not hide the others
                print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            CACHE.write_text(json.dumps(results, indent=0))
        if done % 50 == 0:
            print(f"{done}/{len(cells())}", flush=True)
    missing = [" ".join(cell) for cell in cells() if " ".join(cell) not in results]
    if missing:
        sys.exit(f"{len(missing)} cells are broken, the table is not written: {missing[:10]}")
    TABLE.write_text(render(results))
    print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
