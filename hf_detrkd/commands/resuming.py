"""From which checkpoint a run goes on, and with which settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..reporting.fairness import HARMLESS, flat
from ..reporting.run import STATE, checkpoints, results_file


def checkpoint_to_resume(wish: str | None, output: Path) -> str | None:
    """The checkpoint to go on from.

    ``"true"`` means the last complete one in the output folder, if there is one; a path means that one.

    Raises:
        ValueError: the output folder has checkpoints of an earlier run and nothing was said about them, or a finished run
            without checkpoints that was not to be overwritten.
    """
    last, said = last_complete_checkpoint(output), str(wish).lower()
    if said == "false":
        return None
    if wish is not None and said != "true":
        return str(wish)
    if last is not None and wish is None:
        raise ValueError(
            f"{output} has checkpoints of an earlier run (the last is {last}). Pass --resume_from_checkpoint true to "
            "go on from it, or choose another --output_dir."
        )
    if last is None and has_finished(output):
        raise ValueError(
            f"{output} has a finished run and no checkpoint to go on from. Choose another --output_dir, or pass "
            "--resume_from_checkpoint false to train anew in its place."
        )
    return last


def has_finished(output: Path) -> bool:
    """Whether a training ended in this folder, and none was begun in it since."""
    file = results_file(output)
    if file is None or file.name != "results.json":
        return False
    results = json.loads(file.read_text(encoding="utf-8"))
    return bool(results.get("student") or results.get("model"))


def same_settings(checkpoint: str | None, now: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses to go on with other settings than those the run was begun with, as far as its folder says what these were.

    Args:
        checkpoint: to go on from; None: the run begins anew.
        now: the flags of this call by group, as for ``results.json``.

    Raises:
        ValueError: naming the settings that differ, with both values.
    """
    file = None if checkpoint is None else results_file(Path(checkpoint).parent)
    if file is None:
        return
    begun = json.loads(file.read_text(encoding="utf-8")).get("settings", {})
    now = json.loads(json.dumps(now, default=str))  # as it would be written
    different = {
        name: f"{name} {was!r} -> {will!r}"
        for group, inside in now.items()
        for setting in inside.keys() & begun.get(group, {}).keys()  # another version may have more
        for name, was, will in _compared(setting, begun[group][setting], inside[setting])
        if was != will and HARMLESS.isdisjoint(name.split("."))
    }
    if different:
        raise ValueError(
            f"{Path(checkpoint).parent} was begun with other settings: {'; '.join(map(different.get, sorted(different)))}. "
            f"Pass those of the first run, or choose another --output_dir for a new one; to go on with the new ones all the same, "
            f"remove {file}."
        )


def _compared(setting: str, was: Any, will: Any) -> Iterator[tuple[str, Any, Any]]:
    """A setting's values, or those inside of it, by name: as they were, and as they will be."""
    one, other = flat({setting: was}), flat({setting: will})
    # What transformers fills in (`accelerator_config`) may have more in another version; these are as the user wrote them
    written = setting == "method_config" or setting.endswith("_kwargs")
    for name in sorted(one.keys() | other.keys() if written else one.keys() & other.keys()):
        yield name, one.get(name), other.get(name)


def found_by_all(checkpoint: str | None) -> str | None:
    """The checkpoint, if every process has found one of the same step.

    Raises:
        ValueError: machines that share no disk would go on from different steps.
    """
    found = gather_object([checkpoint])
    if len({path and Path(path).name for path in found}) > 1:
        raise ValueError(
            f"The processes have found different checkpoints to resume from: {', '.join(map(str, found))}. Put --output_dir "
            "on a disk that all machines share, or let each machine write its own (--save_on_each_node true)."
        )
    return checkpoint


def last_complete_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes ``trainer_state.json`` last."""
    complete = [folder for folder in checkpoints(output) if (folder / STATE).is_file()]
    return str(complete[-1]) if complete else None
