"""What a run writes down besides its metrics."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from transformers import TrainerCallback

from ..config import DistillationConfig
from .setup import Data


class StepClock(TrainerCallback):
    """Times steps from the end of one to the end of the next, so the loading of data counts."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def median(self) -> float | None:
        """Seconds of the median step: evaluations and checkpoints, and what else the machine did now and then, don't
        count. None where there were fewer than two steps."""
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(seconds) if seconds else None


def peak_memory() -> float:
    """MiB: of the GPU since its peak was reset; without one of the process, since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux


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
    """All flags of a run, by group."""
    return {
        type(group).__name__: group.to_dict() if isinstance(group, DistillationConfig) else vars(group)
        for group in groups
    }


def versions() -> dict[str, str]:
    """What a result depends on besides the settings."""
    packages = ("hf_detrkd", "torch", "torchvision", "transformers", "accelerate", "datasets", "numpy", "pycocotools")
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}",
        **{name: version(name) for name in packages},
    }
