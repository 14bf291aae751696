"""Divergences between the class predictions of paired queries.

All are Kullback-Leibler forms, cross-entropies with the teacher's entropy taken off: the same gradient, and exactly 0
for an identical student. A temperature T divides the logits and the result is multiplied by T², so that the gradient
keeps its size (Hinton et al. 2015, section 2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from ..view import Classification
from .reduction import mean_over_processes, weighted_mean

_EPSILON = torch.finfo(torch.float32).eps  # keeps a probability of exactly 0 or 1 from becoming an infinite logit


def softmax_kl(student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T² KL(softmax(teacher / T) || softmax(student / T))`` summed over classes, weighted mean over items.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C) of the same pairs, taken as constants.
        weight: (...) >= 0, broadcastable.
        temperature: T > 0.
    """
    log_q = log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return weighted_mean(temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1), weight)


def bernoulli_kl(student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T² sum_c KL(Bernoulli(p_c) || Bernoulli(q_c))``, weighted mean over items.

    p and q are the sigmoids of the teacher's and the student's logits over T.

    Args:
        student_logits: (..., K).
        teacher_logits: (..., K) of the same pairs, taken as constants.
        weight: (...) >= 0, broadcastable.
        temperature: T > 0.
    """
    z_q, z_p = student_logits.float() / temperature, teacher_logits.detach().float() / temperature
    present = z_p.sigmoid() * (logsigmoid(z_p) - logsigmoid(z_q))
    absent = (-z_p).sigmoid() * (logsigmoid(-z_p) - logsigmoid(-z_q))
    return weighted_mean(temperature**2 * (present + absent).sum(-1), weight)


def focal_kl(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor, weight: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """``sum_c |q_c - p_c|^gamma KL(Bernoulli(p_c) || Bernoulli(q_c))`` summed over valid items, over the sum of weights.

    For dense predictions, most of which are background: what both agree on counts little (BCKD, arXiv 2308.14286, Eq. 5).
    No gradient goes through the distance.

    Args:
        student_logits: (..., K).
        teacher_logits: (..., K), taken as constants.
        valid: (...) True = counts.
        weight: (...) >= 0, the foreground whose sum normalises.
    """
    z_q, z_p = student_logits.float(), teacher_logits.detach().float()
    distance = (z_q.sigmoid() - z_p.sigmoid()).abs().detach() ** gamma
    present = z_p.sigmoid() * (logsigmoid(z_p) - logsigmoid(z_q))
    absent = (-z_p).sigmoid() * (logsigmoid(-z_p) - logsigmoid(-z_q))
    total = mean_over_processes(weight.detach().float().sum())
    summed = torch.where(valid, (distance * (present + absent)).sum(-1), 0.0).sum()
    return summed / torch.where(total == 0, 1.0, total)


def class_kl(
    student_logits: Tensor,
    student_kind: Classification,
    teacher_logits: Tensor,
    teacher_kind: Classification,
    weight: Tensor,
    *,
    temperature: float = 1.0,
    form: Literal["bernoulli", "softmax"] = "bernoulli",
) -> Tensor:
    """Divergence of the student's class predictions from the teacher's, whatever the two heads are.

    The teacher is first put in the student's terms, ``as_kind``. A softmax student is then compared by ``softmax_kl``
    with its no-object column; a sigmoid student by ``bernoulli_kl``, or by ``softmax_kl`` over its K classes where
    ``form`` is "softmax" (KD-DETR, arXiv 2211.08071: relative class information only).

    Args:
        student_logits: (..., K), or (..., K + 1) with no-object last where ``student_kind`` is "softmax".
        teacher_logits: the same for the same pairs and the same K classes, taken as constants.
        weight: (...) >= 0, broadcastable.
        temperature: T > 0, applied to logits of the student's kind.
    """
    teacher_logits = as_kind(teacher_logits.detach(), teacher_kind, student_kind)
    if student_kind == "sigmoid" and form == "bernoulli":
        return bernoulli_kl(student_logits, teacher_logits, weight, temperature=temperature)
    return softmax_kl(student_logits, teacher_logits, weight, temperature=temperature)


def as_kind(logits: Tensor, kind: Classification, wanted: Classification) -> Tensor:
    """The same prediction as logits of another kind of head; unchanged where the kinds agree.

    From "softmax", (..., K + 1) -> (..., K): each foreground probability on its own. From "sigmoid", (..., K) ->
    (..., K + 1): the highest of the probabilities p is the foreground's share, divided over the classes as p / sum(p);
    no-object has the rest. Neither is exact, as a set of K Bernoullis holds no categorical distribution.
    """
    if kind == wanted:
        return logits
    if wanted == "sigmoid":
        return logits.float().softmax(-1)[..., :-1].logit(eps=_EPSILON)
    probs = logits.float().sigmoid()
    foreground = probs.amax(-1, keepdim=True)
    categorical = torch.cat([foreground * probs / probs.sum(-1, keepdim=True).clamp(min=_EPSILON), 1 - foreground], -1)
    return categorical.clamp(min=_EPSILON).log()
