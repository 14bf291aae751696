"""CL-DETR: what becomes a pseudo label, and the set loss with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference_loops as loops
import torch
import zoo

from hf_detrkd import DistillationModel
from hf_detrkd.families import adapter_for
from hf_detrkd.methods import build_methods
from hf_detrkd.methods.cl_detr import CLDetr, CLDetrConfig, pseudo_targets
from hf_detrkd.model import view_targets

EMPTY = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}


def box(left, top, right, bottom, unit=10.0):
    """From corners in units of 1 / ``unit`` of the image."""
    return [(left + right) / 2 / unit, (top + bottom) / 2 / unit, (right - left) / unit, (bottom - top) / unit]


def target(boxes, labels):
    return {"class_labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}


def views(student="detr", teacher="dab-detr", batch=None):
    adapters = [adapter_for(zoo.build(name, seed=seed)) for seed, name in enumerate((student, teacher))]
    images = {"pixel_values": (batch or zoo.batch())["pixel_values"]}
    return [adapter.forward(images)[1] for adapter in adapters]


# ------------------------------------------------------------------------------------------------------ pseudo targets


def test_overlapping_predictions_are_dropped_by_hand():
    """K = 2, target (0,0,4,4), predictions (0,0,4,3) with IoU .75 and (2,0,6,4) with IoU 1/3: two targets."""
    scores = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.05, 0.05]]])
    boxes = torch.tensor([[box(0, 0, 4, 3), box(2, 0, 6, 4), box(5, 5, 9, 9)]])
    (extended,) = pseudo_targets(scores, boxes, [target([box(0, 0, 4, 4)], [1])], top_k=2)
    assert extended["class_labels"].tolist() == [1, 1]
    torch.testing.assert_close(extended["boxes"], torch.tensor([box(0, 0, 4, 4), box(2, 0, 6, 4)]))


@pytest.mark.parametrize(("max_overlap", "number"), [(0.75, 1), (0.7500001, 2)])
def test_the_threshold_itself_is_dropped(max_overlap, number):
    """Of any class: the prediction says class 0, the target 1."""
    scores, boxes = torch.tensor([[[0.9, 0.1]]]), torch.tensor([[[0.5, 0.375, 1.0, 0.75]]])
    whole = target([[0.5, 0.5, 1.0, 1.0]], [1])
    (extended,) = pseudo_targets(scores, boxes, [whole], top_k=1, max_overlap=max_overlap)
    assert len(extended["boxes"]) == number


def test_the_best_are_of_queries_and_classes_together():
    """A query may give two objects; the scores decide over all."""
    scores = torch.tensor([[[0.9, 0.8], [0.7, 0.1]], [[0.1, 0.2], [0.3, 0.05]]])
    boxes = torch.tensor([[box(0, 0, 2, 2), box(4, 4, 6, 6)]] * 2)
    first, second = pseudo_targets(scores, boxes, [EMPTY, EMPTY], top_k=3)
    assert first["class_labels"].tolist() == [0, 1, 0]
    torch.testing.assert_close(first["boxes"], boxes[0, [0, 0, 1]])
    assert second["class_labels"].tolist() == [0, 1, 0]
    torch.testing.assert_close(second["boxes"], boxes[1, [1, 0, 0]])
    assert [len(t["boxes"]) for t in pseudo_targets(scores, boxes, [EMPTY, EMPTY], top_k=100)] == [4, 4]
    kept = pseudo_targets(scores, boxes, [EMPTY, EMPTY], top_k=3, min_score=0.75)
    assert [len(t["boxes"]) for t in kept] == [2, 0]


def test_boxes_are_cut_to_the_image():
    """D-FINE's may leave it. What lies outside altogether is no object."""
    scores = torch.full((1, 2, 1), 0.9)
    boxes = torch.tensor([[box(-4, 2, 4, 4), box(12, 2, 14, 4)]])
    (extended,) = pseudo_targets(scores, boxes, [EMPTY])
    torch.testing.assert_close(extended["boxes"], torch.tensor([box(0, 2, 4, 4)]))


def test_objects_of_classes_that_the_teacher_lacks_are_no_pseudo_objects():
    """The teacher calls them something else; that they are targets of no term doesn't make them that."""
    labels = [{"class_labels": torch.tensor([3, 1]), "boxes": torch.tensor([box(0, 0, 4, 4), box(6, 6, 9, 9)])}]
    (targets,) = view_targets(labels, (0, 1))
    assert targets["class_labels"].tolist() == [1] and torch.equal(targets["other_boxes"], labels[0]["boxes"][:1])
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.1]]])
    boxes = torch.tensor([[box(0, 0, 4, 4), box(1, 6, 3, 9)]])
    (extended,) = pseudo_targets(scores, boxes, [targets], top_k=2, min_score=0.5)
    assert extended["class_labels"].tolist() == [1, 0]
    torch.testing.assert_close(extended["boxes"], torch.cat([targets["boxes"], boxes[0, 1:]]))


