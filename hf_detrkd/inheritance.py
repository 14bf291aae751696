"""Weights taken over from another model: the teacher's, whole or layer by layer, and those of classes in another order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families.architecture import Architecture
from .labels import LabelMap


def inherit(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """Copy every tensor of the teacher that the student has under the same name and in the same shape.

    Of a deeper teacher these are its first layers. Where the two have other classes, or the same in another order, the
    class heads and the embeddings of classes are left as they are. Use it for the student *and* its twin.

    Returns:
        the number of tensors copied.
    """
    return _copy(student, teacher, lambda name: name)


def inherit_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, architecture: Architecture, new_backbone: bool
) -> int:
    """Copy the weights of the teacher that a student of its family takes over; `make_student` says which.

    Args:
        student: changed in place.
        teacher: of the same family.
        architecture: the family's.
        new_backbone: the student's backbone is another one: of the teacher's nothing is copied.

    Returns:
        the number of tensors copied.
    """
    stacks = [
        (lists, kept_layers(getattr(student.config, field), getattr(teacher.config, field)))
        for lists, field in (
            (architecture.encoder_lists, architecture.encoder_layers),
            (architecture.decoder_lists, architecture.decoder_layers),
        )
        if field is not None
    ]
    source = teacher.state_dict()
    groups = 1 if architecture.query_groups is None else getattr(student.config, architecture.query_groups)
    rows = {
        name: _first_queries(source[name], value, groups)
        for name, value in student.state_dict().items()
        if name in architecture.query_tensors and name in source
    }

    def source_of(name: str) -> str | None:
        if new_backbone and name.startswith(architecture.backbone):
            return None
        for lists, kept in stacks:
            mapped = _in_teacher(name, lists, kept)
            if mapped in source:
                return mapped
        return name  # also what only the first layer has

    return _copy(student, teacher, source_of, rows)


def kept_layers(number: int, of: int) -> list[int]:
    """Which layers of a deeper stack a shallower one takes: evenly spread, the last always among them."""
    return [(index + 1) * of // number - 1 for index in range(number)]


def order_classes(model: PreTrainedModel, before: Mapping[int, str]) -> None:
    """Puts the rows of the classes into the order that ``config.id2label`` has now.

    transformers loads a checkpoint's class heads as they are where their number fits, whatever the classes are called. Here
    classes of the same name (`LabelMap`) keep their rows; the others share what is left, in its order.

    Args:
        model: changed in place.
        before: the classes in the order of the weights, as many.
    """
    after = _classes(model)
    try:
        shared = LabelMap.between(before, after)
    except ValueError:  # no name in common
        return
    rows = dict(zip(shared.student_classes, shared.teacher_classes, strict=True))
    left = iter(sorted(set(after) - set(rows.values())))
    order = [rows[index] if index in rows else next(left) for index in sorted(after)]
    done = set()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if _has_classes(name, value, model) and value.data_ptr() not in done:  # layers may share a head
                done.add(value.data_ptr())
                value[: len(order)] = value[order]


def _in_teacher(name: str, lists: Sequence[str], kept: Sequence[int]) -> str | None:
    """The name of a layer's tensor in the teacher; None where it is in none of the lists."""
    for prefix in lists:
        if name.startswith(prefix + "."):
            index, _, rest = name.removeprefix(prefix + ".").partition(".")
            if not index.isdigit():
                return None
            layer = int(index)
            last = len(kept) - 1
            layer = kept[layer] if layer <= last else kept[last] + layer - last
            return f"{prefix}.{layer}.{rest}"
    return None


def _first_queries(source: Tensor, like: Tensor, groups: int) -> Tensor:
    if source.shape[1:] != like.shape[1:] or len(source) < len(like):
        return source
    each = source.unflatten(0, (groups, -1))[:, : len(like) // groups]
    return each.flatten(0, 1)


def _copy(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    source_of: Callable[[str], str | None],
    instead: Mapping[str, Tensor] | None = None,
) -> int:
    """Copies what of the teacher fits.

    Args:
        source_of: from a tensor's name its name in the teacher; None: it stays.
        instead: by name, tensors to copy instead of the teacher's.

    Returns:
        the number of tensors.
    """
    state = teacher.state_dict()
    fitting = {}
    for name, value in student.state_dict().items():
        source = (instead or {}).get(name, state.get(source_of(name)))
        if source is not None and source.shape == value.shape:
            fitting[name] = source
    if _classes(student) != _classes(teacher):
        fitting = {name: value for name, value in fitting.items() if not _has_classes(name, value, student)}
    _untie(student, teacher, {name: source_of(name) for name in fitting})
    student.load_state_dict(fitting, strict=False)
    return len(fitting)


def _untie(student: PreTrainedModel, teacher: PreTrainedModel, sources: Mapping[str, str | None]) -> None:
    """Takes apart parameters of the student that are several in the teacher.

    Built from a config, the heads of all layers of some families are one parameter; loaded from a checkpoint in which they
    differ they are not (transformers then unties them), and copying would leave the last layer's in all of them.
    """
    teachers = {name: id(value) for name, value in teacher.named_parameters(remove_duplicate=False)}
    shared: dict[int, dict[int | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    parameters = dict(student.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        shared[id(parameter)][teachers.get(sources.get(name))].append(name)
    for kinds in shared.values():
        for names in list(kinds.values())[1:]:
            own = nn.Parameter(parameters[names[0]].detach().clone(), parameters[names[0]].requires_grad)
            for name in names:
                module, _, attribute = name.rpartition(".")
                setattr(student.get_submodule(module), attribute, own)
                student.all_tied_weights_keys.pop(name, None)
            student.all_tied_weights_keys |= dict.fromkeys(names[1:], names[0])


def _classes(model: PreTrainedModel) -> dict[int, str]:
    return {int(index): name for index, name in model.config.id2label.items()}  # a config read from JSON has strings


def _has_classes(name: str, value: Tensor, model: PreTrainedModel) -> bool:
    """Whether a tensor has a row per class: every family calls these "class..." or "...score_head"."""
    rows = (model.config.num_labels, model.config.num_labels + 1)  # with no-object
    return value.dim() > 0 and value.shape[0] in rows and ("class" in name or "score_head" in name)
