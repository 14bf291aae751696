"""Weights a student starts from."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import zoo
from transformers import AutoModelForObjectDetection

from hf_detrkd.families.architecture import ARCHITECTURES
from hf_detrkd.inheritance import inherit
from hf_detrkd.students import from_config


@pytest.mark.parametrize(
    "name",
    ["detr", "conditional_detr", "deformable_detr", "deformable_detr_two_stage", "dab-detr", "table-transformer"],
)
def test_transformer_and_queries_start_as_in_the_released_code(name):
    """Matrices from Xavier's uniform distribution, queries from N(0, 1); zeros, vectors and all else as by transformers."""
    config = copy.deepcopy(zoo.build(name).config)
    config.num_queries = 200
    torch.manual_seed(0)
    model = from_config(config)
    torch.manual_seed(0)
    expected = AutoModelForObjectDetection.from_config(config).state_dict()
    architecture = ARCHITECTURES[config.model_type]
    drawn = 0
    for key, value in model.state_dict().items():
        bound = math.sqrt(6 / sum(value.shape)) if value.dim() == 2 else 0.0
        if key in architecture.query_tensors:
            assert abs(value.std() - 1) < 0.1 and abs(value.mean()) < 0.1
        elif key.startswith(("model.encoder.", "model.decoder.")) and bound and not torch.equal(value, expected[key]):
            assert 0.8 * bound < value.abs().max() <= bound, key
            drawn += 1
        else:
            assert torch.equal(value, expected[key]), key
    assert drawn > 4 * (config.encoder_layers + config.decoder_layers)
    if architecture.drawn_as_released[-1].startswith("model.decoder.ref"):
        assert not any(
            torch.equal(v, expected[k]) for k, v in model.state_dict().items() if "query_scale" in k and v.dim() > 1
        )


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_queries_read_different_things(name):
    """What queries find in an image at the start must differ by more than the noise of dropout in training."""
    config = copy.deepcopy(zoo.build(name).config)
    torch.manual_seed(0)
    ours, theirs = (build(config).eval() for build in (from_config, AutoModelForObjectDetection.from_config))
    with torch.no_grad():
        spread = [model(zoo.batch()["pixel_values"]).last_hidden_state.std(1).mean().item() for model in (ours, theirs)]
    assert spread[0] > 5 * spread[1]


@pytest.mark.parametrize("name", ["rt_detr", "lw_detr", "yolos"])
def test_other_weights_are_those_of_transformers(name):
    config = zoo.build(name).config
    states = []
    for build in (from_config, AutoModelForObjectDetection.from_config):
        torch.manual_seed(0)
        states.append(build(config).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# ------------------------------------------------------------------------------------------------------------ inherit


@pytest.mark.parametrize("name", ["detr", "deformable_detr_two_stage", "d_fine", "lw_detr"])
def test_twins_are_equal(name):
    student, teacher = zoo.build(name, seed=1), zoo.build(name, seed=2)
    assert inherit(student, teacher) == len(student.state_dict())
    inputs = zoo.batch(labels=False)
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)
    next(student.parameters()).data.add_(1)  # copies, not the teacher's own
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))


def test_first_layers_and_what_fits():
    student = zoo.build("detr", seed=1, decoder_layers=2, num_queries=4, encoder_ffn_dim=8)
    teacher = zoo.build("detr", seed=2)
    before, source = copy.deepcopy(student.state_dict()), teacher.state_dict()
    number = inherit(student, teacher)
    copied = [key for key, value in student.state_dict().items() if not torch.equal(value, before[key])]
    for key, value in student.state_dict().items():
        fits = key in source and source[key].shape == value.shape
        assert torch.equal(value, source[key] if fits else before[key])
    assert 0 < len(copied) <= number < len(before)
    assert "model.query_position_embeddings.weight" not in copied  # 4 queries, the teacher has 6
    assert "model.encoder.layers.0.mlp.fc1.weight" not in copied
    assert "model.decoder.layers.1.mlp.fc1.weight" in copied


@pytest.mark.parametrize("name", ["detr", "deformable_detr_two_stage", "dab-detr", "rt_detr", "d_fine", "lw_detr"])
def test_other_classes_keep_their_heads(name):
    """As many classes, but others: a head in the teacher's order would say the wrong names."""
    names = [f"class {i}" for i in (1, 0, 2, 3, 4)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    student, teacher = zoo.build(name, seed=1, **labels), zoo.build(name, seed=2)
    of_classes = {
        key
        for key, value in zoo.build(name, classes=31).state_dict().items()
        if value.shape != student.state_dict()[key].shape
    }
    assert of_classes
    before, source = copy.deepcopy(student.state_dict()), teacher.state_dict()
    assert inherit(student, teacher) == len(before) - len(of_classes)
    for key, value in student.state_dict().items():
        assert torch.equal(value, before[key] if key in of_classes else source[key])


def test_labels_read_from_json_are_the_same_labels():
    student, teacher = zoo.build("detr", seed=1), zoo.build("detr", seed=2)
    teacher.config.id2label = {str(i): name for i, name in teacher.config.id2label.items()}
    assert inherit(student, teacher) == len(student.state_dict())
