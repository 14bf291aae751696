"""The task loss against transformers' own, for every family."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import transformers
import zoo
from packaging.version import Version

from hf_detrkd.families import adapter_for
from hf_detrkd.losses.detection import task_loss

GROUPS = [name for name in zoo.NAMES if name in ("lw_detr", "rf_detr")]
SINGLE = [name for name in zoo.NAMES if name not in GROUPS]
OFF = [name for name in SINGLE if name != "yolos" and not zoo.config(name).auxiliary_loss]
"""Families whose checkpoints come without per-layer supervision of their several layers."""
DENOISING = [name for name in zoo.NAMES if name in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")]
MATCHES_DENOISING = Version(transformers.__version__) < Version("5.23")
"""Older losses match the last layer's denoising queries too (transformers PR 48528)."""
TARGETS = [(3, 2), (0, 4), (0, 0)]


def plain(model, batch, seed=0):
    torch.manual_seed(seed)  # denoising draws noise
    return model(**batch)


def run(model, batch, per_layer, seed=0):
    adapter = adapter_for(model)
    with task_loss(adapter, per_layer=per_layer):
        torch.manual_seed(seed)
        output, view = adapter.forward(batch)
    return output, view


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss(output, expected):
    assert torch.equal(output.loss, expected.loss)
    assert list(output.loss_dict) == list(expected.loss_dict)
    for name, term in expected.loss_dict.items():
        assert torch.equal(torch.as_tensor(output.loss_dict[name]), torch.as_tensor(term)), name


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_is_transformers_loss_to_the_bit(name, targets):
    model, batch = zoo.build(name).train(), zoo.batch(targets=targets)
    expected = plain(model, batch)
    output, _ = run(model, batch, per_layer=False)
    assert_same_loss(output, expected)
    expected_gradients, found = gradients(model, expected.loss), gradients(model, output.loss)
    assert found.keys() == expected_gradients.keys()
    assert all(torch.equal(found[key], expected_gradients[key]) for key in found)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_is_transformers_loss_in_evaluation(name):
    model, batch = zoo.build(name), zoo.batch()
    output, _ = run(model, batch, per_layer=False)
    assert_same_loss(output, plain(model, batch))


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_is_transformers_loss_at_full_size(name):
    """B = 4, Q = 300, K = 80, L = 6, on random predictions of all layers."""
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape):
        return torch.rand(*shape, 4, generator=generator) * 0.5 + 0.25

    model = zoo.build(name, classes=80, num_queries=300, auxiliary_loss=True, decoder_layers=6)
    adapter = adapter_for(model)
    columns = 81 if adapter.classification == "softmax" else 80
    logits, coordinates = torch.randn(6, 4, 300, columns, generator=generator), boxes(6, 4, 300)
    targets = [
        {"class_labels": torch.randint(0, 80, (n,), generator=generator), "boxes": boxes(n)} for n in (20, 7, 0, 1)
    ]
    encoder, layers = {}, (logits, coordinates)
    if name == "rt_detr":
        encoder = {"enc_topk_logits": logits[0], "enc_topk_bboxes": coordinates[0]}
        layers = (logits.transpose(0, 1), coordinates.transpose(0, 1))

    def call():
        return model.loss_function(logits[-1], targets, model.device, coordinates[-1], model.config, *layers, **encoder)

    expected, expected_terms, _ = call()
    with task_loss(adapter, per_layer=False):
        found, terms, _ = call()
    assert torch.equal(found, expected)
    assert all(torch.equal(terms[key], expected_terms[key]) for key in expected_terms)


@pytest.mark.parametrize("name", OFF)
def test_transformers_per_layer_loss_to_the_bit(name):
    """The same with a checkpoint that has the flag on: five matchings in one."""
    model, batch = zoo.build(name, auxiliary_loss=True, decoder_layers=5).train(), zoo.batch()
    expected = plain(model, batch)
    for per_layer in (False, True):
        output, _ = run(model, batch, per_layer)
        assert_same_loss(output, expected)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", OFF)
