"""From which checkpoint a run goes on."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import gather_object


def checkpoint_to_resume(wish: str | None, output: Path) -> str | None:
    """The checkpoint to go on from.

    ``"true"`` means the last complete one in the output folder, if there is one; a path means that one.

    Raises:
        ValueError: the output folder has checkpoints of an earlier run and nothing was said about them.
    """
    last = last_complete_checkpoint(output)
    if wish is None or str(wish).lower() == "false":
        if last is not None and wish is None:
            raise ValueError(
                f"{output} has checkpoints of an earlier run (the last is {last}). Pass --resume_from_checkpoint true to "
                "go on from it, or choose another --output_dir."
            )
        return None
    return last if str(wish).lower() == "true" else str(wish)


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
    complete = [folder.parent for folder in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda folder: int(folder.name.split("-")[-1]))) if complete else None
