"""Losses: tensors in, a scalar out.

Most return a weighted mean over their items (``reduction.weighted_mean``), summed over classes or coordinates; what else is
said where it is so. All are in float32, with gradient to the student alone. The task loss, which needs a model, is in
``losses.detection``.
"""

from .boxes import generalized_iou, giou, l1
from .logits import bernoulli_kl, class_kl, softmax_kl
from .reduction import weighted_mean

__all__ = ["bernoulli_kl", "class_kl", "generalized_iou", "giou", "l1", "softmax_kl", "weighted_mean"]