def test_per_layer_supervision(name, targets):
    model, batch = zoo.build(name).train(), zoo.batch(targets=targets, pad=True)
    expected = plain(model, batch)
    output, view = run(model, batch, per_layer=True)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.pred_boxes, expected.pred_boxes)
    for term, value in expected.loss_dict.items():
        assert torch.equal(output.loss_dict[term], value), term
    total = expected.loss.detach()
    for layer in range(zoo.LAYERS - 1):
        loss, terms, _ = model.loss_function(
            view.logits[layer], batch["labels"], model.device, view.boxes[layer], model.config
        )
        for term, value in terms.items():
            torch.testing.assert_close(output.loss_dict[f"{term}_{layer}"], value, msg=term)
        total = total + loss.detach()
    torch.testing.assert_close(output.loss.detach(), total)
    assert len(output.loss_dict) == zoo.LAYERS * len(expected.loss_dict)
    assert model.config.auxiliary_loss is False


@pytest.mark.parametrize("name", OFF)
def test_per_layer_supervision_reaches_the_first_layer_directly(name):
    model, batch = zoo.build(name).train(), zoo.batch()
    output, _ = run(model, batch, per_layer=True)
    output.loss_dict["loss_bbox_0"].backward()
    moved = [
        any(p.grad is not None and p.grad.any() for p in layer.parameters())
        for layer in model.base_model.decoder.layers
    ]
    assert moved == [True, False, False]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", sorted({*zoo.REPLAYED} - {"detr", "table-transformer", "conditional_detr"}))
def test_per_layer_is_the_flag_where_the_flag_is_harmless(name, train):
    """Also for Group DETR, whose loss needs the layers' predictions for all groups."""
    batch = zoo.batch()
    with_flag = zoo.build(name, auxiliary_loss=True).train(train)
    expected = plain(with_flag, batch)
    without = zoo.build(name, auxiliary_loss=False).train(train)
    output, _ = run(without, batch, per_layer=True)
    assert list(output.loss_dict) == list(expected.loss_dict)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dict(output.loss_dict), dict(expected.loss_dict), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_more_targets_than_queries(name):
    model, batch = zoo.build(name), zoo.batch(targets=(zoo.QUERIES + 3, 1))
    expected = plain(model, batch)
    output, _ = run(model, batch, per_layer=False)
    assert_same_loss(output, expected)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_autocast_is_finite(name):
    model, batch = zoo.build(name).train(), zoo.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = run(model, batch, per_layer=True)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_model_that_diverged(name):
    model, batch = zoo.build(name).train(), zoo.batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="Start again with a lower --learning_rate"):
        run(model, batch, per_layer=False)


def test_leaves_the_model_as_it_was():
    model = zoo.build("detr")
    attributes = set(vars(model))
    run(model, zoo.batch(), per_layer=True)
    assert set(vars(model)) == attributes
    assert not torch.nn.modules.module._global_forward_pre_hooks

    adapter = adapter_for(model)
    with pytest.raises(RuntimeError, match="stop"), task_loss(adapter, per_layer=True):
        raise RuntimeError("stop")
    assert set(vars(model)) == attributes


def test_keeps_a_loss_function_of_the_user():
    model, calls = zoo.build("detr"), []
    original = model.loss_function

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.loss_function = counted
    run(model, zoo.batch(), per_layer=True)
    assert calls == [1]
    assert model.loss_function is counted


@pytest.mark.parametrize("name", SINGLE)
def test_boxes_are_compared_with_their_own_targets_only(name, monkeypatch):
    """transformers' functions, which compare all with all, aren't called, and are in their places afterwards."""
    model, batch = zoo.build(name).train(), zoo.batch()
    adapter = adapter_for(model)
    modules = [module for module in vars(transformers.loss).values() if isinstance(module, ModuleType)]
    functions = [(m, n) for m in modules for n in ("box_iou", "generalized_box_iou") if n in vars(m)]
    assert functions

    def all_with_all(*boxes):
        raise AssertionError("all boxes were compared with all")

    for module, function in functions:
        monkeypatch.setattr(module, function, all_with_all)
    with task_loss(adapter, per_layer=True):
        adapter.forward(batch)
    assert all(getattr(module, function) is all_with_all for module, function in functions)


def test_boxes_that_are_no_boxes_are_refused_as_by_transformers():
    model = zoo.build("detr")
    adapter = adapter_for(model)
    batch = zoo.batch()
    batch["pixel_values"] = batch["pixel_values"] * float("nan")
    with pytest.raises(FloatingPointError) as refused, task_loss(adapter, per_layer=False):
        adapter.forward(batch)
    assert "corner" in str(refused.value.__cause__)
