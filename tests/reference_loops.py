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


def overlap(a, b):
    """Intersection and union."""
    (al, at, ar, ab), (bl, bt, br, bb) = corners(a), corners(b)
    intersection = max(0, min(ar, br) - max(al, bl)) * max(0, min(ab, bb) - max(at, bt))
    return intersection, (ar - al) * (ab - at) + (br - bl) * (bb - bt) - intersection


def iou(a, b):
    intersection, union = overlap(a, b)
    return intersection / union


def generalized_iou(a, b):
    (al, at, ar, ab), (bl, bt, br, bb) = corners(a), corners(b)
    intersection, union = overlap(a, b)
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


def set_loss(logits, boxes, kind, pairs, targets, quality=False):
    """The detection loss of lists of images; ``pairs`` has per image {query: target}."""
    number = max(1, sum(len(image["class_labels"]) for image in targets))
    classes = l1_sum = giou_sum = weights = 0.0
    for image_logits, image_boxes, chosen, image in zip(logits, boxes, pairs, targets, strict=True):
        for query, z in enumerate(image_logits):
            label = image["class_labels"][chosen[query]] if query in chosen else None
            if kind == "softmax":
                weight = 0.1 if label is None else 1.0
                classes -= weight * math.log(softmax(z)[-1 if label is None else label])
                weights += weight
            elif quality:
                for c, x in enumerate(z):
                    p, fits = sigmoid(x), 0.0
                    if c == label:
                        fits = iou(image_boxes[query], image["boxes"][chosen[query]])
                    weight = fits if c == label else 0.75 * p**2
                    classes -= weight * (fits * math.log(p) + (1 - fits) * math.log(1 - p))
            else:
                for c, x in enumerate(z):
                    p = sigmoid(x) if c == label else 1 - sigmoid(x)
                    classes -= (0.25 if c == label else 0.75) * (1 - p) ** 2 * math.log(p)
        for query, target in chosen.items():
            l1_sum += l1_distance(image_boxes[query], image["boxes"][target])
            giou_sum += 1 - generalized_iou(image_boxes[query], image["boxes"][target])
    return {
        "class": classes / (weights if kind == "softmax" else number),
        "l1": l1_sum / number,
        "giou": giou_sum / number,
    }


def target_aware_mask(states, quality, cells, floor=0.01):
    """Of unit vectors: one weight per cell."""
    similar = [
        sum(q * sum(a * b for a, b in zip(state, cell, strict=True)) for q, state in zip(quality, states, strict=True))
        for cell in cells
    ]
    raised = [max(x, floor) for x in similar]
    return [x / max(raised) for x in raised]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def object_relation(objects, scale=1.0, weights=None):
    """psi of a list of objects, each a list of numbers: rows of probabilities."""
    rows = []
    for i, a in enumerate(objects):
        rows.append(
            softmax([(1.0 if weights is None else weights[i][j]) * dot(a, b) / scale for j, b in enumerate(objects)])
        )
    return rows


def related_pairs(objects, scale=1.0):
    """Weights of mean 1 of the pairs of a list of objects."""
    similarities = [math.exp(dot(a, b) / scale) for a in objects for b in objects]
    n = len(objects)
    flat = [n * n * x / sum(similarities) for x in similarities]
    return [flat[i * n : (i + 1) * n] for i in range(n)]


def instance_distance(student, teacher, present):
    """Of lists of images, each a list of objects, each a list of numbers."""
    distances = []
    for ours, theirs, real in zip(student, teacher, present, strict=True):
        for a, b, there in zip(ours, theirs, real, strict=True):
            if there:
                distances.append(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))
    return sum(distances) / len(distances) if distances else 0.0


def graph_reasoning(state, projection, adjacency, bias, update):
    """What the cells get back, a list of rows of cells, from rows of cells; ``bias`` of nodes also means ReLU."""
    cells = len(state[0])
    nodes = [[dot(x, p) / cells for p in projection] for x in state]  # V
    mixed = []
    for v in nodes:
        row = [value - dot(adjacency[k], v) - (bias[k] if bias else 0.0) for k, value in enumerate(v)]
        mixed.append([max(x, 0.0) for x in row] if bias else row)
    numbers, kinds = len(mixed), len(projection)
    states = [[dot(update[i], [mixed[j][k] for j in range(numbers)]) for k in range(kinds)] for i in range(numbers)]
    return [[dot(z, [p[cell] for p in projection]) for cell in range(cells)] for z in states]


def query_groups(boxes, assigned, targets, threshold=0.0, per_target=20):
    """QSKD's positives and hard negatives of one image, each {query: (target, GIoU)}; ``assigned`` is {query: target}."""
    positive = {q: (t, generalized_iou(boxes[q], targets[t])) for q, t in assigned.items()}
    near = {t: [] for t in range(len(targets))}
    for q, box in enumerate(boxes):
        if q not in assigned and targets:
            overlap, t = max((generalized_iou(box, gt), -t) for t, gt in enumerate(targets))
            if overlap > threshold:
                near[-t].append((overlap, q))
    hard = {
        q: (t, overlap) for t, found in near.items() for overlap, q in sorted(found, key=lambda x: -x[0])[:per_target]
    }
    return positive, hard


