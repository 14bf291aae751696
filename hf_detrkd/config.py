"""The settings of a distillation run."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .sharding import refuse_sharded_student


@dataclass
class DistillationConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the settings of distillation, and defaults that suit detectors.

    Everything of `TrainingArguments` works as usual. Changed defaults: ``remove_unused_columns=False`` (labels are
    lists of dictionaries), ``batch_eval_metrics=True`` (evaluation streams), ``max_grad_norm=0.1`` (DETR, main.py),
    ``learning_rate=1e-4`` and ``weight_decay=1e-4`` (DETR, main.py), ``metric_for_best_model="eval_map"``,
    ``logging_steps=10`` (as in trl: with 500 a small data set logs nothing),
    the mixed precision that ``accelerate launch`` asks for, or else bf16 where the device has it (``bf16=False``: none).

    Raises:
        ValueError: at construction, for a setting that can't work; the message says why and what to do.
    """

    method: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "Distillation method(s); `auto`: what our runs are best with, by the kind of pair; `none` for the "
            "twin: the same run without a teacher."
        },
    )
    method_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Settings of the method as a dict or JSON; with several methods, one such dict by method name."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher checkpoint: a local folder or a Hub id."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More arguments for the teacher's `from_pretrained`, as a dict or JSON."}
    )
    detection_weight: float = field(default=1.0, metadata={"help": "Weight of the detector's own task loss."})
    kd_weight: float = field(default=1.0, metadata={"help": "Common factor of all distillation terms."})
    kd_warmup_steps: float = field(
        default=0,
        metadata={"help": "Steps of linear warm-up of the distillation terms; below 1, a share of all steps."},
    )
    kd_stop: float = field(
        default=0,
        metadata={"help": "Step after which the teacher is left out; below 1, a share of all steps; 0: never."},
    )
    kd_decay: str = field(
        default="none",
        metadata={
            "help": "Let the distillation terms fall to 0 at the end, or at `kd_stop`: none, linear (TADF, arXiv "
            "2006.13108) or cosine."
        },
    )
    kd_every: int = field(
        default=1,
        metadata={
            "help": "Teach in every so-manieth step only, with as many times the weight: 2 takes about half of the time "
            "that distillation costs."
        },
    )
    layer_supervision: bool = field(
        default=True,
        metadata={
            "help": "Task loss on every decoder layer, also where `config.auxiliary_loss` is off. "
            "Doesn't change the network."
        },
    )
    backbone_lr_factor: float = field(
        default=0.1, metadata={"help": "The backbone's learning rate as a share of the others' (DETR, main.py: 0.1)."}
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={
            "help": "Decay of the student's moving average, which is what is evaluated and saved; 0: no average. "
            "Early updates use (1 + t) / (10 + t)."
        },
    )
    gradient_share_steps: int = field(
        default=500,
        metadata={
            "help": "Measure the share of the gradient norm that distillation has in three steps after twenty (in the first steps "
            "from random weights it means nothing), and then every so many; costs one backward pass per term; 0: never."
        },
    )
    shard_teacher: bool = field(
        default=False,
        metadata={
            "help": "Every process keeps its share of the teacher's backbone and encoder, and gets the rest when it is "
            "needed. On one process: no effect."
        },
    )
    sheet_steps: int = field(
        default=0,
        metadata={
            "help": "Draw what teacher and student find in a few images of the validation split every so many steps, into "
            "`sheets/` and to the trackers of `report_to`; 0: never."
        },
    )
    sheet_images: int = field(default=8, metadata={"help": "Images on a sheet of detections; 0: no sheets."})
    compile_models: bool = field(
        default=False,
        metadata={"help": "torch.compile the backbones and encoders of student and teacher (not the decoders)."},
    )

    # Defaults of TrainingArguments that don't suit detectors.
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of all but the backbone."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay of all but biases and norms."})
    max_grad_norm: float = field(default=0.1, metadata={"help": "Gradient norm clipping, as in DETR."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps; below 1, a share of all."})
    hub_strategy: str = field(
        default="end",
        metadata={
            "help": "When to push. Others than end push checkpoints with training_args.bin, which holds the token."
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: labels are dictionaries."})
    batch_eval_metrics: bool = field(default=True, metadata={"help": "Must stay True: evaluation streams."})
    metric_for_best_model: str | None = field(
        default="eval_map", metadata={"help": "What the best checkpoint has most of."}
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "AP is better the larger it is."})
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Page-locked batches; only of use with a GPU."}
    )
    # Not `bool | None`: HfArgumentParser would then refuse a bare --bf16.
    bf16: bool = field(
        default=None,
        metadata={"help": "bf16 autocast; by default as the launcher says, or where a CUDA device has it."},
    )

    def __post_init__(self):
        refuse_sharded_student(self)
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.bf16 is None:
            self.fp16 = self.fp16 or launched == "fp16"
            able = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            self.bf16 = not self.fp16 and (launched == "bf16" or able)
        self.method = _method_names(self.method)
        self.method_config = _json_object("method_config", self.method_config)
        if self.method == ["auto"] and self.method_config is not None:
            raise ValueError(
                "`method_config` is given, but `method` is auto (the default), which chooses the settings too. Name the methods "
                "to set them."
            )
        self.teacher_model_init_kwargs = _json_object("teacher_model_init_kwargs", self.teacher_model_init_kwargs)
        super().__post_init__()
        if launched in ("bf16", "fp16") and not self.bf16 and not self.fp16:
            self.mixed_precision = "no"  # bf16=False means off, and TrainingArguments would follow the launcher
        if self.shard_teacher and self.world_size == 1:
            warnings.warn(
                "`shard_teacher` has no effect: there is one process, which needs the whole teacher.", stacklevel=3
            )
            self.shard_teacher = False
        factors, steps = ("detection_weight", "kd_weight", "backbone_lr_factor"), ("kd_warmup_steps", "kd_stop")
        for name in (*factors, *steps, "gradient_share_steps", "sheet_steps", "sheet_images"):
            value = getattr(self, name)
            if not value >= 0:  # NaN neither
                raise ValueError(f"`{name}` is {value}; it must be 0 or more.")
        if self.kd_decay not in ("none", "linear", "cosine"):
            raise ValueError(f"`kd_decay` is {self.kd_decay!r}; allowed are 'none', 'linear', 'cosine'.")
        if self.kd_every < 1:
            raise ValueError(
                f"`kd_every` is {self.kd_every}; it must be 1 (the teacher teaches in every step) or more."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; it must be in [0, 1), and 0 means no moving average.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would drop the images and labels of a detection data set. "
                "Leave it at False."
            )
        if not self.batch_eval_metrics:
            raise ValueError(
                "`batch_eval_metrics=False` would keep every output of the evaluation in memory. Leave it at True."
            )
        for kind in ("bf16", "fp16"):
            if getattr(self, f"{kind}_full_eval"):
                raise ValueError(
                    f"`{kind}_full_eval=True` would cast the student itself to {kind}: its losses fail there, and it would be saved "
                    f"so. Leave it out: `{kind}=True` evaluates in {kind} already, by autocast, and the weights stay float32."
                )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config` asks for `dispatch_batches=True`: process 0 would make the batches of all, and accelerate "
                "cuts every tensor of a batch into shares, the tensors inside the labels too, which are no batches. Leave it out: "
                "every process then makes batches of its own share."
            )
        self.accelerator_config.dispatch_batches = False  # None would mean True for an IterableDataset
        if self.torch_compile:
            raise ValueError(
                "`torch_compile=True` compiles the whole training step, which breaks into dozens of graphs at the "
                "matching. Use `compile_models=True`, which compiles backbones and encoders."
            )
        reentrant = (self.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if reentrant:
            raise ValueError(
                "`gradient_checkpointing_kwargs` asks for `use_reentrant=True`: losses on attention maps would "
                "silently lose their gradient. Use `use_reentrant=False`."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the tokens inside settings as `<TOKEN>` too: trackers write this down, and it is pushed."""
        return without_tokens(super().to_dict())

    @property
    def device(self) -> torch.device:
        """As in transformers, but never "cpu:0", for which several processes of transformers 5.17 can't resume."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def kd_scale(self, step: int, max_steps: int) -> float:
        """The factor of all distillation terms at ``step`` of ``max_steps``.

        ``kd_weight``, warmed up, 0 after the stop, and on the way there falling by ``1 - t`` (linear) or
        ``(1 + cos(pi t)) / 2`` (cosine), t the share of the steps that are done. With ``kd_every`` it is so many times that in
        every so-manieth step, and 0 in the others.
        """
        if step % self.kd_every:
            return 0.0
        warmup, stop = (steps * max_steps if 0 < steps < 1 else steps for steps in (self.kd_warmup_steps, self.kd_stop))
        if stop and step >= stop:
            return 0.0
        done = step / (stop or max_steps)
        decay = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.kd_decay]
        return self.kd_every * self.kd_weight * decay * (min(1.0, (step + 1) / warmup) if warmup else 1.0)


def without_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and those inside of them, with `<TOKEN>` for a token: what may be published."""
    return {
        name: without_tokens(value)
        if isinstance(value, Mapping)
        else f"<{name.upper()}>"
        if str(name).split("_")[-1] == "token" and isinstance(value, str)
        else value
        for name, value in values.items()
    }


def _method_names(method: str | list[str]) -> list[str]:
    """``"a"``, ``"a,b"`` and ``["a", "b"]`` as a list of names."""
    names = method.split(",") if isinstance(method, str) else [part for item in method for part in item.split(",")]
    names = [name.strip() for name in names]
    if not names or "" in names:
        raise ValueError(f"`method` is {method!r}; name a method, or `none` for no distillation.")
    if "none" in names and len(names) > 1:
        raise ValueError(f"`method` is {names}: `none` means no distillation and can't be combined.")
    if "auto" in names and len(names) > 1:
        raise ValueError(f"`method` is {names}: `auto` chooses all methods of a run and can't be combined.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"`method` names {', '.join(repeated)} more than once.")
    return names


def _json_object(name: str, value: dict | str | None) -> dict | None:
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is not JSON ({error}): {value}") from error
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError(f'`{name}` must be a dict or a JSON object such as {{"temperature": 2}}, got: {value}')
    return parsed
