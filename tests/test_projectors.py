"""Modules that own parameters besides the student."""

from __future__ import annotations

import math

import pytest
import torch
import zoo

from hf_detrkd.families import adapter_for
from hf_detrkd.projectors import BoxEmbedding, QueryProjector, identity_linear
from hf_detrkd.sampling import places_of


@pytest.mark.parametrize(("features_in", "features_out"), [(3, 3), (5, 3), (3, 5)])
def test_identity_linear(features_in, features_out):
    """What both sides have stays as it is; what only the output has is 0."""
    linear = identity_linear(features_in, features_out)
    x = torch.randn(2, features_in)
    expected = torch.zeros(2, features_out)
    shared = min(features_in, features_out)
    expected[:, :shared] = x[:, :shared]
    assert torch.equal(linear(x), expected)
    assert linear.weight.requires_grad
    assert linear.bias.requires_grad


@pytest.mark.parametrize("width", [16, 20, 256])
def test_box_embedding_by_hand(width):
    """sin and cos of 2 pi x / 10000^(2 i / C), C channels a coordinate, before the MLP."""
    embedding = BoxEmbedding(width)
    seen = []
    embedding.mlp = torch.nn.Module()
    embedding.mlp.forward = lambda x: seen.append(x) or x
    boxes = torch.rand(2, 3, 4)
    embedding(boxes)
    (sine,) = seen
    channels = embedding.channels
    assert channels % 2 == 0
    assert width <= 4 * channels < width + 8
    assert sine.shape == (2, 3, 4 * channels)
    for coordinate in range(4):
        for i in range(channels // 2):
            angle = 2 * math.pi * boxes[1, 2, coordinate].item() / 10000 ** (2 * i / channels)
            start = coordinate * channels
            assert sine[1, 2, start + i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert sine[1, 2, start + channels // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_box_embedding_tells_boxes_apart():
    embedding = BoxEmbedding(16)
    boxes = torch.rand(1, 50, 4)
    distance = torch.cdist(*(embedding(boxes),) * 2)[0]
    assert embedding(boxes).shape == (1, 50, 16)
    assert distance[~torch.eye(50, dtype=torch.bool)].min() > 0


def ask(student: str, teacher: str, content: bool = True, **teacher_config):
    """The projector, the queries it makes of the teacher's own, and the two views."""
    adapters = adapter_for(zoo.build(student, seed=1)), adapter_for(zoo.build(teacher, seed=2, **teacher_config))
    with torch.no_grad():
        ours, theirs = (adapter.forward(zoo.batch(labels=False))[1] for adapter in adapters)
    projector = QueryProjector(*adapters, content=content)
    return projector, projector(theirs.queries, places_of(theirs), ours), ours, theirs


def parts(projector: QueryProjector) -> set[str]:
    return {name for name in ("content", "position", "place") if getattr(projector, name) is not None}


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("detr", "detr", {"position"}),
        ("detr", "conditional_detr", {"position"}),
        ("detr", "deformable_detr", {"position"}),
        ("detr", "dab-detr", {"place"}),
        ("table-transformer", "rt_detr", {"place"}),
        ("conditional_detr", "rt_detr", set()),
        ("dab-detr", "dab-detr", set()),
        ("dab-detr", "detr", set()),
        ("rt_detr", "dab-detr", set()),
        ("rt_detr", "rt_detr", {"content"}),
        ("lw_detr", "d_fine", {"content"}),
        ("rt_detr", "deformable_detr", {"content"}),
        ("deformable_detr", "deformable_detr_two_stage", {"content", "position"}),
    ],
)
def test_shortest_way(student, teacher, expected):
    projector, queries, ours, theirs = ask(student, teacher)
    assert parts(projector) == expected
    number = len(theirs.queries)
    for part in ("content", "position", "reference"):
        value, own = getattr(queries, part), getattr(ours.queries, part)
        assert (value is None) == (own is None)
        if value is not None:
            assert value.shape == (2, number, own.shape[-1])
            assert value.isfinite().all()
    ours.replay(queries)  # the student's decoder takes them


def test_equal_widths_start_equal():
    _, queries, _, theirs = ask("deformable_detr", "deformable_detr")
    for part in ("content", "position", "reference"):
        torch.testing.assert_close(getattr(queries, part), getattr(theirs.queries, part))


def test_other_width():
    _, queries, _, theirs = ask("rt_detr", "deformable_detr_two_stage")
    torch.testing.assert_close(queries.content, theirs.queries.content[..., :16])
    assert torch.equal(queries.reference, theirs.queries.reference)


def test_content_of_its_own():
    """Where it isn't asked for: the content of the student's query that is nearest to the place."""
    projector, queries, ours, theirs = ask("rt_detr", "rt_detr", content=False)
    assert parts(projector) == set()
    distance = torch.cdist(theirs.queries.reference[..., :2], ours.queries.reference[..., :2])
    nearest = distance.argmin(-1)
    for image in range(2):
        assert torch.equal(queries.content[image], ours.queries.content[image, nearest[image]])


def test_position_of_its_own():
    """Two-stage Deformable DETR makes position and content of a box; an RT-DETR teacher has content only."""
    _, queries, ours, theirs = ask("deformable_detr_two_stage", "rt_detr", content=False)
    expected = ours.queries_from_boxes(theirs.queries.reference)
    torch.testing.assert_close(queries.position, expected.position)
    torch.testing.assert_close(queries.content, expected.content)


def test_content_of_models_without_one_is_zeros():
    for teacher in ("detr", "rt_detr"):
        _, queries, _, _ = ask("dab-detr", teacher)
        assert not queries.content.any()
    _, queries, _, _ = ask("detr", "rt_detr")
    assert not queries.content.any()


@pytest.mark.parametrize(("student", "teacher"), [("detr", "dab-detr"), ("deformable_detr", "deformable_detr")])
def test_every_parameter_learns(student, teacher):
    projector, queries, _, _ = ask(student, teacher)
    sum((x**2).sum() for x in vars(queries).values() if x is not None and x.requires_grad).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in projector.parameters())


def test_half_precision_teacher():
    """Its queries are taken in the student's precision."""
    adapters = adapter_for(zoo.build("deformable_detr", seed=1)), adapter_for(zoo.build("deformable_detr").bfloat16())
    inputs = zoo.batch(labels=False)
    with torch.no_grad():
        ours = adapters[0].forward(inputs)[1]
        theirs = adapters[1].forward({"pixel_values": inputs["pixel_values"].bfloat16()})[1]
    queries = QueryProjector(*adapters)(theirs.queries, places_of(theirs), ours)
    assert theirs.queries.content.dtype == torch.bfloat16
    assert {x.dtype for x in (queries.content, queries.position, queries.reference)} == {torch.float32}
