"""The boxes of a split, looked at all at once: which are wrong, and what is left of the others inside their images."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute as pc

from .findings import Action, Finding
from .schema import category_feature

ROUNDING = 0.05
"""Pixels by which a box may stick out of the image without being a finding: half a digit of boxes written with one
decimal."""

MANY = 0.25
"""Share of boxes that stick out of their images from which on another box format is looked for: a wrong format moves
them all, while slips of labelling are rare."""


def object_lists(split: datasets.Dataset, part: str):
    """One part of the objects of every image, as an Arrow list array."""
    objects = split.select_columns(["objects"]).with_format("arrow")[:]["objects"].combine_chunks()
    return pc.struct_field(objects, part)


@dataclass(frozen=True)
class Boxes:
    """All objects of a split in flat arrays."""

    split: str
    files: list[str]
    row: np.ndarray
    """(n,) the image of each object."""
    number: np.ndarray
    """(n,) its place among the image's objects."""
    size: np.ndarray
    """(n, 2) width and height of its image."""
    xywh: np.ndarray
    """(n, 4)"""
    category: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    classes: int

    @classmethod
    def of(cls, name: str, split: datasets.Dataset, files: list[str]) -> Boxes:
        columns = split.select_columns(["width", "height"]).with_format("numpy")[:]
        boxes = object_lists(split, "bbox")
        counts = pc.list_value_length(boxes).to_numpy(zero_copy_only=False)
        row = np.repeat(np.arange(len(split)), counts)
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(
            name,
            files,
            row,
            number,
            np.stack([columns["width"], columns["height"]], 1)[row].astype(np.float64),
            _flat(pc.list_flatten(boxes)).astype(np.float64).reshape(-1, 4),
            _flat(object_lists(split, "category")),
            _flat(object_lists(split, "area")).astype(np.float64),
            _flat(object_lists(split, "iscrowd")).astype(bool),
            category_feature(split).num_classes,
        )

    def check(self) -> tuple[list[Finding], np.ndarray]:
        """Findings, and which objects to keep (n,)."""
        everything = np.ones(len(self.row), dtype=bool)
        if self.crowd.all():  # or there are none: crowds are neither learned nor measured
            found = f"{len(self.crowd)} crowds" if len(self.crowd) else "0 objects"
            action = "stop" if self.split in ("train", "validation") else "noted"
            advice = "are the annotations where the format has them?"
            return [Finding("split without objects", self.split, "-", found, action, advice)], everything
        whole = self._check_format()
        if any(finding.action == "stop" for finding in whole):
            return whole, everything
        sides, (start, end) = self.xywh[:, 2:], self._inside()
        finite = np.isfinite(self.xywh).all(1)
        negative = finite & (sides < 0).any(1)
        zero = finite & ~negative & (sides == 0).any(1)
        outside = finite & ~negative & ~zero & (end <= start).any(1)
        beyond = finite & ~negative & ~zero & ~outside & self._sticks_out(self.xywh[:, :2], self.xywh[:, :2] + sides)
        fine = finite & ~negative & ~zero & ~outside
        no_area = fine & ~((self.area > 0) & np.isfinite(self.area))
        too_large = fine & ~no_area & ~beyond & (self.area > 1.01 * sides.prod(1) + 1)  # 1 %, 1 px²: rounded areas
        unknown = (self.category < 0) | (self.category >= self.classes)
        findings = [
            *whole,
            *self._found(~finite, "box that is not finite", self.xywh),
            *self._found(negative, "box of negative width or height", self.xywh, advice="is `--bbox_format` right?"),
            *self._found(zero, "box of zero width or height", self.xywh, "repaired", "dropped"),
            *self._found(outside, "box outside the image", self.xywh, advice="is `--bbox_format` right?"),
            *self._found(beyond, "box over the edge of the image", self.xywh, "repaired", "clipped"),
            *self._found(no_area, "area that is not positive", self.area, "repaired", "the box's area is taken"),
            *self._found(too_large, "area larger than the box", self.area, "repaired", "the box's area is taken"),
            *self._found(
                unknown,
                "object of an unknown class",
                self.category,
                advice=f"needed: an id from 0 to {self.classes - 1}",
            ),
        ]
        return findings, ~zero

    def rebuild(self, split: datasets.Dataset, keep: np.ndarray) -> datasets.Dataset:
        """The split with boxes clipped to their images, areas no larger than the boxes, and only the objects ``keep``
        (n,)."""
        start, end = self._inside()
        sides = end - start
        area = np.where(np.isfinite(self.area) & (self.area > 0), self.area, np.inf)
        repaired = {"bbox": np.concatenate([start, sides], 1), "area": np.minimum(area, sides.prod(1))}
        parts = {part: _flat(object_lists(split, part)) for part in ("id", "category", "iscrowd")} | repaired
        ends = np.cumsum(np.bincount(self.row[keep], minlength=len(split)))[:-1]
        lists = {part: [piece.tolist() for piece in np.split(values[keep], ends)] for part, values in parts.items()}
        objects = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        features = datasets.Features({"objects": split.features["objects"]})
        column = datasets.Dataset.from_dict({"objects": objects}, features=features)
        return datasets.concatenate_datasets([split.remove_columns("objects"), column], axis=1)

    def _inside(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, 2) the near and the far corner of what lies in the image."""
        start = self.xywh[:, :2]
        return np.clip(start, 0, self.size), np.clip(start + self.xywh[:, 2:], 0, self.size)

    def _sticks_out(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (start < -ROUNDING).any(1) | (end > self.size + ROUNDING).any(1)

    def _check_format(self) -> list[Finding]:
        """One finding where all boxes speak of another box format than the one they were read in."""
        start, far = self.xywh[:, :2], self.xywh[:, 2:]
        if not np.isfinite(self.xywh).all():
            return []
        readings = {"xywh": (start, start + far), "xyxy": (start, far), "cxcywh": (start - far / 2, start + far / 2)}
        if (self.xywh >= 0).all() and (self.xywh <= 1).all() and (self.size > 2).all():
            fitting = [
                f"{name}_normalized"
                for name, (low, high) in readings.items()
                if (low > -0.01).all() and (high < 1.01).all() and (high > low).all()
            ]
            advice = f"give --bbox_format {' or '.join(fitting or [f'{name}_normalized' for name in readings])}"
            return self._whole("boxes normalised where pixels were promised", advice)
        if self._sticks_out(*readings.pop("xywh")).mean() < MANY:
            return []
        fitting = [
            name
            for name, (low, high) in readings.items()
            if not self._sticks_out(low, high).any() and (high > low).all()
        ]
        if fitting:
            return self._whole("boxes in another format", f"give --bbox_format {' or '.join(fitting)}")
        return self._whole("many boxes over the edge of the image", "is `--bbox_format` right?", "noted")

    def _whole(self, problem: str, advice: str, action: Action = "stop") -> list[Finding]:
        """A finding about all boxes, shown on the first."""
        row = f"{self.split} row {self.row[0]}, object {self.number[0]} and all others of the split"
        return [Finding(problem, self.files[self.row[0]], row, _shown(self.xywh[0]), action, advice)]

    def _found(
        self, where: np.ndarray, problem: str, values: np.ndarray, action: Action = "stop", advice: str = ""
    ) -> list[Finding]:
        found = []
        for index in np.flatnonzero(where):
            row = f"{self.split} row {self.row[index]}, object {self.number[index]}"
            width, height = self.size[index]
            value = _shown(values[index])
            value = f"{value} in {width:.0f}x{height:.0f}" if values is self.xywh else value
            found.append(Finding(problem, self.files[self.row[index]], row, value, action, advice))
        return found


def _flat(lists) -> np.ndarray:
    return pc.list_flatten(lists).to_numpy(zero_copy_only=False)


def _shown(value: np.ndarray) -> object:
    """A value of an array as one writes it."""
    return np.round(value, 3).tolist()
