"""The one normalisation of all losses."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """``sum(weight * values) / sum(weight)``, float32.

    The denominator is the mean over all processes where ``torch.distributed`` runs: DDP averages gradients over
    processes, so the result is that of one process with the whole batch, also where the processes select unequally
    much. Every process must therefore call this equally often.

    Args:
        values: any shape. What they are where ``weight`` is 0 does not matter.
        weight: >= 0, broadcastable to the shape of ``values``; its gradient is not followed.

    Returns:
        a scalar; exactly 0, with a graph, where nothing is selected.
    """
    values = values.float()
    weight = weight.detach().to(values).broadcast_to(values.shape)
    total = mean_over_processes(weight.sum())
    weighted = torch.where(weight == 0, 0.0, weight * values)
    return weighted.sum() / torch.where(total == 0, 1.0, total)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes; itself where there is one. Every process must call it equally often."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    distributed.all_reduce(value)
    return value / distributed.get_world_size()
