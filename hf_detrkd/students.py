"""Weights a student starts from."""

from __future__ import annotations

from safetensors.torch import load_file
from transformers import PreTrainedModel


def load_backbone_weights(model: PreTrainedModel, file: str) -> int:
    """Load a backbone's own weights (for example of timm) into the backbone of a detector.

    The backbone is found as the place whose tensor names end like the file's.

    Args:
        model: the detector, changed in place.
        file: safetensors with the backbone's tensor names, without classifier.

    Returns:
        the number of tensors loaded.

    Raises:
        ValueError: where not every tensor of the file has a place of its shape.
    """
    weights = load_file(file)
    state = model.state_dict()
    probe = next(iter(weights))
    places = [name.removesuffix(probe) for name in state if name.endswith("." + probe)]
    fitting = {
        place: [name for name, value in weights.items() if place + name in state and state[place + name].shape == value.shape]
        for place in places
    }
    best = max(fitting, key=lambda place: len(fitting[place]), default=None)
    missing = sorted(set(weights) - set(fitting.get(best, ())))
    if missing:
        raise ValueError(
            f"{file} doesn't fit the backbone of {type(model).__name__}: {len(missing)} of {len(weights)} tensors have no "
            f"place of their name and shape, the first are {missing[:3]}. Is it another network or another width?"
        )
    model.load_state_dict({best + name: value for name, value in weights.items()}, strict=False)
    return len(weights)


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