def test_targets_come_first_and_are_left_alone():
    targets = zoo.batch()["labels"]
    before = [{name: value.clone() for name, value in image.items()} for image in targets]
    scores, boxes = torch.rand(2, 6, zoo.CLASSES), torch.rand(2, 6, 4) * 0.3 + 0.2
    for old, same, extended in zip(before, targets, pseudo_targets(scores, boxes, targets), strict=True):
        for name, value in old.items():
            assert torch.equal(same[name], value)
            assert torch.equal(extended[name][: len(value)], value)
            assert extended[name].dtype == value.dtype


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("student", ["detr", "dab-detr"])
@pytest.mark.parametrize("labelled", [True, False])
def test_by_the_slowest_obvious_python(student, labelled):
    """Of softmax and sigmoid heads; without labels it is the set loss of the teacher's ten best."""
    batch = zoo.batch()
    student_view, teacher_view = views(student, "rt_detr", batch)
    targets = batch["labels"] if labelled else [EMPTY, EMPTY]
    method = CLDetr(CLDetrConfig(top_k=2), student_view.adapter, teacher_view.adapter)
    terms = method(student_view, teacher_view, targets, None)

    scores, boxes = teacher_view.class_probs()[-1], teacher_view.boxes[-1]
    extended = pseudo_targets(scores, boxes, targets, top_k=2)
    assert sum(len(t["boxes"]) for t in extended) > sum(len(t["boxes"]) for t in targets)
    lists = [{name: value.tolist() for name, value in image.items()} for image in extended]
    expected = dict.fromkeys(terms, 0.0)
    kind = student_view.classification
    costs = tuple(student_view.adapter.matching_costs[name] for name in ("class_cost", "l1_cost", "giou_cost"))
    for logits, places in zip(student_view.logits.tolist(), student_view.boxes.tolist(), strict=True):
        pairs = []
        for z, b, image in zip(logits, places, lists, strict=True):
            cost = [
                [
                    loops.ground_truth_cost(z[q], b[q], label, t, kind, costs)
                    for label, t in zip(image["class_labels"], image["boxes"], strict=True)
                ]
                for q in range(len(z))
            ]
            pairs.append(dict(loops.cheapest_pairs(cost)))
        layer = loops.set_loss(logits, places, kind, pairs, lists)
        expected = {name: expected[name] + layer[name] for name in expected}
    for name, value in terms.items():
        torch.testing.assert_close(value.item(), expected[name], rtol=1e-4, atol=1e-5)


def test_a_teacher_that_says_the_targets_adds_nothing():
    batch = zoo.batch(targets=(2,))
    student_view, teacher_view = views(batch=batch)
    targets = batch["labels"]
    certain = teacher_view.logits.new_full((1, 2, 2, zoo.CLASSES), -9.0)
    for image, t in enumerate(targets):
        certain[0, image, torch.arange(2), t["class_labels"]] = 9.0
    boxes = torch.stack([t["boxes"] for t in targets])[None]
    agreeing = replace(teacher_view, logits=certain, boxes=boxes)
    method = CLDetr(CLDetrConfig(min_score=0.5), student_view.adapter, teacher_view.adapter)
    silent = replace(teacher_view, logits=teacher_view.logits * 0 - 9)
    expected = method(student_view, silent, targets, None)
    for name, value in method(student_view, agreeing, targets, None).items():
        torch.testing.assert_close(value, expected[name])


def test_nothing_at_all_is_finite():
    """No target and no prediction above the score: all queries learn that there is nothing."""
    student_view, teacher_view = views()
    silent = replace(teacher_view, logits=teacher_view.logits * 0 - 9)
    method = CLDetr(CLDetrConfig(min_score=0.5), student_view.adapter, teacher_view.adapter)
    terms = method(student_view, silent, [EMPTY, EMPTY], None)
    assert terms["class"] > 0 and terms["l1"] == terms["giou"] == 0
    sum(terms.values()).backward()


def test_more_pseudo_objects_than_queries():
    adapters = [adapter_for(zoo.build("dab-detr", seed=s, num_queries=q)) for s, q in ((1, 3), (2, 20))]
    batch = zoo.batch()
    student_view, teacher_view = (a.forward({"pixel_values": batch["pixel_values"]})[1] for a in adapters)
    terms = CLDetr(CLDetrConfig(), *adapters)(student_view, teacher_view, batch["labels"], None)
    assert all(value.isfinite() for value in terms.values())


def test_training_without_labels_lowers_the_terms():
    """And with `detection_weight=0`, as its images have no labels to detect."""
    student, teacher = (adapter_for(zoo.build("conditional_detr", seed=seed)) for seed in (1, 2))
    module = DistillationModel(
        student.model, student, build_methods(["cl_detr"], {"top_k": 3}, student, teacher), detection_weight=0.0
    ).train()
    batch = zoo.batch(targets=(0,))
    with torch.no_grad():
        view = teacher.forward({"pixel_values": batch["pixel_values"]})[1]
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = module(**batch, teacher_view=view).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "`top_k` is 0; it must be 1 or more"),
        ({"max_overlap": 70.0}, "`max_overlap` is 70.0; it is between 0 and 1"),
        ({"min_score": -0.1}, "`min_score` is -0.1; it is between 0 and 1"),
        ({"weights": {"class": 0, "l1": 0, "giou": 0}}, "all `weights` of cl_detr are 0.*Use method none"),
    ],
)
def test_refusals(settings, message):
    adapter = adapter_for(zoo.build("detr"))
    with pytest.raises(ValueError, match=message):
        build_methods(["cl_detr"], settings, adapter, adapter)
