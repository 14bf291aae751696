"""Methods beside their twins: run a grid of distillation runs, and report it.

    python scripts/compare.py --config scripts/recipes/grids/bccd.yaml --jobs 2
    python scripts/compare.py --config ... --dry_run                    what there is to do
    python scripts/compare.py --config ... --only "bccd/*/kd_detr/*"    these cells, and the twins and teachers they need
    python scripts/compare.py --config ... --summarize_only             tables and plots of what is done
    python scripts/compare.py --config ... --diagnose "*/seed0"         why these cells gain, or don't

What a grid is: hf_detrkd/commands/grid_file.py. Every cell is a run of distill.py of its own, in
runs/<grid>/<data>/<pair>/<method>/seed<k>/, with its recipe.yaml, log.txt and results.json. Start the command again after
it was stopped: what is done stays, what was begun goes on from its last checkpoint. Finished cells lose their checkpoints
and keep the model. The summary goes to docs/results: <grid>.md and .json with its pictures, and summary.json of all grids there.
What <grid>.json has recorded of runs that aren't on this machine goes on counting, as long as the settings, the teacher
and the twins that are here say that it is the same comparison: a grid can go on elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

try:
    import fcntl
except ImportError:  # Windows: nothing there keeps two harnesses from working on the same cell
    fcntl = None

from ..reporting.embed import embed_files
from ..reporting.fairness import check_fair, check_teacher
from ..reporting.gains import plot_gains, plot_progress
from ..reporting.page import gain_table, markdown
from ..reporting.summary import TWIN, overview, read_summaries, summarize
from .diagnose import diagnose_cells
from .gate import no_better
from .grid import LENGTH, TEACHER, Cell, Grid
from .grid_file import read_grid
from .grid_record import continue_record
from .grid_values import check_values
from .setup import write_json

POLL_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> dict[str, str]:
    """The command. Returns by name of the cell ``done``, or why it isn't.

    Raises:
        SystemExit: with code 1 after all is written, where cells were to be run and some aren't done.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the grid, a YAML file")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side; they share the cores")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names data/pair/method/seed0")
    parser.add_argument("--dry_run", action="store_true", help="list the cells and their state")
    parser.add_argument("--summarize_only", action="store_true", help="write the summary of what is done")
    parser.add_argument("--diagnose", metavar="PATTERN", help="measure why finished cells gain, or don't")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of the summary")
    parser.add_argument(
        "--embed", nargs="*", type=Path, default=[], metavar="FILE", help="markdown to bring up to date"
    )
    arguments = parser.parse_args(argv)
    grid = read_grid(arguments.config, arguments.runs)
    cells = grid.selected(arguments.only)
    if not (arguments.summarize_only or arguments.diagnose):
        check_values(cells)
    if arguments.dry_run:
        for cell in cells:
            print(f"{cell.state():16} {cell.name}" + "".join(f"  [{change}]" for change in cell.changes()))
        return {cell.name: cell.state() for cell in cells}
    if arguments.diagnose:
        diagnose_cells(grid, grid.selected(arguments.diagnose), arguments.output)
    if arguments.summarize_only or arguments.diagnose:
        outcomes = {cell.name: cell.state() for cell in cells}
    else:
        outcomes = Runner(grid, arguments.jobs).run(cells)
    write_summary(grid, arguments.output, outcomes)
    for path in embed_files(arguments.embed, arguments.output):
        print(f"written to {path}")
    if not (arguments.summarize_only or arguments.diagnose) and set(outcomes.values()) != {"done"}:
        raise SystemExit(1)
    return outcomes


@dataclass(frozen=True)
class Running:
    """A cell in work."""

    cell: Cell
    process: subprocess.Popen
    lock: int
    """An open file."""
    started: float
    """By the monotonic clock."""


