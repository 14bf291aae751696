"""Views of some of a model's classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..view import Classification


def checked_classes(classes: Sequence[int] | None, number: int) -> list[int] | None:
    """The classes to keep, if they are different ones of ``number`` classes; None: all.

    Raises:
        ValueError: they are not.
    """
    if classes is None:
        return None
    classes = [int(c) for c in classes]
    if not classes or len(set(classes)) < len(classes) or not all(0 <= c < number for c in classes):
        raise ValueError(
            f"`classes` is {classes}; it must hold different indices of the model's {number} classes, at least one."
        )
    return classes


def keep_classes(logits: Tensor, classes: list[int] | None, classification: Classification) -> Tensor:
    """Logits (..., K) or (..., K + 1) of the classes kept, in their order.

    Softmax heads count the others as no-object, which is the exact marginal: the probabilities of the classes kept stay
    what they were.
    """
    if classes is None:
        return logits
    kept = logits[..., classes]
    if classification == "sigmoid":
        return kept
    others = [c for c in range(logits.shape[-1]) if c not in classes]  # no-object among them
    return torch.cat([kept, logits[..., others].logsumexp(-1, keepdim=True)], dim=-1)
