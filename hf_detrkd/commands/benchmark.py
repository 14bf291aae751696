"""What a training step costs, measured in pairs; and latency.

    python scripts/benchmark.py latency ...                   of detectors, see hf_detrkd/commands/latency.py
    python scripts/benchmark.py task-loss                     transformers' matching against all layers at once
    python scripts/benchmark.py step --method kd_detr qskd    distillation steps against the sum of what they can't avoid
    python scripts/benchmark.py step --student CONFIG_OR_FOLDER --teacher CONFIG_OR_FOLDER --image_size 320

The two sides of a pair run in turn (A B A B ...), so a machine whose speed drifts does no harm; the figures are medians,
that of a ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedModel

from ..families import FamilyAdapter, adapter_for
from ..labels import LabelMap
from ..losses.detection import task_loss
from ..methods import METHODS, build_methods
from ..model import DistillationModel
from ..view import DetrView, Queries
from . import latency, records
from .setup import write_json

MODELS = Path(__file__).parents[2] / "scripts" / "recipes" / "models"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Prints a table; returns and, with ``--output``, writes the numbers."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["latency"]:
        return latency.main(words[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "task-loss", "memory", "latency"))
    parser.add_argument(
        "--method", nargs="+", default=["kd_detr"], choices=["none", *METHODS], help="one after the other"
    )
    parser.add_argument("--method_config", type=json.loads, default=None, help="of all of them, as JSON")
    parser.add_argument("--student", default=str(MODELS / "rt_detr_mobilenetv2_student.json"))
    parser.add_argument("--teacher", default=str(MODELS / "rt_detr_mobilenetv2_teacher.json"))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=160)
    parser.add_argument("--objects", type=int, default=12, help="per image")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--families", nargs="+", default=["detr", "deformable_detr", "rt_detr"], help="of task-loss")
    parser.add_argument("--output", help="JSON file for the numbers")
    arguments = parser.parse_args(words)
    if arguments.what == "step":
        peaks = {method: peak_memory(arguments, method) for method in ("none", *arguments.method)}
        rows = [{**step_row(arguments, method), "peak_memory_MiB": peaks[method]} for method in arguments.method]
        rows.insert(0, {"method": "none", "peak_memory_MiB": peaks["none"]})
    elif arguments.what == "memory":
        rows = memory(arguments)
    else:
        rows = [task_loss_row(family, arguments.rounds) for family in arguments.families]
    results = {
        "what": arguments.what,
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("what", "output")},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    for row in rows:
        print(
            "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )
    if arguments.output:
        write_json(results, arguments.output)
    return results


def paired(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median seconds of two functions and the median of the ratios one / other, after one warm-up of each."""
    one(), other()
    seconds = [(_seconds(one), _seconds(other)) for _ in range(rounds)]
    ratios = [a / b for a, b in seconds]
    return (*(statistics.median(column) for column in zip(*seconds, strict=True)), statistics.median(ratios))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# -- the task loss ---------------------------------------------------------------------------------------------------


