"""Divergences between distributions of box edges: LD (arXiv 2102.12252) and D-FINE's GO-LSD (arXiv 2410.13842).

An edge is a categorical distribution over bins, which are offsets from the query's reference box. Two distributions are
comparable only where bins and reference box are the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from .reduction import mean_over_processes, weighted_mean


def edge_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    temperature: float = 10.0,
    bins: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """LD: ``T² KL(softmax(teacher / T) || softmax(student / T))``, weighted mean over queries, mean over the four edges.

    Args:
        student: (..., 4, bins) logits.
        teacher: the same of the same queries, taken as constants.
        weight: (...) >= 0 of the queries, broadcastable.
        temperature: T > 0.
        bins: "mean" over the bins, as LD's released code; "sum", as a KL is defined.
    """
    return weighted_mean(_divergences(student, teacher, temperature, bins).mean(-1), weight)


def decoupled_edge_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, matched: Tensor, *, temperature: float = 5.0
) -> Tensor:
    """GO-LSD: the weighted divergences of matched and of unmatched queries, each a mean, in proportion of the roots.

    ``(n sum_matched w KL / |matched| + m sum_unmatched w KL / |unmatched|) / (n + m)`` with n and m the square roots of
    the numbers of edges (D-FINE, dfine_criterion.py 139-231; its factor 8 / B under both roots cancels). The weights
    don't normalise: where the teacher sees little there is little to learn.

    Args:
        student: (..., 4, bins) logits.
        teacher: the same of the same queries, taken as constants.
        weight: (...) >= 0 of the queries.
        matched: (...) True where the query is assigned to a target.
        temperature: T > 0.
    """
    values = weight.detach()[..., None] * _divergences(student, teacher, temperature, "sum")
    matched = matched[..., None].expand_as(values).float()
    means = torch.stack([weighted_mean(values, part) for part in (matched, 1 - matched)])
    roots = torch.stack([mean_over_processes(part.sum()) for part in (matched, 1 - matched)]).sqrt()
    return (roots * means).sum() / roots.sum()


def _divergences(student: Tensor, teacher: Tensor, temperature: float, bins: str) -> Tensor:
    """(..., 4)"""
    log_q = log_softmax(student.float() / temperature, dim=-1)
    log_p = log_softmax(teacher.detach().float() / temperature, dim=-1)
    divergence = log_p.exp() * (log_p - log_q)
    return temperature**2 * (divergence.sum(-1) if bins == "sum" else divergence.mean(-1))
