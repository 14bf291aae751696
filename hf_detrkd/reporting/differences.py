"""Which images tell two models apart."""

from __future__ import annotations

from collections.abc import Sequence

from .sheet import Counts


def most_different(baseline: Sequence[Counts], candidate: Sequence[Counts], number: int) -> list[int]:
    """Indices of the images in which two models differ most in the number of errors, missed objects and false detections.

    One half are those in which the candidate has fewer errors, the most telling one first, the other half those in which it has
    more, so that the sheet flatters none; where one side has too few, the other fills up. Images with as many errors are
    never chosen.

    Args:
        baseline, candidate: per image.
    """
    saved = [one.errors - other.errors for one, other in zip(baseline, candidate, strict=True)]
    order = sorted(range(len(saved)), key=lambda index: -saved[index])
    better = [index for index in order if saved[index] > 0]
    worse = [index for index in reversed(order) if saved[index] < 0]
    of_worse = min(len(worse), max(number // 2, number - len(better)))
    return better[: number - of_worse] + worse[:of_worse]


def caption(baseline: str, one: Counts, candidate: str, other: Counts) -> str:
    """What the difference is, in two lines."""
    saved = one.errors - other.errors
    errors = "error" if abs(saved) == 1 else "errors"
    return f"{candidate}: {abs(saved)} {errors} {'fewer' if saved > 0 else 'more'}\nthan {baseline}"
