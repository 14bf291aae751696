"""What a detector costs: parameters, floating-point operations and latency."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.collator import model_inputs
from ..families.checks import enough_places

WARMUP, ROUNDS = 5, 30
"""Calls that don't count, and calls that do: the first ones allocate, and choose and compile kernels."""


@dataclass(frozen=True)
class Latency:
    """Seconds of one call."""

    median: float
    p95: float
    """19 of 20 calls are faster: what a user notices."""
    rounds: int


def latencies(
    functions: Mapping[str, Callable[[], Any]], *, warmup: int = WARMUP, rounds: int = ROUNDS
) -> dict[str, Latency]:
    """How long functions take. They run in turn (A B A B ...), so that a machine whose speed drifts is fair to all.

    Work on a GPU is waited for.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    _wait()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: Latency(statistics.median(values), p95(values), rounds) for name, values in seconds.items()}


def p95(values: list[float]) -> float:
    """The 95th percentile, interpolated."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def flops(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    """Of one forward pass in evaluation mode, two for each multiply-add.

    As `torch.utils.flop_counter` counts: matrix products, convolutions and attention. The sampling of deformable attention
    and all elementwise work are left out.
    """
    was_training = model.training
    # `no_grad` alone isn't enough: a slice of a parameter wants a gradient under it too, has no function to get one
    # from, and the counter's hooks on modules that are given such a slice (one-stage Deformable DETR, LW-DETR) fail.
    trained = [parameter.requires_grad_(False) for parameter in model.parameters() if parameter.requires_grad]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter, enough_places(model):
            model.eval()(**inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        model.train(was_training)
    return counter.get_total_flops()


def cost_rows(
    models: Mapping[str, tuple[PreTrainedModel, BaseImageProcessor]], rounds: int, image: Tensor | None = None
) -> dict[str, dict[str, Any]]:
    """By role: parameters, FLOPs and (where ``rounds`` is not 0) latency of one image, in turn.

    Args:
        image: (3, H, W) uint8 before the processor; by default a black one of 640 x 640.
    """
    if image is None:
        image = torch.zeros(3, 640, 640, dtype=torch.uint8)
    inputs = {}
    for role, (model, processor) in models.items():
        inputs[role] = {name: value.to(model.device) for name, value in model_inputs(processor, [image]).items()}
    rows: dict[str, dict[str, Any]] = {
        role: {
            "parameters": model.num_parameters(),
            "flops": flops(model, inputs[role]),
            "input": list(inputs[role]["pixel_values"].shape[-2:]),
        }
        for role, (model, _) in models.items()
    }
    if rounds:

        def call(role: str):
            model = models[role][0].eval()

            def run():
                with torch.no_grad():
                    model(**inputs[role])

            return run

        times = latencies({role: call(role) for role in models}, warmup=min(3, rounds), rounds=rounds)
        for role, latency in times.items():
            rows[role]["latency"] = asdict(latency)
    return rows


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What latencies depend on besides the model."""
    device = torch.device(device)
    packages = {}
    for name in ("torch", "transformers", "onnxruntime"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} ({device.type})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(psutil.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}, python {platform.python_version()}",
        **packages,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")  # elsewhere platform.processor() knows
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