def task_loss_row(family: str, rounds: int) -> dict[str, Any]:
    """transformers' own loss of six layers, 300 queries, 80 classes, 8 images of 20 objects, with its matching and ours.

    The loss function is timed alone, on the arguments of a forward pass with random numbers in place of the predictions:
    an untrained model says nearly the same for all queries, and which of equal assignments is found is then chance.
    """
    config = AutoConfig.for_model(family, num_labels=80, num_queries=300, decoder_layers=6, auxiliary_loss=True)
    model = AutoModelForObjectDetection.from_config(config)
    adapter = adapter_for(model)
    calls: list[tuple[tuple, dict]] = []
    original = model.loss_function

    def keep(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    model.loss_function = keep
    with torch.no_grad():
        model.eval()(**random_batch(8, 128, objects=20, classes=80))
    model.loss_function = original
    args, kwargs = _with_random_predictions(calls[0], torch.Generator().manual_seed(0))

    def theirs() -> Tensor:
        return model.loss_function(*args, **kwargs)[0]

    def ours() -> Tensor:
        with task_loss(adapter, per_layer=False):
            return model.loss_function(*args, **kwargs)[0]

    if not torch.equal(theirs(), ours()):
        raise RuntimeError(f"the two losses of {family} differ: {theirs().item()} and {ours().item()}")
    slow, fast, ratio = paired(theirs, ours, rounds)
    return {"family": family, "transformers_s": slow, "hf_detrkd_s": fast, "speedup": ratio}


def _with_random_predictions(value: Any, generator: torch.Generator) -> Any:
    """The same structure with random logits and boxes, that is tensors of three dimensions or more; labels have fewer."""
    if isinstance(value, (tuple, list)):
        return type(value)(_with_random_predictions(part, generator) for part in value)
    if isinstance(value, dict):
        return {key: _with_random_predictions(part, generator) for key, part in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 3:
        return value
    noise = torch.randn(value.shape, generator=generator)
    if value.shape[-1] != 4:
        return noise
    centre, size = noise.sigmoid().split(2, dim=-1)
    return torch.cat([centre * 0.6 + 0.2, size * 0.3 + 0.05], dim=-1)


# -- the step --------------------------------------------------------------------------------------------------------


def step_row(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """A step of `DistillationModel` against student step + teacher forward + the method's decoder passes, run by hand.

    Both sides use the task loss with all layers matched at once. ``overhead`` is what the views, the matching and the
    losses of the method cost; ``cost`` is the whole step beside a plain student step by transformers.
    """
    student, teacher = build(arguments.student), build(arguments.teacher)
    labels = LabelMap.between(teacher.config.id2label, student.config.id2label)
    adapters = adapter_for(student, labels.student_classes), adapter_for(teacher, labels.teacher_classes)
    methods = build_methods([method], arguments.method_config, *adapters)
    model = DistillationModel(student, adapters[0], methods, layer_supervision=False).train()
    batch = random_batch(arguments.batch_size, arguments.image_size, arguments.objects, student.config.num_labels)
    pixels = {"pixel_values": batch["pixel_values"]}
    attentions = [any(role in method.attentions for method in methods) for role in ("student", "teacher")]

    def look() -> DetrView:
        with torch.no_grad():
            return adapters[1].forward(pixels, attentions=attentions[1])[1]

    def whole() -> None:
        model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        model(**batch, teacher_view=look(), generator=generator)["loss"].backward()

    with recorded_replays(adapters[0]) as passes, recorded_replays(adapters[1]) as teacher_passes:
        whole()

    def unavoidable() -> None:
        model.zero_grad()
        seen = look()
        with torch.no_grad():
            for groups in teacher_passes:
                adapters[1].replay(seen, groups)
        with task_loss(adapters[0], per_layer=False):
            output, view = adapters[0].forward(batch, attentions=attentions[0])
        loss = output.loss
        for groups in passes:
            for reply in adapters[0].replay(view, groups):
                loss = loss + 1e-3 * (reply.logits.mean() + reply.boxes.mean())
        loss.backward()

    def plain() -> None:
        model.zero_grad()
        student(**batch).loss.backward()

    step, parts, overhead = paired(whole, unavoidable, arguments.rounds)
    _, alone, cost = paired(whole, plain, arguments.rounds)
    seconds = {"step_s": step, "parts_s": parts, "overhead": overhead, "plain_s": alone, "cost": cost}
    return {"method": method, **seconds}


@contextmanager
def recorded_replays(adapter: FamilyAdapter) -> Iterator[list[list[Queries]]]:
    """While it runs, the queries of every replay are kept: which decoder passes a method asks for."""
    kept: list[list[Queries]] = []
    original = adapter.replay

    def replay(view, groups, **keywords):
        kept.append([queries.detach() for queries in groups])
        return original(view, groups, **keywords)

    adapter.replay = replay
    try:
        yield kept
    finally:
        del adapter.replay


def peak_memory(arguments: argparse.Namespace, method: str) -> float:
    """Peak memory, in MiB, of a process that runs three steps of a method; with "none" plain steps of the student."""
    command = [sys.executable, "-m", "hf_detrkd.commands.benchmark", "memory", "--method", method]
    for name in ("student", "teacher", "batch_size", "image_size", "objects"):
        command += [f"--{name}", str(getattr(arguments, name))]
    if arguments.method_config and method != "none":
        command += ["--method_config", json.dumps(arguments.method_config)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Three steps in this process, and its peak memory: resident on the CPU, allocated on a GPU."""
    student = build(arguments.student)
    adapter = adapter_for(student)
    methods, look = [], None
    if arguments.method != ["none"]:
        teacher = adapter_for(build(arguments.teacher))
        methods = build_methods(arguments.method, arguments.method_config, adapter, teacher)
    attentions = [any(role in method.attentions for method in methods) for role in ("student", "teacher")]
    model = DistillationModel(student, adapter, methods, layer_supervision=False).train()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = random_batch(arguments.batch_size, arguments.image_size, arguments.objects, student.config.num_labels)
    for _ in range(3):
        if methods:
            with torch.no_grad():
                look = teacher.forward({"pixel_values": batch["pixel_values"]}, attentions=attentions[1])[1]
        model(**batch, teacher_view=look, generator=torch.Generator())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [{"method": "+".join(arguments.method), "peak_memory_MiB": records.peak_memory()}]


# -- inputs ----------------------------------------------------------------------------------------------------------


def build(place: str) -> PreTrainedModel:
    """A detector from a config file with random weights, or from a checkpoint; on the GPU where there is one."""
    if place.endswith(".json"):
        if not Path(place).is_file():
            raise FileNotFoundError(
                f"{place}: there is no such file. The default configs are in the repository, not in the installed package: "
                "name a config.json or a checkpoint with --student and --teacher."
            )
        model = AutoModelForObjectDetection.from_config(AutoConfig.from_pretrained(place))
    else:
        model = AutoModelForObjectDetection.from_pretrained(place)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def random_batch(size: int, pixels: int, objects: int, classes: int) -> dict[str, Any]:
    """Random images and targets."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def boxes() -> Tensor:
        centre, extent = torch.rand(2, objects, 2, generator=generator)
        return torch.cat([centre * 0.6 + 0.2, extent * 0.3 + 0.05], dim=-1).to(device)

    def label() -> dict[str, Tensor]:
        class_labels = torch.randint(0, classes, (objects,), generator=generator)
        return {"class_labels": class_labels.to(device), "boxes": boxes()}

    images = torch.randn(size, 3, pixels, pixels, generator=generator).to(device)
    return {"pixel_values": images, "labels": [label() for _ in range(size)]}


if __name__ == "__main__":
    main()
