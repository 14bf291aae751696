"""Whether `distill.py` would take the values that a grid gives it, asked before any of the cells runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr

from ..methods import method_configs
from .arguments import parse
from .distill import ARGUMENTS
from .grid import Cell


def check_values(cells: Sequence[Cell]) -> None:
    """Reads the flags of the cells as their runs will, one seed for all: a mistake in one would show after hours of others.

    Raises:
        ValueError: naming the cell, with what is wrong with its flags or with the settings of its method.
    """
    for cell in {(cell.data, cell.pair, cell.method): cell for cell in cells}.values():
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                *_, args = parse(ARGUMENTS, [], defaults=cell.recipe)
            if args.method not in (["none"], ["auto"]):
                method_configs(args.method, args.method_config)
        except SystemExit:  # argparse has written its message after the usage
            raise ValueError(f"{cell.name}: {said.getvalue().strip().rpartition(' error: ')[2]}") from None
        except ValueError as error:
            raise ValueError(f"{cell.name}: {error}") from error
