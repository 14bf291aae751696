"""The losses and matchers again, as the slowest obvious Python: one number at a time, in double precision."""

from __future__ import annotations

import itertools
import math


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def softmax(logits):
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def weighted_mean(values, weights):
    """Of flat lists."""
    total = sum(weights)
    return sum(w * v for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def categorical_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax_kl(student, teacher, weights, temperature=1.0):
    """Of lists of items, each a list of logits."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        q, p = (softmax([z / temperature for z in logits]) for logits in (s, t))
        values.append(temperature**2 * categorical_kl(p, q))
    return weighted_mean(values, weights)


def bernoulli_kl(student, teacher, weights, temperature=1.0):
    """Of lists of items, each a list of logits."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        total = 0.0
        for a, b in zip(s, t, strict=True):
            q, p = sigmoid(a / temperature), sigmoid(b / temperature)
            total += categorical_kl([p, 1 - p], [q, 1 - q])
        values.append(temperature**2 * total)
    return weighted_mean(values, weights)


def corners(box):
    cx, cy, w, h = box
    return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2


def generalized_iou(a, b):
    (al, at, ar, ab), (bl, bt, br, bb) = corners(a), corners(b)
    intersection = max(0, min(ar, br) - max(al, bl)) * max(0, min(ab, bb) - max(at, bt))
    union = (ar - al) * (ab - at) + (br - bl) * (bb - bt) - intersection
    hull = (max(ar, br) - min(al, bl)) * (max(ab, bb) - min(at, bt))
    return intersection / union - (hull - union) / hull


def l1(student, teacher, weights, coordinates="sum"):
    """Of lists of boxes."""
    values = [l1_distance(s, t) / (4 if coordinates == "mean" else 1) for s, t in zip(student, teacher, strict=True)]
    return weighted_mean(values, weights)


def giou(student, teacher, weights):
    """Of lists of boxes."""
    return weighted_mean([1 - generalized_iou(s, t) for s, t in zip(student, teacher, strict=True)], weights)


def l1_distance(a, b):
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def prediction_cost(
    student_logits, student_box, teacher_logits, teacher_box, student_kind, teacher_kind, costs=(1, 5, 2)
):
    """Of one student query and one teacher query."""
    if student_kind == teacher_kind == "softmax":
        classes = -sum(p * math.log(q) for p, q in zip(softmax(teacher_logits), softmax(student_logits), strict=True))
    else:
        q, p = (
            softmax(logits)[:-1] if kind == "softmax" else [sigmoid(z) for z in logits]
            for logits, kind in ((student_logits, student_kind), (teacher_logits, teacher_kind))
        )
        classes = -sum(b * math.log(a) + (1 - b) * math.log(1 - a) for a, b in zip(q, p, strict=True))
    distance, overlap = l1_distance(student_box, teacher_box), generalized_iou(student_box, teacher_box)
    return costs[0] * classes + costs[1] * distance - costs[2] * overlap


def ground_truth_cost(logits, box, label, target_box, kind, costs=(1, 5, 2), alpha=0.25, gamma=2.0):
    """Of one query and one target."""
    if kind == "softmax":
        classes = -softmax(logits)[label]
    else:
        p = sigmoid(logits[label])
        classes = alpha * (1 - p) ** gamma * -math.log(p + 1e-8) - (1 - alpha) * p**gamma * -math.log(1 - p + 1e-8)
    return costs[0] * classes + costs[1] * l1_distance(box, target_box) - costs[2] * generalized_iou(box, target_box)


def cheapest_pairs(cost):
    """The pairs (row, column) of least total cost, found by trying all; ``cost`` is a list of rows."""
    rows, columns = len(cost), len(cost[0]) if cost else 0
    if rows <= columns:
        choices = (list(zip(range(rows), c, strict=True)) for c in itertools.permutations(range(columns), rows))
    else:
        choices = (sorted(zip(r, range(columns), strict=True)) for r in itertools.permutations(range(rows), columns))
    return min(choices, key=lambda pairs: sum(cost[r][c] for r, c in pairs))