class Runner:
    """Runs cells as processes, as many side by side as ``jobs``."""

    def __init__(self, grid: Grid, jobs: int, say=print):
        if jobs < 1:
            raise ValueError(f"`jobs` is {jobs}; it must be 1 or more.")
        self.grid, self.jobs, self.say = grid, jobs, say
        self.outcomes: dict[str, str] = {}
        self.running: dict[str, Running] = {}
        self.number = 0

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """By name of the cell ``done``, or why it isn't. A failure stops no other cell but those that need it."""
        waiting, self.number = list(cells), len(cells)
        # A terminated harness takes its runs with it; of one that was killed they go on, and the next one waits for them.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            while waiting or self.running:
                for run in [run for run in self.running.values() if run.process.poll() is not None]:
                    self._finish(run)
                waiting = [cell for cell in waiting if not self._settled(cell)]
                if self.running or waiting:
                    time.sleep(POLL_SECONDS)
        finally:
            for run in self.running.values():
                run.process.terminate()
            signal.signal(signal.SIGTERM, before)
        failed = {name: reason for name, reason in self.outcomes.items() if reason != "done"}
        self.say(f"{len(self.outcomes) - len(failed)} of {len(self.outcomes)} cells are done")
        for name, reason in failed.items():
            self.say(f"  {name}: {reason}")
        return self.outcomes

    def _settled(self, cell: Cell) -> bool:
        """Whether nothing has to be decided about a cell any more: it runs, is done, or can't be run."""
        state = cell.state()
        missing = [needed for needed in self.grid.needs(cell) if self.outcomes.get(needed.name) != "done"]
        lost = [needed.name for needed in missing if needed.name in self.outcomes]
        if state == "done":
            if len(missing) > len(lost):  # what it is compared with may be made again
                return False
            self.outcomes[cell.name] = unfairness(self.grid, cell) or "done"
            return True
        if state == "changed":
            changes = "; ".join(cell.changes())
            reason = f"its settings have changed since it was begun ({changes}): put them back, or delete {cell.folder}"
        elif lost:
            reason = f"it needs {lost[0]}"
        elif missing:
            return False
        else:
            reason = self._gate(cell)
        if reason is not None:
            self.outcomes[cell.name] = reason
            self.say(f"not run: {cell.name}: {reason}")
            return True
        return len(self.running) < self.jobs and self._start(cell)

    def _gate(self, cell: Cell) -> str | None:
        """Why a cell isn't worth its time: the teacher is no better than the twins, on the validation split."""
        if cell.method in (TEACHER, TWIN):
            return None
        if cell.time_of:
            try:
                self.grid.steps_in_time(cell)
            except ValueError as error:
                return str(error)
        teacher = self.grid.teacher_of(cell).read()["teacher"]["validation"]["map"]
        twins = [
            twin for twin in self.grid.cells if (twin.data, twin.pair, twin.method) == (cell.data, cell.pair, TWIN)
        ]
        twin = statistics.mean(twin.read()["student"]["validation"]["map"] for twin in twins if twin.state() == "done")
        return no_better(teacher, twin)

    def _start(self, cell: Cell) -> bool:
        """Starts a cell, unless another harness has it in work."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(cell.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        path, recipe = cell.folder / "recipe.yaml", dict(cell.recipe)
        if cell.time_of:
            begun = yaml.safe_load(path.read_text(encoding="utf-8")) if cell.begun else {}
            recipe["max_steps"] = begun.get("max_steps") or self.grid.steps_in_time(cell)
            (cell.folder / LENGTH).write_text(yaml.safe_dump(cell.length()), encoding="utf-8")
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
            # The run holds the lock too: it is free when nobody works on the cell, however the harness ended.
            held = [] if fcntl is None else [lock]  # Windows can't pass any
            process = subprocess.Popen(command_of(cell), stdout=log, stderr=log, env=environment, pass_fds=held)
        self.running[cell.name] = Running(cell, process, lock, time.monotonic())
        self.say(f"started {cell.name} ({cell.folder / 'log.txt'})")
        return True

    def _finish(self, run: Running) -> None:
        """Reads how a cell ended."""
        del self.running[run.cell.name]
        os.close(run.lock)
        cell, minutes = run.cell, (time.monotonic() - run.started) / 60
        if run.process.returncode != 0 or not cell.results.is_file():
            log = cell.folder / "log.txt"
            last = "".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:])
            outcome = f"failed with code {run.process.returncode}: {last} (see {log})"
        else:
            outcome = unfairness(self.grid, cell) or "done"
            for checkpoint in cell.folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        self.outcomes[cell.name] = outcome
        if outcome == "done":
            row = cell.read()["teacher" if cell.method == TEACHER else "student"]
            points = ", ".join(f"{100 * row[split]['map']:.1f} on {split}" for split in ("validation", "test"))
            outcome = f"done in {minutes:.1f} min, AP {points}"
        self.say(f"[{len(self.outcomes)}/{self.number}] {cell.name}: {outcome}")


def unfairness(grid: Grid, cell: Cell) -> str | None:
    """Why a finished run can't stand beside its twin and its teacher, in words; None where nothing speaks against it."""
    if cell.state() != "done":
        return None
    result, teacher = cell.read(), grid.teacher_of(cell)
    row = result["teacher" if cell.method == TEACHER else "student"]
    lacking = [split for split in ("validation", "test") if "map" not in row[split]]
    if lacking:
        return f"no AP on {' and '.join(lacking)}: there is no object to find. Name another split (`dataset_{lacking[0]}_split`)"
    twin = grid.cell(cell.data, cell.pair, TWIN, cell.seed)
    try:
        if cell.method != TEACHER and teacher.state() == "done":
            check_teacher(result, teacher.read(), cell.name)
        if cell.method not in (TEACHER, TWIN) and twin.state() == "done":
            check_fair(result, twin.read(), cell.name, longer=cell.time_of is not None)
    except ValueError as error:
        return str(error)
    return None


