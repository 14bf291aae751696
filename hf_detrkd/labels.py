"""The mapping between the teacher's and the student's classes, by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class LabelMap:
    """The classes that two models share. Entry i of the three first tuples is one class; the student's order."""

    names: tuple[str, ...]
    """As the student writes them."""
    teacher_classes: tuple[int, ...]
    """Index of each shared class among the teacher's, for ``adapter_for(teacher, classes=...)``."""
    student_classes: tuple[int, ...]
    """Index of each shared class among the student's, for ``adapter_for(student, classes=...)``."""
    teacher_names: tuple[str, ...]
    """All K names of the teacher, in its order."""
    student_names: tuple[str, ...]
    """All K names of the student, in its order."""

    @classmethod
    def between(cls, teacher_id2label: Mapping[int, str], student_id2label: Mapping[int, str]) -> LabelMap:
        """The map between the ``config.id2label`` of two models.

        Names are compared exactly first, then without regard to case, spaces, hyphens and underscores. A name that one
        model has twice (as COCO's "N/A") has no partner, unless both lists are the same throughout; nor has a placeholder
        (transformers' "LABEL_0").

        Raises:
            ValueError: no class is shared.
        """
        teacher, student = _in_order(teacher_id2label), _in_order(student_id2label)
        if teacher == student:
            everything = tuple(range(len(student)))
            return cls(student, everything, everything, teacher, student)
        exact, loose = _unique(teacher), _unique(tuple(map(_plain, teacher)))
        student_exact, student_loose = _unique(student), _unique(tuple(map(_plain, student)))
        pairs: dict[int, int] = {}
        for name, index in student_exact.items():
            if name in exact:
                pairs[index] = exact[name]
        for name, index in student_loose.items():
            if index not in pairs and name in loose and loose[name] not in pairs.values():
                pairs[index] = loose[name]
        if not pairs:
            raise ValueError(_nothing_shared(teacher, student))
        shared = tuple(sorted(pairs))
        return cls(tuple(student[i] for i in shared), tuple(pairs[i] for i in shared), shared, teacher, student)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_identity(self) -> bool:
        """Both models have exactly these classes in this order: nothing has to be selected."""
        return self.teacher_classes == self.student_classes == tuple(range(len(self.teacher_names))) and len(
            self.teacher_names
        ) == len(self.student_names)

    def table(self) -> str:
        """One line per class: student, teacher, and what was found. Plain text, to be read before training."""
        rows = [("student", "teacher", ""), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self)} classes shared; the rest is left out of the distillation terms."])

    def rows(self) -> list[tuple[str, str, str]]:
        """Per class the student's label and name, the teacher's, and what is to be said; "-" where one has no partner."""
        partner = dict(zip(self.student_classes, self.teacher_classes, strict=True))
        rows = []
        for i, name in enumerate(self.student_names):
            if i not in partner:
                rows.append((f"{i} {name}", "-", self._why_alone(name, self.student_names, self.teacher_names)))
                continue
            teacher_name = self.teacher_names[partner[i]]
            note = "" if teacher_name == name else "same but for case, spaces or hyphens"
            rows.append((f"{i} {name}", f"{partner[i]} {teacher_name}", note))
        for i, name in enumerate(self.teacher_names):
            if i not in self.teacher_classes:
                rows.append(("-", f"{i} {name}", self._why_alone(name, self.teacher_names, self.student_names)))
        return rows

    @staticmethod
    def _why_alone(name: str, own: tuple[str, ...], others: tuple[str, ...]) -> str:
        if Counter(map(_plain, own))[_plain(name)] > 1 or Counter(map(_plain, others))[_plain(name)] > 1:
            return "left out: the name is there more than once"
        near = _nearest(name, others)
        return f'left out; near: "{near}"' if near else "left out"


def _in_order(id2label: Mapping[int, str]) -> tuple[str, ...]:
    # A config read from JSON may still have string keys.
    names = {int(index): str(name) for index, name in id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"`id2label` has the keys {sorted(names)}, but a head with {len(names)} classes needs the keys 0 to "
            f"{len(names) - 1}, each once: the key is the column of the logits. Number the classes from 0."
        )
    return tuple(names[index] for index in range(len(names)))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _unique(names: tuple[str, ...]) -> dict[str, int]:
    """Index of every name that is there once and says something."""
    counts = Counter(names)
    return {
        name: index
        for index, name in enumerate(names)
        if counts[name] == 1 and not re.fullmatch(r"label_?\d+", name, re.IGNORECASE)
    }


def _nearest(name: str, others: tuple[str, ...]) -> str | None:
    found = get_close_matches(_plain(name), [_plain(other) for other in others], n=1)
    return next((other for other in others if found and _plain(other) == found[0]), None)


def _nothing_shared(teacher: tuple[str, ...], student: tuple[str, ...]) -> str:
    def some(names: tuple[str, ...]) -> str:
        return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")

    near = [(name, found) for name in student if (found := _nearest(name, teacher))]
    hint = f" Near misses: {', '.join(f'{a!r} and {b!r}' for a, b in near[:5])}." if near else ""
    return (
        f"Teacher and student share no class name: the teacher has {some(teacher)}; the student has {some(student)}."
        f"{hint} Classes are mapped by name: give one model's config the other's names in `id2label` and `label2id` "
        "where they mean the same."
    )
