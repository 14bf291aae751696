"""The first stage of two-stage detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..view import Proposals
from .classes import keep_classes
from .references import at_least_float32

FAR = 1e4
"""Anchors of tokens that are never selected are infinite, or the largest number of their type, before the sigmoid."""


def proposals_of(logits: Tensor, box_logits: Tensor, classes: Sequence[int] | None) -> Proposals:
    """The first stage from what it predicts at every token.

    Args:
        logits: (B, S, K) of all classes of the model.
        box_logits: (B, S, 4) before the sigmoid.
        classes: the classes that the views keep; None: all.
    """
    valid = (box_logits.abs() < FAR).all(-1)
    boxes = torch.where(valid[..., None], at_least_float32(box_logits), 0.0).sigmoid()
    return Proposals(keep_classes(at_least_float32(logits), classes, "sigmoid"), boxes, valid)
