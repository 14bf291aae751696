"""Losses: tensors in, a scalar out.

Every function returns a weighted mean over its items (``reduction.weighted_mean``), summed over classes or coordinates,
in float32, with gradient to the student alone. The task loss, which needs a model, is in ``losses.detection``.
"""

from .boxes import generalized_iou, giou, l1
from .logits import bernoulli_kl, class_kl, softmax_kl
from .reduction import weighted_mean

__all__ = ["bernoulli_kl", "class_kl", "generalized_iou", "giou", "l1", "softmax_kl", "weighted_mean"]
