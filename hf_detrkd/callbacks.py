"""What a run does between steps."""

from __future__ import annotations

import time
from pathlib import Path

from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from .ema import ExponentialMovingAverage
from .reporting.report import write_report
from .reporting.run import STATE

logger = logging.get_logger(__name__)


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


class WriteReport(TrainerCallback):
    """Writes the state of the training and the page of the run at every evaluation of a training.

    Args:
        folder: of the run, in which the page is; by default the folder that is trained in. A twin's is another one.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = folder
        self.training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def on_evaluate(self, args, state, control, **kwargs):
        if not (self.training and state.is_world_process_zero):
            return
        folder = Path(args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{STATE}.part"  # whoever reads it meanwhile reads all of it
            state.save_to_json(str(part))
            part.replace(folder / STATE)
            write_report(self.folder or folder)
        except OSError as error:  # a full disk: the run doesn't depend on its report
            logger.warning(f"The report of {folder} could not be written: {error}")
