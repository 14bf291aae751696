"""Whether a distilled run and its twin differ in the method alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DistillationConfig

METHOD_DEFAULTS = {
    name: getattr(DistillationConfig, name)
    for name in ("method_config", "kd_weight", "kd_warmup_steps", "kd_stop", "kd_decay", "kd_every")
}
"""What a run had of these where its record doesn't name them: runs of earlier versions lack what came since."""
METHOD_FIELDS = frozenset({"method", *METHOD_DEFAULTS})
"""All in which a distilled run may differ from its twin."""
HARMLESS = frozenset(
    {
        "cache_dir",
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "disable_tqdm",
        "dispatch_batches",  # of `accelerator_config`; earlier versions left it at None, which is False for data with a length
        "evaluate_teacher",
        "gradient_share_steps",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "license",
        "local_rank",
        "logging_steps",
        "output_dir",
        "push_to_hub",
        "report_to",
        "resume_from_checkpoint",
        "run_name",
        "save_total_limit",
        "sheet_images",
        "sheet_steps",
        "token",
        "with_twin",
    }
)
"""Settings that change no number of a result: runs may differ in them, and a run may go on with others."""
TRAINING_LENGTH = frozenset({"settings.DistillationConfig.max_steps", "student.steps"})


def check_fair(result: Mapping[str, Any], twin: Mapping[str, Any], name: str, *, longer: bool = False) -> None:
    """Compares what two runs recorded in their ``results.json``.

    Settings, number of images, augmentation, the initial weights, the steps, the teacher and the versions must agree;
    the fields of a method, and what changes no result, may differ.

    Args:
        name: of the run, for the message.
        longer: the run is a twin that was trained for longer; its steps differ, and are no fewer.

    Raises:
        ValueError: naming the fields that differ, with their values.
    """
    steps, least = (run["student"]["steps"] for run in (result, twin))
    if longer and steps < least:
        raise ValueError(
            f"{name} was trained for {steps} steps and its twin for {least}: it is to be a longer one. Delete its folder and run "
            "it again."
        )
    ours, theirs = (flat(_compared(run)) for run in (result, twin))
    may_differ = TRAINING_LENGTH if longer else frozenset()
    different = [
        f"{field} ({ours.get(field)!r}, the twin {theirs.get(field)!r})"
        for field in differing(ours, theirs)
        if field not in may_differ and field.rpartition(".")[2] not in HARMLESS
    ]
    if different:
        raise ValueError(
            f"{name} and its twin differ in more than the method: {', '.join(different)}. Their comparison would say "
            "nothing about the method: delete the folder of the one that is not as the grid says, and run it again."
        )


def check_teacher(result: Mapping[str, Any], measured: Mapping[str, Any], name: str) -> None:
    """Compares the teacher that a run had with the one whose metrics stand beside it, where both recorded a digest.

    Args:
        measured: the ``results.json`` of the teacher's measurement.
        name: of the run, for the message.

    Raises:
        ValueError: they are two.
    """
    had, has = ((one["teacher"] or {}).get("digest") for one in (result, measured))
    if had and has and had != has:
        raise ValueError(
            f"{name} had another teacher (its weights' digest is {had}) than the one that was measured ({has}): the one in "
            "its folder has changed. Delete the folder of the run or of the measurement, whichever had the wrong one, and "
            "run it again."
        )


def _compared(result: Mapping[str, Any]) -> dict[str, Any]:
    student = {name: result["student"][name] for name in ("initial_digest", "steps", "parameters")}
    settings = {
        group: {name: value for name, value in values.items() if name not in METHOD_FIELDS | HARMLESS}
        for group, values in result["settings"].items()
    }
    versions = {name: value for name, value in result["versions"].items() if name != "machine"}
    teacher = (result["teacher"] or {}).get("digest")
    return {"settings": settings, "student": student, "data": result["data"], "teacher": teacher, "versions": versions}


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, or of which one has none."""
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings in mappings as one, with names such as "settings.DistillationConfig.seed"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
