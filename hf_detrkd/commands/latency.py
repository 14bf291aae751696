"""Latency of detectors side by side: PyTorch, compiled and ONNX, the model alone and end to end.

    python scripts/benchmark.py latency --model_name_or_path runs/student --teacher_model_name_or_path TEACHER
    python scripts/benchmark.py latency ... --batch_sizes 1 8 --backends torch onnx --dataset_name DATA --threads 4

End to end is what an application waits for: image processor, copy to the device, model, post-processing; images of a data
set, or random ones of --side pixels. All of a batch size run in turn after a warm-up; figures are median and 95th percentile
of single calls. The environment, its load included, stands with the numbers: on a machine that does other work they say
little.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data import DetectionDataset, load_detection_dataset
from ..detectors import load_detector
from ..evaluation.cost import ROUNDS, WARMUP, Latency, environment, latencies
from ..export import OnnxDetector, export_onnx, fixed_size
from ..reporting.table import text_table
from .arguments import parse
from .predict import best_device
from .setup import write_json

BACKENDS = ("torch", "compiled", "onnx")


@dataclass
class LatencyArguments:
    """What is timed, and how."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The student: a folder or a Hub id."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "The teacher, timed beside it."})
    image_size: int | None = field(
        default=None, metadata={"help": "Input of both, square; by default what each one's processor says."}
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Images per call."})
    backends: list[str] = field(
        default_factory=lambda: list(BACKENDS), metadata={"help": "Some of torch, compiled, onnx."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Images of a data set; by default random ones."})
    dataset_split: str = field(default="test", metadata={"help": "Its split."})
    side: int = field(default=640, metadata={"help": "Side of the random images."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1; by default the best there is."})
    threads: int | None = field(default=None, metadata={"help": "Of the CPU; by default as torch is set."})
    warmup: int = field(default=WARMUP, metadata={"help": "Calls that don't count."})
    rounds: int = field(default=ROUNDS, metadata={"help": "Calls that count."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the numbers."})


@dataclass(frozen=True)
class Timed:
    """One model of the comparison."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    size: tuple[int, int]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Prints a table; returns and, with ``--output``, writes the numbers."""
    (arguments,) = parse((LatencyArguments,), argv, __doc__)
    unknown = sorted(set(arguments.backends) - set(BACKENDS))
    if unknown:
        raise ValueError(f"--backends has {unknown}; allowed are {', '.join(BACKENDS)}.")
    if arguments.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the detector to time.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device or best_device())
    places = {"teacher": arguments.teacher_model_name_or_path, "student": arguments.model_name_or_path}
    models = {role: _load(place, arguments.image_size, device) for role, place in places.items() if place is not None}
    rows: list[dict[str, Any]] = []
    for batch_size in arguments.batch_sizes:
        images = read_images(arguments, batch_size)
        rows += latency_rows(models, images, arguments.backends, arguments.warmup, arguments.rounds)
    results = {
        "settings": asdict(arguments),
        "environment": environment(device),
        "models": {
            role: {
                "name_or_path": timed.model.name_or_path,
                "parameters": timed.model.num_parameters(),
                "input": list(timed.size),
            }
            for role, timed in models.items()
        },
        "rows": rows,
    }
    print(latency_table(rows))
    print("\n" + ", ".join(f"{name} {value}" for name, value in results["environment"].items()))
    if arguments.output:
        write_json(results, arguments.output)
        print(f"written to {arguments.output}")
    return results


def _load(place: str, image_size: int | None, device: torch.device) -> Timed:
    processor, size = fixed_size(
        AutoImageProcessor.from_pretrained(place), None if image_size is None else (image_size, image_size)
    )
    return Timed(load_detector(place).to(device).eval(), processor, size)


def read_images(arguments: LatencyArguments, number: int) -> list[Tensor]:
    """(3, H, W) uint8 images, the first of a split, again from its beginning where it has fewer; or random ones."""
    if arguments.dataset_name is None:
        generator = torch.Generator().manual_seed(0)
        shape = (3, arguments.side, arguments.side)
        return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(number)]
    splits = load_detection_dataset(arguments.dataset_name)
    if arguments.dataset_split not in splits:
        raise ValueError(f"{arguments.dataset_name} has no split {arguments.dataset_split!r}; it has {list(splits)}.")
    dataset = DetectionDataset(splits[arguments.dataset_split])
    return [dataset[index % len(dataset)]["image"] for index in range(number)]


def latency_rows(
    models: dict[str, Timed], images: list[Tensor], backends: Sequence[str], warmup: int, rounds: int
) -> list[dict[str, Any]]:
    """One row per model, backend and scope ("model", "end to end"), for calls with all the images.

    A backend that can't run a model has a row too, with ``failed`` in words and no times.
    """
    functions: dict[tuple[str, str, str], Callable[[], Any]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for role, timed in models.items():
            for backend in backends:
                try:
                    alone, whole = _calls(timed, backend, images, Path(folder) / role)
                    alone(), whole()  # compiles, and finds what can't run
                except Exception as error:  # a compiler or exporter may raise anything, and the other rows are wanted
                    first = f"{type(error).__name__}: {error}".splitlines()[0]
                    rows.append({"model": role, "backend": backend, "batch_size": len(images), "failed": first})
                    continue
                functions[role, backend, "model"] = alone
                functions[role, backend, "end to end"] = whole
        times: dict[Any, Latency] = latencies(functions, warmup=warmup, rounds=rounds) if functions else {}
    for (role, backend, scope), latency in times.items():
        row = {"model": role, "backend": backend, "scope": scope, "batch_size": len(images), **asdict(latency)}
        rows.append({**row, "images_per_second": len(images) / latency.median})
    return rows


def _calls(timed: Timed, backend: str, images: list[Tensor], folder: Path) -> tuple[Callable, Callable]:
    """The model alone on pixels that are ready, and everything from images to detections."""
    device = timed.model.device
    processor = timed.processor
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    sizes = torch.tensor([image.shape[1:] for image in images])
    if backend == "onnx":
        export_onnx(timed.model, processor, folder, image_size=timed.size, batch_size=len(images))
        detector = OnnxDetector(folder, onnx_providers(device))
        array = pixels.contiguous().numpy()

        def end_to_end():
            return detector(processor(images=images, return_tensors="pt")["pixel_values"], sizes)

        return lambda: detector.run(array), end_to_end

    model = torch.compile(timed.model) if backend == "compiled" else timed.model
    ready, on_device = pixels.to(device), sizes.to(device)

    def forward(values: Tensor):
        with torch.no_grad():
            return model(pixel_values=values)

    def whole():
        values = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        return processor.post_process_object_detection(forward(values), threshold=0.5, target_sizes=on_device)

    return lambda: forward(ready), whole


def onnx_providers(device: torch.device) -> list[str]:
    """onnxruntime's name of the device that torch's rows are measured on.

    Raises:
        RuntimeError: onnxruntime can't use it, and would take the CPU in silence.
    """
    import onnxruntime

    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeError("onnxruntime has no CUDAExecutionProvider here: pip install onnxruntime-gpu in its place")
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def latency_table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds and images per second; what failed, in words below."""
    header = ["model", "backend", "scope", "batch", "median (ms)", "p95 (ms)", "images/s"]
    lines = [
        [
            *(row["model"], row["backend"], row["scope"], str(row["batch_size"])),
            *(f"{1000 * row[name]:.1f}" for name in ("median", "p95")),
            f"{row['images_per_second']:.1f}",
        ]
        for row in rows
        if "failed" not in row
    ]
    failed = [
        f"{row['model']} with {row['backend']}, batch {row['batch_size']}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return "\n".join([text_table(header, lines), *failed])


if __name__ == "__main__":
    main()