def command_of(cell: Cell) -> list[str]:
    """What is run: distill.py from the checkout in the current folder, or else from the installed package."""
    return [sys.executable, "-m", "hf_detrkd.commands.distill", "--config", str(cell.folder / "recipe.yaml")]


def write_summary(grid: Grid, output: Path, outcomes: Mapping[str, str], say=print) -> None:
    """The grid's page, numbers and pictures, and ``summary.json`` of all grids in the folder.

    Runs that aren't on this machine are taken from what ``<grid>.json`` has recorded of them (`continue_record`).

    Args:
        outcomes: by name, why cells that aren't done aren't, where that is known.
    """
    states = {cell.name: unfairness(grid, cell) or cell.state() for cell in grid.cells}
    done = [cell for cell in grid.cells if states[cell.name] == "done"]
    runs = {(c.data, c.pair, c.method, c.seed): c.read() for c in done if c.method != TEACHER}
    teachers = {(c.data, c.pair, c.seed): c.read() for c in done if c.method == TEACHER}
    file = output / f"{grid.name}.json"
    summary = summarize(grid.name, grid.split, runs, teachers, grid.time_of)
    if file.is_file():
        summary, verdicts = continue_record(grid, summary, json.loads(file.read_text(encoding="utf-8")))
        recorded = sum(verdict == "done" for verdict in verdicts.values())
        if recorded:
            say(f"{recorded} cells of {grid.name} are not here: taken from what {file} has recorded of them")
        for name, verdict in verdicts.items():
            if verdict != "done":
                say(f"{name}: {verdict}")
        states |= verdicts
        outcomes = {**outcomes, **verdicts}
    if not summary["rows"]:
        say("no method has run beside its twin yet: nothing to summarise")
        return
    write_json(summary, file)
    pictures = {f"{grid.name}_gains.png": plot_gains, f"{grid.name}_progress.png": plot_progress}
    for name, plot in pictures.items():
        plot(summary, output / name)
    names = [*pictures, f"{grid.name}_diagnostics.png"]
    unfinished = {name: outcomes.get(name, state) for name, state in states.items() if state != "done"}
    (output / f"{grid.name}.md").write_text(
        markdown(summary, [name for name in names if (output / name).is_file()], unfinished), encoding="utf-8"
    )
    write_json(overview(list(read_summaries(output).values())), output / "summary.json")
    say(f"{gain_table(summary['rows'])}\nwritten to {output / grid.name}.md and .json, with pictures beside them")


if __name__ == "__main__":
    main()