def splat(weights, locations, levels, shapes):
    """The map of one query: ``weights`` and ``locations`` are lists of heads, each a list of points."""
    cells = [0.0] * sum(h * w for h, w in shapes)
    for head, places in zip(weights, locations, strict=True):
        point = start = 0
        for points, (h, w) in zip(levels, shapes, strict=True):
            for _ in range(points):
                x, y = places[point][0] * w - 0.5, places[point][1] * h - 0.5
                for row in range(h):
                    for column in range(w):
                        share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                        cells[start + row * w + column] += share * head[point] / len(weights)
                point += 1
            start += h * w
    return cells


def attention_rows(maps, layer, image, shapes):
    """The head-averaged map of every query of one image of a view."""
    weights = maps.weights[layer][image].tolist()
    if maps.kind == "sampled":
        locations = maps.locations[layer][image].tolist()
        return [splat(w, x, maps.levels, shapes) for w, x in zip(weights, locations, strict=True)]
    return [[sum(cells) / len(cells) for cells in zip(*query, strict=True)] for query in zip(*weights, strict=True)]


def row_kl(student, teacher, floor):
    """Of two rows over the same cells."""
    s, t = ([x / sum(row) for x in row] for row in (student, teacher))
    return sum((b + floor) * math.log((b + floor) / (a + floor)) for a, b in zip(s, t, strict=True))


def row_mse(student, teacher):
    s, t = ([x / sum(row) for x in row] for row in (student, teacher))
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def real_pairs(match, image):
    """[(student, teacher), ...] of one image of a match."""
    rows = (x[image].tolist() for x in (match.student_index, match.teacher_index, match.weight))
    return [(s, t) for s, t, weight in zip(*rows, strict=True) if weight > 0]


def prediction_terms(student, student_layer, teacher, teacher_layer, pairs):
    """Class, L1 and GIoU distances of the pairs of all images, lists of images; both heads of one kind."""
    items = [(image, s, t) for image, chosen in enumerate(pairs) for s, t in chosen]
    views = ((student, student_layer, 1), (teacher, teacher_layer, 2))
    logits, boxes = (
        [[getattr(view, name)[layer][item[0]][item[which]].tolist() for item in items] for view, layer, which in views]
        for name in ("logits", "boxes")
    )
    ones = [1.0] * len(items)
    divergence = softmax_kl if student.classification == "softmax" else bernoulli_kl
    return {"class": divergence(*logits, ones), "l1": l1(*boxes, ones), "giou": giou(*boxes, ones)}


def qskd(student, teacher, matcher, targets, pairing="set", masks="mean", projection="if_needed"):
    """The terms for two models of one family, width and depth."""
    layers, images = len(teacher.boxes), range(len(targets))
    groups = {}
    for role, view in (("student", student), ("teacher", teacher)):
        for layer, match in enumerate(matcher(view, targets)):
            for image in images:
                boxes, gt = view.boxes[layer][image].tolist(), targets[image]["boxes"].tolist()
                groups[role, layer, image] = query_groups(boxes, dict(real_pairs(match, image)), gt)

    terms = dict.fromkeys(("class", "l1", "giou", "feature"), 0.0)
    for layer in range(layers):
        pairs = []
        for image in images:
            (own, near), (others, nears) = groups["student", layer, image], groups["teacher", layer, image]
            chosen = [(s, t) for s, (gt, _) in own.items() for t, (other, _) in others.items() if gt == other]
            if pairing == "set":
                kinds = student.classification, teacher.classification
                rows, columns = sorted(near), sorted(nears)
                cost = [
                    [
                        prediction_cost(
                            student.logits[layer][image][s].tolist(),
                            student.boxes[layer][image][s].tolist(),
                            teacher.logits[layer][image][t].tolist(),
                            teacher.boxes[layer][image][t].tolist(),
                            *kinds,
                        )
                        for t in columns
                    ]
                    for s in rows
                ]
                chosen += [(rows[s], columns[t]) for s, t in cheapest_pairs(cost)] if rows else []
            else:
                for gt in range(len(targets[image]["boxes"])):
                    ranked = [
                        sorted((q for q in side if side[q][0] == gt), key=lambda q, side=side: -side[q][1])
                        for side in (near, nears)
                    ]
                    chosen += zip(*ranked, strict=False)
            pairs.append(chosen)
        for name, value in prediction_terms(student, layer, teacher, layer, pairs).items():
            terms[name] += value

    real = teacher.memory_mask.tolist() if teacher.memory_mask is not None else None
    total = cells = 0.0
    for image in images:
        keep = real[image] if real else [True] * teacher.memory.shape[1]
        found = []
        for layer in range(layers):
            rows = attention_rows(teacher.cross_attentions, layer, image, teacher.memory_shapes)
            selected = {**groups["teacher", layer, image][0], **groups["teacher", layer, image][1]}
            mask = [
                sum((1 + overlap) * rows[q][p] for q, (_, overlap) in selected.items())
                / max(1, len(selected))
                * keep[p]
                for p in range(len(keep))
            ]
            found.append([m / max(*mask, 1e-6) for m in mask])
        if masks == "mean":
            found = [[sum(values) / layers for values in zip(*found, strict=True)]]
        error = (student.memory[image] - teacher.memory[image]).square().mean(-1).tolist()
        total += sum(mask[p] ** 2 * error[p] for mask in found for p in range(len(keep)) if keep[p])
        cells += sum(keep)
    terms["feature"] = total / cells
    return terms
