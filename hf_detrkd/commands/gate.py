"""When distillation can't help: a teacher that finds nothing, or no more than the student finds without it."""

from __future__ import annotations

from collections.abc import Mapping

LEAST_AP = 0.01
"""Below one point a teacher is as good as untrained, or sees its images or classes otherwise than in its training."""


def finds_nothing(teacher: Mapping[str, float]) -> str | None:
    """What is wrong with a teacher of these metrics on the validation split; None where nothing is."""
    if teacher["map"] >= LEAST_AP:
        return None
    return (
        f"the teacher has AP {100 * teacher['map']:.1f} on the validation split: there is nothing to learn from it. Are these its "
        "classes (see the table), its image size and its image processor, and are the boxes read right (inspect_data.py)? "
        "--only_teacher true measures it alone"
    )


def no_better(teacher_map: float, twin_map: float) -> str | None:
    """What is wrong with a teacher whose AP on the validation split is not above the twin's; None where it is."""
    if teacher_map > twin_map:
        return None
    return (
        f"the teacher is no better than the twin, AP {100 * teacher_map:.1f} and {100 * twin_map:.1f} on the validation split. "
        "Is it the teacher's image size, are these its classes? Or train a better one, or take a smaller student"
    )
