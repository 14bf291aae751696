"""What a run's ``results.json`` says, for the card and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .table import COLUMNS

MADE = tuple(
    f"student_{name}"
    for name in ("backbone", "backbone_weights", "d_model", "encoder_layers", "decoder_layers", "num_queries")
)
"""The settings by which a student is made from its teacher."""

# Row of the settings table: where it comes from. Those that a run doesn't have are left out.
SETTINGS = {
    "DistillationConfig": (
        *("num_train_epochs", "max_steps", "learning_rate", "backbone_lr_factor", "lr_scheduler_type", "warmup_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "optim", "weight_decay", "max_grad_norm"),
        *(
            "bf16",
            "fp16",
            "ema_decay",
            "detection_weight",
            "kd_weight",
            "kd_warmup_steps",
            "kd_stop",
            "kd_decay",
            "kd_every",
        ),
        *("layer_supervision", "seed"),
    ),
    "ModelArguments": ("image_size", "do_normalize"),
    "DistillArguments": ("inherit_from_teacher", *MADE),
}


def student_row(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of the model the card is for; `finetune` calls it ``model``."""
    return results["student"] if results.get("student") else results["model"]


def part_measured(results: Mapping[str, Any]) -> str:
    """The part whose metrics the card shows: ``test`` where that was measured, which needs labels, else ``validation``."""
    return "test" if "map" in (student_row(results).get("test") or {}) else "validation"


def measured(results: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, Mapping[str, float]]:
    """The split whose metrics the card shows, and those of one row."""
    part = part_measured(results)
    split = results.get("data", {}).get("test_split", "test") if part == "test" else part
    metrics = row.get(part) or {}
    return split, metrics if "map" in metrics else {}


def class_names(metrics: Mapping[str, float]) -> list[str]:
    """The classes, in their order in the metrics."""
    summary = {key.removeprefix("map_") for key in COLUMNS.values()}  # a class "small" has no AP of its own there
    names = [key.removeprefix("mar_100_") for key in metrics if key.startswith("mar_100_")]
    return [name for name in names if name not in summary]


def dataset_of(results: Mapping[str, Any]) -> tuple[str, str | None]:
    """A data set's name, and its id where it is on the Hub."""
    name = setting(results, "DataArguments", "dataset_name") or "the evaluation data"
    if results.get("dataset_on_hub"):
        return name, name
    if name.partition(":")[0] == "shapes":  # which has its settings behind
        return "shapes", None
    return name.replace("\\", "/").rstrip("/").split("/")[-1], None


def hub_id(place: Mapping[str, Any] | None) -> str | None:
    """A model's id where it came from the Hub, which is where it has a revision."""
    return place["name_or_path"] if place and place.get("revision") else None


def setting(results: Mapping[str, Any], group: str, name: str) -> Any:
    """A flag of the run; None where it has none of that name."""
    groups = results.get("settings", {})
    if group == "DistillationConfig" and "FinetuneConfig" in groups:
        group = "FinetuneConfig"
    return groups.get(group, {}).get(name)


def settings_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Name and value of the `SETTINGS` that a run has, and of its augmentation."""
    rows = []
    steps = setting(results, "DistillationConfig", "max_steps") or -1
    without_effect = "max_steps" if steps < 0 else "num_train_epochs"
    for group, names in SETTINGS.items():
        for name in names:
            value = setting(results, group, name)
            if value is not None and value is not False and name != without_effect:
                rows.append([name, f"{value:g}" if isinstance(value, float) else str(value)])
    augmentation = results.get("data", {}).get("augmentation") or {}
    return [
        *rows,
        *([f"augmentation: {name}", str(value)] for name, value in augmentation.items() if value is not None),
    ]
