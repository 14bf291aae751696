"""What a run writes down besides its metrics."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.image_processing_utils import BaseImageProcessor

from ..config import DistillationConfig, without_tokens
from ..evaluation.cost import cost_rows
from ..reporting.run import STATE, TWIN, UNFINISHED, checkpoints, results_file
from ..sheets import FOLDER as SHEETS
from .arguments import DataArguments, ModelArguments
from .setup import Data, write_json

TIMED = 10
"""Calls of each model whose latency is recorded: enough for a median, and seconds even on a CPU."""
PARTS, STEPS_OF_A_PART = 20, 5
"""Parts of a run over which the time of its steps is averaged; fewer where they would have fewer steps (cycles of them) than this."""


class StepClock(TrainerCallback):
    """Times steps from the end of one to the end of the next, so the loading of data counts; evaluations and checkpoints in between
    don't."""

    def __init__(self):
        self.seconds: list[float] = []
        """Of every step but the first."""
        self.since: float | None = None
        self.cycle = 1
        """Steps of which one has a teacher."""
        self.lacks_a_part = False
        """Resumed, so that of the steps with and those without the teacher some weren't timed."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.cycle = 1 if args.method == ["none"] else args.kd_every
        self.lacks_a_part = state.global_step > 0 and args.kd_stop > 0 and args.method != ["none"]

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.since is not None:
            self.seconds.append(now - self.since)
        self.since = now

    def on_evaluate(self, args, state, control, **kwargs):
        self.since = time.perf_counter()

    on_save = on_evaluate

    def typical(self) -> float | None:
        """Seconds of a step: the mean, over twenty parts of the run, of the part's median.

        By the medians what the machine did now and then doesn't count; by the parts the steps after `kd_stop`, which are shorter,
        count for as many as they are; and each of the `kd_every` steps of a cycle has a median of its own. None where fewer
        steps than a cycle were timed, and with `kd_stop` in a run that was resumed.
        """
        if self.lacks_a_part or len(self.seconds) < self.cycle:
            return None
        cycles = len(self.seconds) // self.cycle
        parts = max(1, min(PARTS, cycles // STEPS_OF_A_PART))
        bounds = [round(part * cycles / parts) * self.cycle for part in range(parts)] + [len(self.seconds)]
        return statistics.mean(
            statistics.mean(statistics.median(self.seconds[a + step : b : self.cycle]) for step in range(self.cycle))
            for a, b in pairwise(bounds)
        )


def peak_memory() -> float:
    """MiB: of the GPU since its peak was reset; without one of the process, since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def costs_of(
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]], image: Tensor, args: DistillationConfig
) -> dict[str, dict[str, float]]:
    """By role, ``flops`` and ``latency_ms`` (the median) of a forward pass of one image, for the rows of ``results.json``.

    Args:
        models: with their image processors; they are moved to the device of the training.
        image: (3, H, W) uint8.
    """
    for model, _ in models.values():
        model.to(args.device)
    rows = cost_rows(models, TIMED, image)
    return {role: {"flops": row["flops"], "latency_ms": 1000 * row["latency"]["median"]} for role, row in rows.items()}


def mean_shares(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """By term, and ``kd`` for all of them: the mean share of the gradient norm over the logs that have it."""
    names = dict.fromkeys(name for log in history for name in log if name.startswith("gradient_share_"))
    return {
        name.removeprefix("gradient_share_"): statistics.mean(log[name] for log in history if name in log)
        for name in names
    }


def data_of(data: Data) -> dict[str, Any]:
    """What the training depends on besides the flags: how many images there are, and how they are augmented."""
    sizes = {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    return {"images": sizes, "test_split": data.test_split, "augmentation": asdict(data.train.augmentation)}


def settings(*groups) -> dict[str, Any]:
    """All flags of a run, by group; tokens only as `<TOKEN>`, since this is published."""
    flags = {
        type(group).__name__: group.to_dict() if isinstance(group, DistillationConfig) else vars(group)
        for group in groups
    }
    return {name: without_tokens(values) for name, values in flags.items()}


def origin(name_or_path: str, revision: str | None, cache_dir: str | None) -> dict[str, str | None]:
    """Where a model came from: its id and commit on the Hub, or a local folder, which has no ``revision``."""
    file = None
    if not Path(name_or_path).exists():
        file = try_to_load_from_cache(name_or_path, "config.json", cache_dir=cache_dir, revision=revision)
    return {"name_or_path": name_or_path, "revision": Path(file).parent.name if isinstance(file, str) else None}


def name_run(args: DistillationConfig, of: str | None = None) -> None:
    """A name for the trackers, by default the folder's; a twin's is that of its run with "-twin" behind.

    Without one, trackers would take the evaluation after the training, or the twin, for another run or for the same.
    """
    args.run_name = f"{of}-twin" if of else args.run_name or Path(args.output_dir).as_posix().replace("/", "-")


def forget_earlier(args: DistillationConfig) -> None:
    """Removes what would pass for this run's: results, states, checkpoints, sheets and twin of an earlier one in the same
    folder, unless it goes on."""
    output = Path(args.output_dir)
    used = results_file(output) or (output / STATE).is_file() or checkpoints(output)  # else the folders are another's
    if args.should_save and args.resume_from_checkpoint is None and used:
        for folder in (*checkpoints(output), output / TWIN, output / SHEETS):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (STATE, UNFINISHED, "results.json"):
            (output / name).unlink(missing_ok=True)


def write_unfinished(results: dict[str, Any], args: DistillationConfig) -> None:
    """What is known of the results by now, for whoever watches the run."""
    if args.should_save:
        write_json(results, Path(args.output_dir) / UNFINISHED)


def origins(model_arguments: ModelArguments, data_arguments: DataArguments) -> dict[str, Any]:
    """For ``results.json`` and the card: the checkpoint the student started from, and whether the data are on the Hub."""
    start, name = None, data_arguments.dataset_name
    if model_arguments.model_name_or_path is not None:
        start = origin(model_arguments.model_name_or_path, model_arguments.model_revision, model_arguments.cache_dir)
    local = name.partition(":")[0] == "shapes" or Path(name).expanduser().exists()
    return {"start": start, "dataset_on_hub": not local}
