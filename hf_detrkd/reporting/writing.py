"""Writing what is left of a run, also onto a disk that fills up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file to write in this context, which then takes the place of ``path``: whole or not at all, also where several processes
    write it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    part.replace(path)


def save_figure(figure: Figure, path: str | Path, dpi: int, **options: Any) -> None:
    """Writes a picture, whole or not at all; the ending of ``path`` chooses the format, PNG where there is none."""
    with whole(path) as part:
        figure.savefig(part, format=Path(path).suffix[1:] or "png", dpi=dpi, **options)


class ReportError(RuntimeError):
    """A run's files could not all be written. The message says which, what is there, and how to go on."""


class Reports:
    """The files about a model. One that can't be written stops neither the others nor the run."""

    def __init__(self):
        self.failed: dict[str, OSError] = {}
        """By name of the file, why it is missing."""

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """What is done in this context writes the file."""
        try:
            yield
        except OSError as error:
            self.failed[name] = error

    def check(self, folder: str | Path, push: str) -> None:
        """To be called once everything was tried.

        Args:
            folder: where the model is.
            push: the command that pushes it.

        Raises:
            ReportError: some file could not be written.
        """
        if self.failed:
            reasons = "\n".join(f"    {name}: {error}" for name, error in self.failed.items())
            raise ReportError(
                f"The model is trained and complete in {folder}, but these files beside it could not be written:\n{reasons}\n"
                "The metrics are in what was printed above. Make room on that disk; this pushes the model as it is:\n"
                f"    {push}"
            )


@contextmanager
def saving_weights(folder: str | Path, last_checkpoint: Callable[[], str | None]) -> Iterator[None]:
    """Training and saving happen in this context.

    Args:
        folder: where the weights go.
        last_checkpoint: gives the newest complete checkpoint.

    Raises:
        ReportError: the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        last = last_checkpoint()
        left = (
            f"The last complete checkpoint is {last}, which from_pretrained loads. Make room, and go on from it with "
            "--resume_from_checkpoint true."
            if last
            else "There is no complete checkpoint of this run yet. Make room, and start again."
        )
        raise ReportError(
            f"The disk is full ({error}), and the weights in {folder} are not complete. {left}"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error is for want of space; safetensors and torch wrap the operating system's in their own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, (SafetensorError, RuntimeError)) and "No space left on device" in str(error)
