"""Measures that explain why a student gains from its teacher, or doesn't."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from .data.collator import student_and_teacher_inputs
from .families import FamilyAdapter
from .matching import HungarianMatcher, ground_truth_matches, pair_layers
from .model import view_targets
from .view import DetrView

DETECTION_SCORE = 0.3
"""From which score on a query of the teacher counts as a detection. Our choice: well above the many queries that say
nothing, and low enough for teachers that were trained for a short time, whose scores are low."""
PARTNER_IOU = 0.5
"""PASCAL VOC's threshold, COCO's AP50."""


@torch.no_grad()
def diagnose(
    students: Mapping[str, FamilyAdapter],
    teacher: FamilyAdapter,
    batches: Iterable[Mapping[str, Any]],
    score: float = DETECTION_SCORE,
) -> dict[str, Any]:
    """How students and their teacher see the same images.

    Args:
        students: by name, for example the distilled student and its twin; their views and the teacher's have the same
            classes.
        batches: as `DetectionCollator` makes them, on the models' device.
        score: see `without_partner`.

    Returns:
        ``matching_agreement``: by student, of each decoder layer, the share in [0, 1] of `agreeing_targets`;
        ``teacher_detections`` and ``without_partner``: their number, and the share of them that no object explains;
        ``images``.
    """
    agreeing = {name: torch.zeros(0) for name in students}
    targets_seen = detections = alone = images = 0
    for adapter in (teacher, *students.values()):
        adapter.model.eval()
    for batch in batches:
        pixels, teacher_pixels = student_and_teacher_inputs(batch)
        labels = pixels.pop("labels")
        _, seen = teacher.forward(teacher_pixels)
        targets = []
        for name, student in students.items():
            targets = view_targets(labels, student.classes)
            counts = agreeing_targets(student.forward(pixels)[1], seen, targets)
            agreeing[name] = counts if len(agreeing[name]) == 0 else agreeing[name] + counts
        found, unexplained = without_partner(seen, targets, score)
        detections, alone = detections + found, alone + unexplained
        targets_seen += sum(len(target["class_labels"]) for target in targets)
        images += len(labels)
    return {
        "matching_agreement": {name: (counts / max(targets_seen, 1)).tolist() for name, counts in agreeing.items()},
        "teacher_detections": detections,
        "without_partner": alone / detections if detections else None,
        "images": images,
    }


def agreeing_targets(student: DetrView, teacher: DetrView, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(L of the student,) the number of targets on whose owner the two agree.

    Each model gives a target to one query, by the matching it is trained with. The two agree where the student's query is
    also the one that looks most like the teacher's query: its partner in the `HungarianMatcher`'s pairing of predictions.
    So the measure doesn't depend on the numbers and the order of the queries.
    """
    layers = pair_layers(len(student.logits), len(teacher.logits))
    owners, teacher_owners = ground_truth_matches(student, targets), ground_truth_matches(teacher, targets)
    pairs = HungarianMatcher()(student, teacher)
    counts = []
    for layer, teacher_layer in enumerate(layers):
        count = 0
        for image in range(len(targets)):
            partner = _table(pairs[layer], image)
            teachers = {target: query for query, target in _table(teacher_owners[teacher_layer], image).items()}
            owned = _table(owners[layer], image)
            count += sum(partner.get(query) == teachers.get(target, -1) for query, target in owned.items())
        counts.append(count)
    return torch.tensor(counts, dtype=torch.float32)


def _table(match, image: int) -> dict[int, int]:
    """One image's pairs of a match."""
    real = match.weight[image] > 0
    return dict(zip(match.student_index[image][real].tolist(), match.teacher_index[image][real].tolist(), strict=True))


def without_partner(teacher: DetrView, targets: Sequence[Mapping[str, Tensor]], score: float) -> tuple[int, int]:
    """The number of the teacher's detections, and of those that no object explains.

    A detection is a query of the last layer whose best class has at least ``score``; an object explains it if it has this
    class and overlaps it by an IoU of 0.5. What a teacher says beyond the ground truth is either its dark knowledge
    (objects that nobody labelled) or its mistakes; a method that copies it teaches both.
    """
    scores, classes = teacher.class_probs()[-1].max(-1)
    found = unexplained = 0
    for image, target in enumerate(targets):
        kept = scores[image] >= score
        boxes, objects = (
            box_convert(boxes.float(), "cxcywh", "xyxy") for boxes in (teacher.boxes[-1, image][kept], target["boxes"])
        )
        same = classes[image][kept][:, None] == target["class_labels"]
        explained = (same & (box_iou(boxes, objects) >= PARTNER_IOU)).any(-1)
        found += int(kept.sum())
        unexplained += int((~explained).sum())
    return found, unexplained
