"""What was found wrong in a data set: where, which value, and what was done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Action = Literal["stop", "repaired", "noted"]

LISTED = 20
"""Findings a message spells out."""

LISTED_OF_A_KIND = 5
"""Of one kind: a set that is wrong throughout is one mistake, and the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one row of a data set."""

    problem: str
    """What is wrong, the same words for every row it is found in."""
    file: str
    """The annotation file, or the image whose row it is."""
    row: str
    """Where in that file: ``line 3``, ``images[12]``, ``train row 12, object 3``."""
    value: object
    """What was found there."""
    action: Action = "stop"
    """``stop``: training on it would be wrong. ``repaired``: made right, nothing lost. ``noted``: possibly meant."""
    advice: str = ""
    """What to do, or what was done."""

    def __str__(self) -> str:
        advice = f" -> {self.advice}" if self.advice else ""
        return f"{self.file}: {self.row}: {self.problem}: {self.value}{advice}"


class DatasetError(ValueError):
    """The data set can't be trained on as it is. The message lists the findings; ``findings`` has them all."""

    def __init__(self, findings: Iterable[Finding], strict: bool = False):
        self.findings = tuple(findings)
        rule = "strict is on: every finding stops the run" if strict else "nothing of this can be repaired safely"
        super().__init__(f"{len(self.findings)} problems in the data set ({rule}).\n{_listing(self.findings)}")


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found and did."""

    findings: tuple[Finding, ...]
    images: int
    """Images looked at."""
    objects: int
    """Objects kept."""

    @property
    def repaired(self) -> dict[str, int]:
        """How often each kind of problem was repaired."""
        return dict(Counter(finding.problem for finding in self.findings if finding.action == "repaired"))

    @property
    def noted(self) -> dict[str, int]:
        """How often each kind of thing was noted."""
        return dict(Counter(finding.problem for finding in self.findings if finding.action == "noted"))

    def __str__(self) -> str:
        head = f"checked {self.images} images, {self.objects} objects"
        if not self.findings:
            return f"{head}: nothing found"
        return f"{head}: {sum(self.repaired.values())} repaired, {sum(self.noted.values())} noted\n" + _listing(
            self.findings, listed=3
        )


def _listing(findings: tuple[Finding, ...], listed: int = LISTED) -> str:
    """Every kind of problem with its count and its first rows; ``listed`` rows are shared out among the kinds."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.problem, []).append(finding)
    share = min(LISTED_OF_A_KIND, max(1, listed // max(1, len(kinds))))
    lines = []
    for problem, same in kinds.items():
        lines.append(f"  {problem} ({len(same)}x)")
        for finding in same[:share]:
            advice = f" -> {finding.advice}" if finding.advice else ""
            lines.append(f"    {finding.file}: {finding.row}: {finding.value}{advice}")
        if len(same) > share:
            lines.append(f"    ... and {len(same) - share} more")
    return "\n".join(lines)
