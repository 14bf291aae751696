"""docs/pairs.md, which tests/pairs_table.py writes: it has every cell, and refuses what the code of today refuses."""

from __future__ import annotations

import re

import pairs_table
import pytest
import zoo

from hf_detrkd.methods import METHODS, build_methods

TEXT = pairs_table.TABLE.read_text()
SENTENCES = dict(re.findall(r"^(\d+)\. (.*)$", TEXT, re.MULTILINE))


def table_of(method: str) -> dict[tuple[str, str], str]:
    """By student and teacher what the page has: a tick or the number of a sentence."""
    part = TEXT.split(f"\n## {method}\n")[1].split("\n## ")[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.strip().splitlines()]
    return {(row[0], teacher): cell for row in rows for teacher, cell in zip(header[1:], row[1:], strict=True)}


@pytest.mark.parametrize("method", METHODS)
def test_refusals(method):
    table = table_of(method)
    assert table.keys() == {(student, teacher) for student in zoo.NAMES for teacher in zoo.NAMES}
    students = {name: pairs_table.student_of(name)[0] for name in zoo.NAMES}
    for (student, teacher), cell in table.items():
        pair = pairs_table.adapters(students[student], pairs_table.teacher_of(teacher))
        try:
            build_methods([method], pairs_table.SETTINGS.get(method), *pair)
        except ValueError as refusal:
            assert SENTENCES[cell] == str(refusal), (student, teacher)
        else:
            assert cell == "✓", (student, teacher)
