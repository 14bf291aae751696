from __future__ import annotations

from types import SimpleNamespace

import pytest
import reference_loops as loops
import torch
import zoo
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher as DetrHungarianMatcher
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from hf_detrkd.families import adapter_for
from hf_detrkd.matching import GroundTruthMatcher, HungarianMatcher, Match, identity_match, pair_layers

KINDS = ["sigmoid", "softmax"]


def random_boxes(*shape):
    centre, size = torch.rand(*shape, 2) * 0.6 + 0.2, torch.rand(*shape, 2) * 0.35 + 0.05
    return torch.cat([centre, size], -1)


def random_view(layers=2, batch=2, queries=4, classes=3, kind="sigmoid"):
    """All of a view that the matchers read."""
    logits = torch.randn(layers, batch, queries, classes + (kind == "softmax")) * 2
    return SimpleNamespace(logits=logits, boxes=random_boxes(layers, batch, queries), classification=kind)


def random_targets(sizes, classes=3):
    return [{"class_labels": torch.randint(0, classes, (n,)), "boxes": random_boxes(n)} for n in sizes]


def pairs_of(match: Match, image: int):
    real = match.weight[image] > 0
    return list(zip(match.student_index[image][real].tolist(), match.teacher_index[image][real].tolist(), strict=True))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (3, 6, [2, 4, 6]),
        (6, 3, [1, 1, 2, 2, 3, 3]),
        (6, 4, [1, 2, 2, 3, 4, 4]),
        (4, 6, [2, 3, 5, 6]),
        (5, 6, [2, 3, 4, 5, 6]),
        (1, 6, [6]),
    ],
)
def test_pair_layers(student, teacher, expected):
    assert [layer + 1 for layer in pair_layers(student, teacher)] == expected


def test_identity_match():
    match = identity_match(2, 3)
    values = torch.randn(2, 3, 5, 2)
    assert torch.equal(match.student(values), values)
    assert torch.equal(match.teacher(values), values)
    assert match.weight.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_match_gathers_image_by_image():
    match = Match(torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0, 1], [3, 2]]), torch.ones(2, 2))
    student, teacher = torch.arange(6).view(2, 3), torch.arange(16).view(2, 4, 2)
    assert match.student(student).tolist() == [[2, 0], [4, 4]]
    assert match.teacher(teacher).tolist() == [[[0, 1], [2, 3]], [[14, 15], [12, 13]]]


# --- prediction against prediction


@pytest.mark.parametrize("student_kind", KINDS)
@pytest.mark.parametrize("teacher_kind", KINDS)
@pytest.mark.parametrize(("student_queries", "teacher_queries"), [(4, 4), (3, 5), (5, 3)])
def test_hungarian_equals_trying_all(student_kind, teacher_kind, student_queries, teacher_queries):
    torch.manual_seed(0)
    student = random_view(3, queries=student_queries, kind=student_kind)
    teacher = random_view(6, queries=teacher_queries, kind=teacher_kind)
    matches = HungarianMatcher()(student, teacher)
    assert len(matches) == 3
    for k, match in enumerate(matches):
        layer = [1, 3, 5][k]
        assert match.weight.shape == (2, min(student_queries, teacher_queries))
        for image in range(2):
            s_logits, t_logits = student.logits[k, image].tolist(), teacher.logits[layer, image].tolist()
            s_boxes, t_boxes = student.boxes[k, image].tolist(), teacher.boxes[layer, image].tolist()
            cost = [
                [
                    loops.prediction_cost(s_logits[i], s_boxes[i], t_logits[j], t_boxes[j], student_kind, teacher_kind)
                    for j in range(teacher_queries)
                ]
                for i in range(student_queries)
            ]
            assert pairs_of(match, image) == loops.cheapest_pairs(cost)


def test_hungarian_hand_computed_two_queries():
    """methods.md 3.6, case 1."""
    a, b = [0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]
    student = view_of([[0.5, 0.5], [0.5, 0.5]], [b, a])
    teacher = view_of([[0.9, 0.1], [0.2, 0.6]], [a, b])
    matcher = HungarianMatcher()
    expected = torch.tensor([[7.386294, -0.613706], [-0.613706, 7.386294]])
    torch.testing.assert_close(matcher._cost(student, 0, teacher, 0)[0], expected, atol=1e-5, rtol=0)
    assert pairs_of(matcher(student, teacher)[0], 0) == [(0, 1), (1, 0)]


