"""What a run does between steps."""

from __future__ import annotations

from transformers.trainer_callback import TrainerCallback

from .ema import ExponentialMovingAverage


class UpdateAverage(TrainerCallback):
    """The moving average takes the student in after every optimiser step."""

    def __init__(self, ema: ExponentialMovingAverage):
        self.ema = ema

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.update()


class SetEpoch(TrainerCallback):
    """Tells the data set the epoch before its loader starts. accelerate does so only for some samplers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))
