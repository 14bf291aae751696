"""The exponential moving average of the student: what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averaged copies of a model's parameters and floating-point buffers.

    ``average <- d * average + (1 - d) * value`` with ``d = min(decay, (1 + t) / (10 + t))`` after t updates, so that
    short runs are not dominated by the initial weights (tf.train.ExponentialMovingAverage, ``num_updates``).

    Args:
        model: the model averaged.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.model = model
        self.average = {name: value.detach().clone() for name, value in self._values().items()}

    def _values(self) -> dict[str, Tensor]:
        """Every tensor of the model once: tied weights appear under one name."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present values. Integers (BatchNorm's counters) are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = self._values()
        moving = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in moving], [values[n] for n in moving], 1 - decay)
        for name in values.keys() - set(moving):
            self.average[name].copy_(values[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged values inside, its own again outside."""
        own = {name: value.detach().clone() for name, value in self._values().items()}
        self.copy_to_model()
        try:
            yield
        finally:
            self._write(own)

    def copy_to_model(self) -> None:
        """The model takes the averaged values."""
        self._write(self.average)

    def copy_from_model(self) -> None:
        """The average takes the model's values."""
        self.average = {name: value.detach().clone() for name, value in self._values().items()}

    @torch.no_grad()
    def _write(self, source: dict[str, Tensor]) -> None:
        for name, value in self._values().items():
            value.copy_(source[name])
