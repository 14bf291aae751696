"""What every distillation method is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..families import FamilyAdapter
from ..view import DetrView


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; goes into docs and model cards."""

    title: str
    arxiv: str
    bibtex: str


class DistillationMethod(nn.Module):
    """A paper's loss between two views. Owns the projectors the paper needs and nothing else.

    A subclass sets the class attributes, builds its projectors in ``__init__`` and returns its *unweighted* terms from
    ``forward``. ``config.weights`` has exactly the names of the terms.
    """

    name: ClassVar[str]
    paper: ClassVar[Paper | None] = None
    config_class: ClassVar[type]
    needs_student: ClassVar[frozenset[str]] = frozenset()
    """Capabilities (`FamilyAdapter.provides`) without which the method can't run."""
    needs_teacher: ClassVar[frozenset[str]] = frozenset()
    attentions: frozenset[str] = frozenset()
    """Whose views must hold attention maps: "student", "teacher". An instance may need less than its class says."""

    def __init__(self, config, student: FamilyAdapter, teacher: FamilyAdapter):
        super().__init__()
        for role, adapter, needs in (
            ("student", student, self.needs_student),
            ("teacher", teacher, self.needs_teacher),
        ):
            missing = sorted(needs - adapter.provides)
            if missing:
                raise ValueError(
                    f"method `{self.name}` needs {', '.join(missing)} from the {role}, which "
                    f"`{adapter.model.config.model_type}` doesn't provide (it provides {', '.join(sorted(adapter.provides))}). "
                    "Choose another method or another model."
                )
        if not any(config.weights.values()):
            raise ValueError(f"all `weights` of {self.name} are 0, so there is nothing to distil. Use method none.")
        self.config = config

    def forward(
        self,
        student: DetrView,
        teacher: DetrView,
        targets: Sequence[Mapping[str, Tensor]],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The method's terms.

        Args:
            student: the student's view of the batch, with graph.
            teacher: the teacher's view of the same images, without graph. Both have the same K classes in the same order.
            targets: per image ``class_labels`` (N,) among the views' classes and ``boxes`` (N, 4); where the models don't share all
                classes also ``other_boxes`` (M, 4), of objects of the others.
            generator: a CPU generator that draws the same numbers on every process and after a resume.

        Returns:
            scalar tensors under the names of ``config.weights``.
        """
        raise NotImplementedError


def configure(config_class: type, given: Mapping[str, Any] | None):
    """A method's config from a user's settings, with its weights merged into the default ones.

    Raises:
        ValueError: an unknown key or term, a value of another type than the default's, or a negative weight.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"`method_config` must hold a dict of the settings of {config_class.__name__}, got {given!r}.")
    given = dict(given or {})
    known = [f.name for f in fields(config_class)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"`method_config` has unknown keys {unknown}; {config_class.__name__} knows {known}.")
    config = config_class()
    for name, value in given.items():
        _check_type(name, value, getattr(config, name))
    weights = given.pop("weights", {})
    unknown = sorted(set(weights) - set(config.weights))
    if unknown:
        raise ValueError(f"`weights` names unknown terms {unknown}; the terms are {sorted(config.weights)}.")
    for name, value in weights.items():
        _check_type(f"weights.{name}", value, 0.0)
        if not 0 <= value < math.inf:
            raise ValueError(
                f"`weights` has {value} for `{name}`; a weight must be 0 or more, and 0 leaves the term out."
            )
    return replace(
        config, **given, weights={**config.weights, **{name: float(value) for name, value in weights.items()}}
    )


def _check_type(name: str, value: Any, default: Any) -> None:
    """Refuses a setting of another type than its default; an integer will do for a float."""
    expected = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool)):
        wanted = "number" if isinstance(default, float) else type(default).__name__
        raise ValueError(f"`{name}` of `method_config` is {value!r}; it must be a {wanted} such as {default!r}.")


def check_choice(config, **allowed: Sequence[str]) -> None:
    """Refuses a config whose named fields are not among the allowed values."""
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"`{name}` of {type(config).__name__} is {getattr(config, name)!r}; allowed are {', '.join(map(repr, values))}."
            )


def check_class_loss(name: str, config, student: FamilyAdapter) -> None:
    """Refuses class settings that can't teach: a temperature of 0, or a softmax over the one class of a sigmoid head."""
    if not 0 < config.temperature < math.inf:
        raise ValueError(f"`temperature` of {name} is {config.temperature}; it must be above 0.")
    if config.class_loss == "softmax" and student.classification == "sigmoid" and student.num_classes == 1:
        raise ValueError(
            f"`class_loss='softmax'` of {name} is constant with a single class. Use class_loss='bernoulli'."
        )
