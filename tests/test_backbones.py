"""Weights a detector's backbone starts from."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from safetensors.torch import save_file

from hf_detrkd.backbones import load_backbone_weights


def backbone_place(model) -> str:
    """What stands before the backbone's own names."""
    name = next(name for name in model.state_dict() if "backbone" in name and ".embedder." in name)
    return name[: name.index("embedder")]


def backbone_file(tmp_path, model, **changes) -> tuple[str, dict]:
    """The backbone's tensors, all random, under its own names; ``None`` leaves one out."""
    place = backbone_place(model)
    weights = {
        name.removeprefix(place): torch.rand_like(value.float()).to(value.dtype) + 1
        for name, value in model.state_dict().items()
        if name.startswith(place)
    }
    weights |= changes
    weights = {name: value for name, value in weights.items() if value is not None}
    path = tmp_path / "backbone.safetensors"
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return str(path), weights


def some_name(model, part: str = "weight") -> str:
    place = backbone_place(model)
    return next(n.removeprefix(place) for n in model.state_dict() if n.startswith(place) and n.endswith(part))


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "rt_detr"])
def test_backbone(name, tmp_path):
    """Every tensor of the backbone has the file's value, and nothing else moved."""
    model = zoo.build(name)
    before = copy.deepcopy(model.state_dict())
    file, weights = backbone_file(tmp_path, model)
    place = backbone_place(model)
    assert load_backbone_weights(model, file) == len(weights)
    for key, value in model.state_dict().items():
        expected = weights[key.removeprefix(place)] if key.startswith(place) else before[key]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_backbone_of_another_detector(tmp_path):
    """A folder or Hub id instead of a file: of another family, with another nesting of names, its backbone is taken."""
    model, other = zoo.build("detr", seed=1), zoo.build("dab-detr", seed=2)
    other.save_pretrained(tmp_path / "other")
    before = copy.deepcopy(model.state_dict())
    load_backbone_weights(model, str(tmp_path / "other"))
    place = backbone_place(model)
    for key, value in model.state_dict().items():
        expected = (
            other.state_dict()[backbone_place(other) + key.removeprefix(place)]
            if key.startswith(place)
            else before[key]
        )
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_no_such_backbone(tmp_path):
    with pytest.raises(RuntimeError, match=r"weights of the backbone .*nothing\.safetensors.* could not be loaded"):
        load_backbone_weights(zoo.build("detr"), str(tmp_path / "nothing.safetensors"))


def test_what_the_backbone_lacks_is_left_out(tmp_path):
    """A classifier, also one whose name ends like a tensor of the detector."""
    model = zoo.build("detr")
    extra = {"fc.weight": torch.ones(10, 16), "classifier.1.bias": torch.ones(10), "layernorm.weight": torch.ones(16)}
    file, weights = backbone_file(tmp_path, model, **extra)
    before = copy.deepcopy(model.state_dict())
    assert load_backbone_weights(model, file) == len(weights) - len(extra)
    key = "model.decoder.layernorm.weight"
    assert torch.equal(model.state_dict()[key], before[key])


def test_missing_tensor(tmp_path):
    model = zoo.build("detr")
    name = some_name(model)
    file, _ = backbone_file(tmp_path, model, **{name: None})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=rf"doesn't fit the backbone of DetrFor.*: 1 of its \d+ tensors .*{name}.*width"
    ):
        load_backbone_weights(model, file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_shape(tmp_path):
    model = zoo.build("detr")
    name = some_name(model)
    file, _ = backbone_file(tmp_path, model, **{name: torch.ones(3, 3)})
    with pytest.raises(ValueError, match=rf"1 of its \d+ tensors are not in it with their name and shape.*{name}"):
        load_backbone_weights(model, file)


def test_other_network(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"stem.conv.kernel": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"no tensor of the model ends with a name of it, such as \['stem.conv"):
        load_backbone_weights(zoo.build("detr"), str(path))


def test_whole_model_instead_of_a_backbone(tmp_path):
    model = zoo.build("detr")
    path = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    with pytest.raises(ValueError, match="must have the names of the backbone itself"):
        load_backbone_weights(model, str(path))


def test_counters_of_batch_norm_may_be_missing(tmp_path):
    model = zoo.build("rt_detr", freeze_backbone_batch_norms=False)
    place = backbone_place(model)
    counters = [n.removeprefix(place) for n in model.state_dict() if n.endswith("num_batches_tracked")]
    assert counters
    file, weights = backbone_file(tmp_path, model, **dict.fromkeys(counters))
    assert load_backbone_weights(model, file) == len(weights)
