"""Distillation of the first stage: numbers by hand, grids that differ, and what it teaches."""

from __future__ import annotations

import math

import pytest
import torch
import zoo

from hf_detrkd.families import adapter_for
from hf_detrkd.losses.logits import bernoulli_kl, focal_kl
from hf_detrkd.methods import build_methods
from hf_detrkd.methods.proposals import on_grid_of

TWO_STAGE = ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"]


def seen(name: str, seed: int = 1, image_size: int = 64, **overrides):
    adapter = adapter_for(zoo.build(name, seed=seed, **overrides).eval())
    return adapter, adapter.forward({"pixel_values": zoo.batch(image_size=image_size)["pixel_values"]})


def test_focal_kl_by_hand():
    """One token, two classes: p = .8 and .5, q = .5 and .5; the second agrees and counts nothing."""
    teacher, student = torch.tensor([[[math.log(4), 0.0]]]), torch.zeros(1, 1, 2, requires_grad=True)
    kl = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    valid, weight = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[0.8]])
    value = focal_kl(student, teacher, valid, weight)
    assert value.item() == pytest.approx(0.3 * kl / 0.8, rel=1e-5)
    value.backward()  # of the divergence alone, not of the distance
    torch.testing.assert_close(student.grad, torch.tensor([[[0.3 * (0.5 - 0.8) / 0.8, 0.0]]]))
    plain = focal_kl(student, teacher, valid, weight, gamma=0.0)
    torch.testing.assert_close(0.8 * plain, bernoulli_kl(student, teacher, valid.float()))


def test_focal_kl_without_anything_valid():
    student = torch.zeros(1, 3, 2, requires_grad=True)
    value = focal_kl(student, torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool), torch.zeros(1, 3))
    value.backward()
    assert value == 0
    assert not student.grad.any()


@pytest.mark.parametrize("name", TWO_STAGE)
def test_proposals_are_what_the_model_selects_its_queries_from(name):
    adapter, (_, view) = seen(name)
    proposals = view.proposals
    assert proposals.logits.shape == (*view.memory.shape[:2], adapter.num_classes)
    best = proposals.logits.amax(-1).topk(adapter.num_queries, dim=1).indices
    torch.testing.assert_close(
        proposals.boxes.take_along_dim(best[..., None], 1), view.queries.reference, rtol=1e-5, atol=1e-6
    )
    assert proposals.boxes.isfinite().all()
    assert view.replay(view.queries).proposals is None


def test_only_two_stage_models_have_proposals():
    for name in zoo.NAMES:
        adapter = adapter_for(zoo.build(name, seed=1).eval())
        assert ("proposals" in adapter.provides) == (name in TWO_STAGE)
    detr = adapter_for(zoo.build("detr", seed=1))
    with pytest.raises(ValueError, match="needs proposals from the student, which `detr` doesn't provide"):
        build_methods(["proposals"], {}, detr, detr)


def test_tokens_that_are_never_selected_do_not_count():
    adapter, (_, view) = seen("rt_detr")
    model = adapter.model.model
    _, valid = model.generate_anchors(view.memory_shapes)
    assert torch.equal(view.proposals.valid, valid[..., 0].expand_as(view.proposals.valid))


def test_other_grids_take_the_nearest_token():
    _, (_, student) = seen("rt_detr")
    _, (_, teacher) = seen("rt_detr", image_size=128)
    logits, boxes, valid = on_grid_of(student, teacher)
    assert logits.shape == student.proposals.logits.shape
    tokens = {tuple(row) for row in teacher.proposals.logits[0].tolist()}
    assert all(tuple(row) in tokens for row in logits[0].tolist())
    assert boxes.shape == student.proposals.boxes.shape
    assert valid.dtype == torch.bool


def test_ten_steps_teach_the_first_stage():
    student = zoo.build("rt_detr", seed=1)
    adapter, (_, teacher) = adapter_for(student), seen("d_fine", seed=2)[1]
    images = {"pixel_values": zoo.batch()["pixel_values"]}
    (method,) = build_methods(["proposals"], {}, adapter, teacher.adapter)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(10):
        terms = method(adapter.forward(images)[1], teacher, zoo.batch()["labels"], None)
        loss = sum(method.config.weights[name] * value for name, value in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.9 * values[0]
    assert student.model.enc_score_head.weight.grad.any()


def test_settings_that_are_refused():
    adapter = adapter_for(zoo.build("rt_detr", seed=1))
    with pytest.raises(ValueError, match="`gamma` is -1"):
        build_methods(["proposals"], {"gamma": -1.0}, adapter, adapter)
