"""Numbers in documents that come from ``docs/results``: what stands between two marks is written by a command.

<!-- results:bccd -->                                   the table of a grid
<!-- results:bccd bccd/rt_detr/* -->                    its lines that fit a pattern of data/pair/method
<!-- results:bccd bccd/rt_detr/kd_detr delta -->+3.1    one number
<!-- /results -->                                       the end of each
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .page import gain_table, number, select
from .summary import read_summaries

MARKS = re.compile(r"(<!-- results:(\S+)(?: (\S+))?(?: (\S+))? -->)(.*?)(<!-- /results -->)", re.DOTALL)


def embed(text: str, summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """The text with everything between marks as the summaries have it.

    Raises:
        ValueError: for a grid, a line or a value that the summaries don't have, and a number of more than one line.
    """

    def fresh(mark: re.Match) -> str:
        start, grid, pattern, name, _, end = mark.groups()
        if grid not in summaries:
            raise ValueError(f"{start}: there is no grid {grid!r}; there are {sorted(summaries)}.")
        rows = select(summaries[grid], pattern or "*")
        if name is None and rows:
            return f"{start}\n{gain_table(rows)}\n{end}"
        if len(rows) != 1 or name not in rows[0]:
            raise ValueError(f"{start}: {len(rows)} lines fit, of {sorted(summaries[grid]['rows'][0])}; one is needed.")
        return f"{start}{number(name, rows[0][name])}{end}"

    return MARKS.sub(fresh, text)


def embed_files(paths: list[Path], folder: str | Path) -> list[Path]:
    """Rewrites the documents from the summaries in ``folder``; returns those that changed."""
    summaries, changed = read_summaries(folder), []
    for path in paths:
        text = path.read_text()
        new = embed(text, summaries)
        if new != text:
            path.write_text(new)
            changed.append(path)
    return changed
