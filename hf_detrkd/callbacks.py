"""What a run does between steps."""

from __future__ import annotations

import time

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


class StampSeconds(TrainerCallback):
    """Writes into every entry of the log history the ``seconds`` that the run has taken by then.

    Wall-clock time since training began, evaluations included. A resumed run counts on from its checkpoint's last log.
    """

    def __init__(self):
        self.start: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        before = max((log["seconds"] for log in state.log_history if "seconds" in log), default=0.0)
        self.start = time.perf_counter() - before

    def on_log(self, args, state, control, **kwargs):
        if self.start is not None:  # an evaluation before any training has no such time
            state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 1)
