"""The page of a run while it goes on."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from .report import write_report
from .run import write_state

logger = logging.get_logger(__name__)


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
            write_state(state, folder)
            write_report(self.folder or folder)
        except OSError as error:  # a full disk: the run doesn't depend on its report
            logger.warning(f"The report of {folder} could not be written: {error}")
