"""Weights a student starts from."""

from __future__ import annotations

from collections import Counter

from safetensors.torch import load_file
from transformers import PreTrainedModel


def load_backbone_weights(model: PreTrainedModel, file: str) -> int:
    """Load a backbone's own weights (for example of timm) into the backbone of a detector.

    The backbone is the part of the model in which the most tensor names end like the file's.

    Args:
        model: the detector, changed in place.
        file: safetensors under the backbone's own tensor names; what the backbone doesn't have (a classifier) is left out.

    Returns:
        the number of tensors loaded.

    Raises:
        ValueError: where the file lacks a tensor of the backbone, or has it in another shape.
    """
    weights, state = load_file(file), model.state_dict()
    places = Counter(name.removesuffix(key) for name in state for key in weights if name.endswith("." + key))
    place = max(places, key=places.get, default="")
    backbone = {name: value for name, value in state.items() if place and name.startswith(place)}
    fitting = {
        name: weights[name.removeprefix(place)]
        for name, value in backbone.items()
        if name.removeprefix(place) in weights and weights[name.removeprefix(place)].shape == value.shape
    }
    missing = sorted(backbone.keys() - fitting.keys())
    if missing or not fitting:
        raise ValueError(
            f"{file} doesn't fit the backbone of {type(model).__name__}: {len(missing)} of its {len(backbone)} tensors are "
            f"not in the file with their name and shape, the first are {missing[:3]}. Is it another network or width?"
        )
    model.load_state_dict(fitting, strict=False)
    return len(fitting)


def inherit(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Copy every tensor of the teacher that the student has under the same name and in the same shape.

    Of a deeper teacher these are its first layers. Use it for the student *and* its twin.

    Returns:
        the number of tensors copied.
    """
    source = teacher.state_dict()
    fitting = {
        name: source[name]
        for name, value in student.state_dict().items()
        if name in source and source[name].shape == value.shape
    }
    student.load_state_dict(fitting, strict=False)
    return len(fitting)
