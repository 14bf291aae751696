"""Where distillation points lie, and what the teacher says there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import zoo

from hf_detrkd.families import adapter_for
from hf_detrkd.projectors import QueryProjector
from hf_detrkd.sampling import places_of, random_boxes, random_queries, teacher_queries


def views(student: str, teacher: str, **options):
    """Of two different models."""
    adapters = adapter_for(zoo.build(student, seed=1)), adapter_for(zoo.build(teacher, seed=2))
    with torch.no_grad():
        return [adapter.forward(zoo.batch(labels=False, **options))[1] for adapter in adapters]


def projector(student, teacher, **settings) -> QueryProjector:
    return QueryProjector(student.adapter, teacher.adapter, **settings)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["dab-detr", "deformable_detr_two_stage", "rt_detr", "lw_detr"])
def test_boxes_stand_where_they_are(name):
    view = views(name, name)[0]
    assert torch.equal(places_of(view), view.queries.reference)


@pytest.mark.parametrize("name", ["conditional_detr", "deformable_detr"])
def test_centres_get_the_size_of_the_answer(name):
    view = views(name, name)[0]
    places = places_of(view)
    assert torch.equal(places[..., :2], view.queries.reference)
    assert torch.equal(places[..., 2:], view.boxes[-1][..., 2:])


def test_queries_without_boxes_stand_at_their_answer():
    view = views("detr", "detr")[0]
    assert torch.equal(places_of(view), view.boxes[-1])


@pytest.mark.parametrize(
    ("distribution", "mean", "std"),
    [("uniform", 0.5, 1 / 12**0.5), ("logit_normal", 0.5, 0.2083)],  # sd of sigmoid(N(0, 1)): 0.2083
)
def test_random_boxes(distribution, mean, std):
    boxes = random_boxes(5000, rng(), distribution)
    assert boxes.shape == (5000, 4)
    assert boxes.dtype == torch.float32
    assert boxes.min() > 0  # a box without size has no overlap to learn from
    assert boxes.max() <= 1
    torch.testing.assert_close(boxes.mean(0), torch.full((4,), mean), rtol=0, atol=0.015)
    torch.testing.assert_close(boxes.std(0), torch.full((4,), std), rtol=0, atol=0.01)
    assert torch.equal(boxes, random_boxes(5000, rng(), distribution))
    assert not torch.equal(boxes, random_boxes(5000, rng(1), distribution))


def test_zero_is_drawn_as_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))
    assert torch.equal(random_boxes(2, None), torch.ones(2, 4))


def test_specific_points_are_the_teachers_queries():
    student, teacher = views("rt_detr", "dab-detr")
    points = teacher_queries(student, teacher, projector(student, teacher))
    assert points.answers is teacher
    assert torch.equal(points.student.reference, teacher.queries.reference)
    # content of DAB-DETR's queries is zeros, so the student lends its own
    assert points.student.content.any()


def test_specific_points_of_as_many_queries_as_the_teacher_has():
    student, teacher = views("rt_detr", "dab-detr")
    teacher = replace(
        teacher, boxes=teacher.boxes[:, :, :4], queries=teacher.queries.select(torch.arange(4).repeat(2, 1))
    )
    assert len(teacher_queries(student, teacher, projector(student, teacher)).student) == 4


def test_general_points_of_a_teacher_with_boxes():
    student, teacher = views("dab-detr", "rt_detr")
    points = random_queries(student, teacher, projector(student, teacher, content=False), 9, rng())
    boxes = random_boxes(9, rng()).expand(2, -1, -1)
    assert torch.equal(points.student.reference, boxes)
    expected = teacher.replay(teacher.queries_from_boxes(boxes))
    torch.testing.assert_close(points.answers.logits, expected.logits)
    torch.testing.assert_close(points.answers.boxes, expected.boxes)
    assert not torch.equal(points.answers.boxes[-1, 0], points.answers.boxes[-1, 1])  # the images differ


def test_general_points_of_a_teacher_without_boxes():
    """Position embeddings with the mean and deviation of its own; the student is asked where the answers lie."""
    student, teacher = views("dab-detr", "detr")
    teacher = replace(
        teacher, queries=replace(teacher.queries, position=3 + 0.5 * torch.randn(2, 6, 16, generator=rng()))
    )
    points = random_queries(student, teacher, projector(student, teacher, content=False), 400, rng())
    position = points.answers.queries.position
    assert position.shape == (2, 400, 16)
    assert torch.equal(position[0], position[1])
    assert position.mean().item() == pytest.approx(3, abs=0.1)
    assert position.std().item() == pytest.approx(0.5, abs=0.05)
    assert not points.answers.queries.content.any()
    assert torch.equal(points.student.reference, points.answers.boxes[-1])


def test_general_points_between_position_embeddings():
    """DETR to DETR: the same embeddings, through the map that starts as the identity."""
    student, teacher = views("detr", "table-transformer")
    points = random_queries(student, teacher, projector(student, teacher, content=False), 3, rng())
    torch.testing.assert_close(points.student.position, points.answers.queries.position)


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "deformable_detr_two_stage", "rt_detr"])
def test_no_graph_to_the_teacher_and_none_to_the_students_queries(name):
    """The student's own queries learn from the task; what learns here is the projector and the decoder."""
    student_model, teacher_model = zoo.build(name, seed=1).train(), zoo.build(name, seed=2)
    student = adapter_for(student_model).forward(zoo.batch(labels=False))[1]
    teacher = adapter_for(teacher_model).forward(zoo.batch(labels=False))[1]  # with a graph, to make it harder
    maps = projector(student, teacher)
    for points in (
        teacher_queries(student, teacher, maps),
        random_queries(student, teacher, projector(student, teacher, content=False), 4, rng()),
    ):
        parts = [x for x in vars(points.student).values() if x is not None and x.requires_grad]
        if parts:
            sum(x.sum() for x in parts).backward()
    assert all(parameter.grad is None for parameter in teacher_model.parameters())
    reached = {key for key, parameter in student_model.named_parameters() if parameter.grad is not None}
    # two-stage Deformable DETR makes queries of boxes by a layer, which may learn
    assert all("pos_trans" in key for key in reached)
    assert not random_queries(student, teacher, maps, 4, rng()).answers.logits.requires_grad


def test_points_of_identical_models_are_equal():
    model = zoo.build("deformable_detr")
    adapters = adapter_for(model), adapter_for(copy.deepcopy(model))
    with torch.no_grad():
        student, teacher = (adapter.forward(zoo.batch(labels=False))[1] for adapter in adapters)
    points = random_queries(student, teacher, projector(student, teacher, content=False), 5, rng())
    for part in ("content", "position", "reference"):
        torch.testing.assert_close(getattr(points.student, part), getattr(points.answers.queries, part))
