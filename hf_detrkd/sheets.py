"""Sheets of detections while a run goes on: as files, and as images in the trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging

from .reporting.sheet import draw_sheet, find, sheet_rows, spread

logger = logging.get_logger(__name__)

FOLDER = "sheets"
"""In the output folder: ``step_<step>.png``."""
TAG = "sheet"
"""What trackers call the image."""


class DrawSheets(TrainerCallback):
    """Every so many steps, what the models find in a few images of a split, always the same ones.

    Process zero draws, while the others wait for its next step. Detections of models that aren't trained are computed
    once, on every process: a model that the processes hold together runs only on all of them.

    Args:
        dataset: a `DetectionDataset`.
        student: the detector in training, and its image processor.
        fixed: by title of the column, detectors that aren't trained, and their image processors.
        every: steps.
        number: of images.
        averaged: what is drawn is drawn in this context, in which the student has the weights that are evaluated.
        trackers: all callbacks of the run; those of tensorboard, trackio and wandb get the sheets too.
    """

    def __init__(
        self,
        dataset,
        student: tuple[PreTrainedModel, BaseImageProcessor],
        fixed: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]],
        *,
        every: int,
        number: int,
        averaged: Callable[[], AbstractContextManager] = nullcontext,
        trackers: Sequence[TrainerCallback] = (),
    ):
        self.dataset, self.student, self.fixed = dataset, student, fixed
        self.every, self.number, self.averaged, self.trackers = every, number, averaged, trackers

    def on_train_begin(self, args, state, control, **kwargs):
        self._items = spread(self.dataset, self.number)
        self._found = {title: find(self._items, *its, self.dataset.id2label) for title, its in self.fixed.items()}

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step % self.every or not state.is_world_process_zero:
            return
        with self.averaged():
            found = {**self._found, f"student, step {step}": find(self._items, *self.student, self.dataset.id2label)}
        path = Path(args.output_dir) / FOLDER / f"step_{step}.png"
        try:
            draw_sheet(sheet_rows(self._items, found), path, class_names=self.dataset.id2label)
        except OSError as error:  # a full disk: the run doesn't depend on its pictures
            logger.warning(f"{path} could not be written: {error}")
            return
        show(path, step, self.trackers)


def show(path: Path, step: int, trackers: Sequence[TrainerCallback]) -> None:
    """Gives a picture to the trackers of a run that take pictures, beside the scalars of the same step."""
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            tracker.tb_writer.add_image(TAG, pixels, step, dataformats="HWC")
        elif isinstance(tracker, TrackioCallback | WandbCallback):
            package = import_module("trackio" if isinstance(tracker, TrackioCallback) else "wandb")
            # transformers gives both their step as a value
            package.log({TAG: package.Image(str(path)), "train/global_step": step})
