"""A frozen teacher that the processes of a run hold together; and what may not be sharded, the student."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

if TYPE_CHECKING:
    from .families import FamilyAdapter

logger = logging.get_logger(__name__)

LARGEST_UNIT = 10_000_000
"""Parameters of one unit at the most, unless a single layer has more: 40 MB in float32 are whole at a time."""


def shard_teacher(adapter: FamilyAdapter, device: torch.device, largest: int = LARGEST_UNIT) -> None:
    """Shards what the adapter's model computes before its decoder over all processes, by torch's `fully_shard`.

    Each process keeps 1/N of every parameter of a unit. A unit is gathered before its forward and freed after it, so
    from here on all processes have to run the model together. They do so once per step. The decoder stays whole:
    methods replay it, and how often may depend on the targets of a process (`decode_targets`).

    Units are blocks of a network, not networks: transformers looks up by class what a `PreTrainedModel` records, and
    `fully_shard` gives a module a class of its own.

    Args:
        adapter: of a model in evaluation that isn't trained. The model is changed in place.
        device: of this process; units move there one by one, so that it never holds all of them.
        largest: parameters of a unit.
    """
    processes = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (processes,))
    for unit in list(units_of(adapter.before_decoder, largest)):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    if distributed.get_rank() == 0:
        logger.warning(
            f"The teacher is sharded over {processes} processes: of {_size(adapter.model) / 1e6:.1f} M parameters each "
            f"holds {held(adapter.model) / 1e6:.1f} M."
        )


def units_of(modules: Iterable[nn.Module], largest: int) -> Iterator[nn.Module]:
    """The largest modules inside, in the order of the model, that hold at most ``largest`` parameters, or single layers.

    What has no ``forward`` of its own, such as a list, is no unit: a call is what gathers its parameters.
    """
    for module in modules:
        if _size(module) == 0:
            continue
        single = all(_size(child) == 0 for child in module.children())
        called = type(module).forward is not nn.Module.forward
        if called and not isinstance(module, PreTrainedModel) and (single or _size(module) <= largest):
            yield module
        else:
            yield from units_of(module.children(), largest)


def held(model: nn.Module) -> int:
    """The number of a model's parameters that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


_LAUNCHER = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def refuse_sharded_student(args: TrainingArguments) -> None:
    """Refuses settings, or a launcher's, under which accelerate would shard the trained model.

    Raises:
        ValueError: the message says what to use instead.
    """
    asked = [f"`{name}`" for name in ("fsdp", "deepspeed", "parallelism_config") if getattr(args, name)]
    asked += [
        f"{what} in the configuration of accelerate launch"
        for variable, what in _LAUNCHER.items()
        if os.environ.get(variable, "false").lower() == "true"
    ]
    if asked:
        raise ValueError(
            f"{' and '.join(asked)} would shard the student. Its moving average, its checkpoints and the share of the "
            "gradient need whole parameters on every process, so students are trained by DDP alone. Launch with "
            "distributed_type MULTI_GPU (scripts/recipes/accelerate/ddp.yaml); if the teacher is what is too large for a "
            "device, set `shard_teacher=True`."
        )