def test_hungarian_hand_computed_three_queries():
    """methods.md 5.6, case 1."""
    teacher = view_of(
        [[0.9, 0.1], [0.2, 0.8], [0.1, 0.1]],
        [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 1, 1]],
    )
    student = view_of(
        [[0.3, 0.6], [0.2, 0.2], [0.7, 0.2]],
        [[0.75, 0.75, 0.4, 0.4], [0.5, 0.5, 0.9, 0.9], [0.25, 0.25, 0.5, 0.5]],
    )
    matcher = HungarianMatcher()
    expected = torch.tensor(
        [[9.086400, 0.838053, 9.497149], [7.960001, 7.960001, 0.103546], [-1.196822, 8.366692, 8.481016]]
    )
    torch.testing.assert_close(matcher._cost(student, 0, teacher, 0)[0], expected, atol=1e-5, rtol=0)
    assert pairs_of(matcher(student, teacher)[0], 0) == [(0, 1), (1, 2), (2, 0)]


def view_of(probs, boxes):
    return SimpleNamespace(
        logits=torch.tensor(probs).logit()[None, None], boxes=torch.tensor(boxes)[None, None], classification="sigmoid"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hungarian_finds_a_shuffle(kind):
    torch.manual_seed(1)
    teacher = random_view(2, 3, 20, kind=kind)
    order = torch.stack([torch.randperm(20) for _ in range(3)])
    index = order[None, :, :, None].expand(2, -1, -1, -1)
    student = SimpleNamespace(
        logits=teacher.logits.gather(2, index.expand(-1, -1, -1, teacher.logits.shape[-1])),
        boxes=teacher.boxes.gather(2, index.expand(-1, -1, -1, 4)),
        classification=kind,
    )
    for k, match in enumerate(HungarianMatcher(class_cost=5)(student, teacher)):
        torch.testing.assert_close(match.student(student.boxes[k]), match.teacher(teacher.boxes[k]))
        assert torch.equal(match.teacher_index, order)


def test_hungarian_holds_no_graph_and_takes_bfloat16():
    student, teacher = random_view(), random_view()
    student.logits.requires_grad_()
    (match, _) = HungarianMatcher()(student, teacher)
    assert not match.weight.requires_grad
    half = SimpleNamespace(**{k: v.bfloat16() if torch.is_tensor(v) else v for k, v in vars(teacher).items()})
    assert len(HungarianMatcher()(half, teacher)) == 2


def test_hungarian_survives_nan():
    student, teacher = random_view(), random_view()
    student.logits[0, 0, 1] = float("nan")
    (match, _) = HungarianMatcher()(student, teacher)
    assert sorted(match.teacher_index[0].tolist()) == [0, 1, 2, 3]


def test_hungarian_takes_the_layers_it_is_given():
    torch.manual_seed(2)
    student, teacher = random_view(2), random_view(2)
    last = HungarianMatcher()(student, teacher)[1]
    both = HungarianMatcher()(student, teacher, layers=(1, 1))
    assert torch.equal(both[1].teacher_index, last.teacher_index)
    first = SimpleNamespace(logits=student.logits[:1], boxes=student.boxes[:1], classification="sigmoid")
    alone = HungarianMatcher()(first, teacher, layers=(1,))[0]
    assert torch.equal(both[0].teacher_index, alone.teacher_index)


def test_hungarian_refuses_other_classes():
    with pytest.raises(ValueError, match=r"2 images and 3 classes, the teacher's 2 and 5.*LabelMap"):
        HungarianMatcher()(random_view(classes=3), random_view(classes=5, kind="softmax"))


@pytest.mark.parametrize("matcher", [HungarianMatcher, GroundTruthMatcher])
@pytest.mark.parametrize("costs", [(0, 0, 0), (1, -1, 2)])
def test_refuses_costs_that_mean_nothing(matcher, costs):
    with pytest.raises(ValueError, match=r"'l1_cost': .*at least one of them > 0"):
        matcher(*costs)


# --- prediction against targets


@pytest.mark.parametrize("kind", KINDS)
def test_ground_truth_equals_trying_all(kind):
    torch.manual_seed(3)
    view, targets = random_view(3, 4, 5, kind=kind), random_targets([2, 0, 3, 1])
    matches = GroundTruthMatcher(classification=kind)(view.logits, view.boxes, targets)
    assert len(matches) == 3
    for k, match in enumerate(matches):
        assert match.student_index.shape == (4, 3)
        for image, target in enumerate(targets):
            cost = [
                [
                    loops.ground_truth_cost(logits, box, label, target_box, kind)
                    for label, target_box in zip(target["class_labels"], target["boxes"].tolist(), strict=True)
                ]
                for logits, box in zip(view.logits[k, image].tolist(), view.boxes[k, image].tolist(), strict=True)
            ]
            assert pairs_of(match, image) == loops.cheapest_pairs(cost)


def transformers_matchers():
    rt = {
        "matcher_class_cost": 2.0,
        "matcher_bbox_cost": 5.0,
        "matcher_giou_cost": 2.0,
        "matcher_alpha": 0.3,
        "matcher_gamma": 1.5,
    }
    return {
        "detr": (DetrHungarianMatcher(1, 5, 2), "softmax"),
        "deformable_detr": (DeformableDetrHungarianMatcher(2, 5, 2), "sigmoid"),
        "rt_detr": (RTDetrHungarianMatcher(SimpleNamespace(use_focal_loss=True, **rt)), "sigmoid"),
        "rt_detr_softmax": (RTDetrHungarianMatcher(SimpleNamespace(use_focal_loss=False, **rt)), "softmax"),
    }


@pytest.mark.parametrize("name", transformers_matchers())
@pytest.mark.parametrize("sizes", [(7, 0, 40), (1, 3, 2), (0, 0, 0)])
def test_ground_truth_is_transformers_matching(name, sizes):
    """Also where an image has more targets than the model has queries, and where there are none."""
    torch.manual_seed(4)
    theirs, kind = transformers_matchers()[name]
    ours = GroundTruthMatcher.like(theirs)
    view, targets = random_view(4, 3, 30, classes=8, kind=kind), random_targets(sizes, classes=8)
    for layer, pairs in enumerate(ours.pairs(view.logits, view.boxes, targets)):
        expected = theirs({"logits": view.logits[layer], "pred_boxes": view.boxes[layer]}, targets)
        for (query, target), (query_expected, target_expected) in zip(pairs, expected, strict=True):
            assert torch.equal(query, query_expected)
            assert torch.equal(target, target_expected)


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_ground_truth_matches_as_the_config_says(family):
    model = zoo.build(family)
    model.config.matcher_alpha, model.config.matcher_gamma, model.config.matcher_bbox_cost = 0.6, 1.5, 3.0
    adapter = adapter_for(model)
    ours = GroundTruthMatcher(**adapter.matching_costs, classification=adapter.classification)
    assert ours == GroundTruthMatcher.like(RTDetrHungarianMatcher(model.config))


def test_ground_truth_knows_what_it_does_not_know():
    assert GroundTruthMatcher.like(LwDetrHungarianMatcher(1, 5, 2)) is None


def test_ground_truth_layers_may_differ_in_queries():
    torch.manual_seed(5)
    few, many, targets = random_view(1, 2, 4), random_view(1, 2, 9), random_targets([2, 3])
    matcher = GroundTruthMatcher()
    together = matcher([few.logits[0], many.logits[0]], [few.boxes[0], many.boxes[0]], targets)
    for match, view in zip(together, (few, many), strict=True):
        assert torch.equal(match.student_index, matcher(view.logits, view.boxes, targets)[0].student_index)


def test_ground_truth_without_any_target():
    view = random_view()
    match = GroundTruthMatcher()(view.logits, view.boxes, random_targets([0, 0]))[0]
    assert match.student_index.shape == match.weight.shape == (2, 0)
    assert match.student(view.boxes[0]).shape == (2, 0, 4)
    assert match.teacher(torch.zeros(2, 0, 4)).shape == (2, 0, 4)
