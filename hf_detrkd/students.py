"""Weights a student starts from."""

from __future__ import annotations

from collections import Counter

from safetensors.torch import load_file
from torch import Tensor
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
    if not places:
        raise ValueError(
            f"{file} doesn't fit {type(model).__name__}: no tensor of the model ends with a name of the file, such as "
            f"{sorted(weights)[:3]}. It must have the names of the backbone itself, without what a detector puts before."
        )
    place = max(places, key=places.get)
    backbone = {name: value for name, value in state.items() if name.startswith(place)}
    fitting = {
        name: weights[name.removeprefix(place)]
        for name, value in backbone.items()
        if name.removeprefix(place) in weights and weights[name.removeprefix(place)].shape == value.shape
    }
    # BatchNorm's counters change nothing here, and not every file has them
    missing = sorted(name for name in backbone.keys() - fitting.keys() if not name.endswith(".num_batches_tracked"))
    if missing:
        raise ValueError(
            f"{file} doesn't fit the backbone of {type(model).__name__}: {len(missing)} of its {len(backbone)} tensors "
            f"are not in the file with their name and shape, the first are {missing[:3]}. Is it another network or "
            "another width?"
        )
    model.load_state_dict(fitting, strict=False)
    return len(fitting)


def inherit(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Copy every tensor of the teacher that the student has under the same name and in the same shape.

    Of a deeper teacher these are its first layers. Where the two have other classes, or the same in another order, the
    class heads and the embeddings of classes are left as they are. Use it for the student *and* its twin.

    Returns:
        the number of tensors copied.
    """
    source = teacher.state_dict()
    fitting = {
        name: source[name]
        for name, value in student.state_dict().items()
        if name in source and source[name].shape == value.shape
    }
    if _classes(student) != _classes(teacher):
        fitting = {name: value for name, value in fitting.items() if not _has_classes(name, value, student)}
    student.load_state_dict(fitting, strict=False)
    return len(fitting)


def _classes(model: PreTrainedModel) -> dict[int, str]:
    return {int(index): name for index, name in model.config.id2label.items()}  # a config read from JSON has strings


def _has_classes(name: str, value: Tensor, model: PreTrainedModel) -> bool:
    """Whether a tensor has a row per class: every family calls these "class..." or "...score_head"."""
    rows = (model.config.num_labels, model.config.num_labels + 1)  # with no-object
    return value.dim() > 0 and value.shape[0] in rows and ("class" in name or "score_head" in name)
