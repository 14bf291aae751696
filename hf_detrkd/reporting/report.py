"""A run as one page: ``report.html``, which needs nothing else and no network.

    python -m hf_detrkd.reporting.report runs/student

writes it anew from what is in the folder, also while the run goes on. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from ..methods import METHODS
from ..publishing import upload_command
from .recorded import class_names, dataset_of, measured, setting, settings_rows
from .report_charts import curves, schedule, terms
from .run import TWIN, Run, read_run
from .table import COLUMNS, comparison_rows, difference, points
from .writing import whole

NAME = "report.html"
TEMPLATE = "report_template.html"
REFRESH = 30
"""Seconds after which the page of an unfinished run is read again."""
WHICH_DATA = {
    "dataset_name": None,
    "dataset_config_name": None,
    "dataset_format": "auto",
    "bbox_format": None,
    "classes": None,
    "dataset_train_split": "train",
    "dataset_validation_split": "validation",
    "dataset_test_split": "test",
    "train_val_split": 0.15,
    "max_eval_samples": None,
}
"""The flags that say which images a model was measured on, and what they are where they are not given."""
SHEETS = 4
"""Of the sheets drawn during training so many are shown, the last among them; while a run goes on only that one."""
SHEET_WIDTH = 1600
WEBP = {"quality": 80, "method": 0}
"""A sheet of 8 images has some 800 kB; the other methods save a tenth and take up to six times as long."""


def write_report(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, whole or not at all, and return its path.

    Args:
        folder: of the run.
        output: file to write; by default ``report.html`` in the folder.

    Raises:
        ValueError: the folder is not that of a run.
    """
    run = read_run(folder)
    output = run.folder / NAME if output is None else Path(output)
    with whole(output) as part:
        part.write_text(page(run), encoding="utf-8")
    return output


def page(run: Run) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    row = run.results[run.role]
    rows = {role: run.results[role] for role in ("teacher", TWIN, run.role) if role in run.results}
    split, _ = measured(run.results, row)
    shown = {role: metrics for role, its in rows.items() if (metrics := measured(run.results, its)[1])}
    return environment.get_template(TEMPLATE).render(
        run=run,
        row=row,
        rows=rows,
        name=run.folder.absolute().name,
        method=" + ".join(run.methods),
        dataset=dataset_of(run.results)[0],
        split=split,
        images=run.results.get("data", {}).get("images") or {},
        status=status(run),
        refresh=None if run.finished else REFRESH,
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
        figures=figures(run, shown),
        columns=list(COLUMNS),
        comparison=comparison_rows(shown),
        **detail_tables(run, shown),
        curves=curves(run),
        terms=terms(run),
        schedule=schedule(run),
        sheets=sheets(run),
        commands=commands(run),
        papers=[METHODS[method].paper for method in run.methods if method in METHODS and METHODS[method].paper],
        settings=settings_rows(run.results),
        all_settings=json.dumps(run.results.get("settings", {}), indent=2, sort_keys=True),
        labels=run.results.get("label_map"),
        costs=costs(rows),
        versions=run.results.get("versions", {}),
        points=points,
    )


# -- what is said ------------------------------------------------------------------------------------------------------


def status(run: Run) -> str:
    """Where the run is, in a line."""
    if run.finished:
        row = run.results[run.role]
        seconds = (
            "" if row.get("resumed_from") or not row.get("train_seconds") else f" in {duration(row['train_seconds'])}"
        )
        return f"Finished: {row.get('steps', 0)} steps{seconds}."
    state = run.states.get(run.training)
    if state is None:
        return f"In training: the {run.training}, before its first evaluation."
    step, steps = state["global_step"], state["max_steps"]
    seconds = next((log["seconds"] for log in reversed(state["log_history"]) if "seconds" in log), None)
    left = f", about {duration(seconds / step * (steps - step))} left" if seconds and step < steps else ""
    return f"In training: the {run.training}, at its evaluation after step {step} of {steps}{left}."


def duration(seconds: float) -> str:
    """Seconds as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def figures(run: Run, shown: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """The few numbers one looks for first, with what they are."""
    if run.role not in shown:
        return []
    ap, twin, teacher = (shown.get(role, {}).get("map") for role in (run.role, TWIN, "teacher"))
    parts = [(points(ap), f"AP of the {run.role}")]
    if twin is not None:
        parts.append((difference(ap, twin), "over its twin"))
        if teacher is not None and teacher > twin and ap > twin:
            parts.append((f"{100 * (ap - twin) / (teacher - twin):.0f} %", "of the gap to the teacher closed"))
    if teacher is not None and "teacher" in run.results:
        sizes = run.results["teacher"].get("parameters"), run.results[run.role].get("parameters")
        if all(sizes):
            parts.append((f"{100 * sizes[1] / sizes[0]:.0f} %", "of the teacher's parameters"))
    return parts


def detail_tables(run: Run, shown: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """AP by size and by class, of every model, and what the student gains over its twin."""
    sizes = {"small (up to 32² pixels)": "map_small", "medium (up to 96²)": "map_medium", "large": "map_large"}
    classes = {name: f"map_{name}" for name in class_names(shown.get(run.role) or next(iter(shown.values()), {}))}

    def table(keys: Mapping[str, str]) -> list[list[str]]:
        rows = []
        for name, key in keys.items():
            values = [metrics.get(key) for metrics in shown.values()]
            if any(value is not None for value in values):
                gain = [difference(shown[run.role].get(key), shown[TWIN].get(key))] if _gains(run, shown) else []
                rows.append([name, *map(points, values), *gain])
        return rows

    titles = [*shown, *(["gain"] if _gains(run, shown) else [])]
    return {"titles": titles, "by_size": table(sizes), "by_class": table(classes)}


def _gains(run: Run, shown: Mapping[str, Any]) -> bool:
    return run.role in shown and TWIN in shown


def costs(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A quantity, and a cell per model: what it costs to have and to train."""
    quantities = {
        "parameters (M)": ("parameters", lambda value: f"{value / 1e6:.2f}"),
        "FLOPs (G)": ("flops", lambda value: f"{value / 1e9:.2f}"),
        "latency (ms)": ("latency_ms", lambda value: f"{value:.1f}"),
        "training time": ("train_seconds", duration),
        "step (s)": ("step_seconds", lambda value: f"{value:.3g}"),
        "peak memory (MiB)": ("peak_memory_MiB", lambda value: f"{value:.0f}"),
    }

    def known(row: Mapping[str, Any], key: str) -> Any:
        # The time of a run that was resumed is that of its last session
        return None if key == "train_seconds" and row.get("resumed_from") else row.get(key)

    lines = [
        [title, *("-" if (value := known(row, key)) is None else text(value) for row in rows.values())]
        for title, (key, text) in quantities.items()
    ]
    return [line for line in lines if set(line[1:]) != {"-"}]


def commands(run: Run) -> list[tuple[str, str]]:
    """What one does next: a title, and the command."""
    folder = run.folder.as_posix()
    if not run.finished:
        script = "finetune" if run.role == "model" else "distill"
        return [
            ("Read this page's data again", shlex.join(["python", "-m", "hf_detrkd.reporting.report", folder])),
            ("Go on, where it was stopped", f"hf-detrkd {script} ... --resume_from_checkpoint true"),
        ]
    model = ["--model_name_or_path", folder]
    dataset = data_flags(run)
    words = {
        "Detect in your images": ["predict", *model, "--input", "images/", "--output_dir", f"{folder}/predictions"],
        "Measure it again": ["evaluate", *model, *dataset, "--split", "test"],
        "Export it to ONNX, and check that": ["export", *model, "--output_dir", f"{folder}/onnx", *dataset],
    }
    repository = setting(run.results, "DistillationConfig", "hub_model_id") or f"USER/{run.folder.absolute().name}"
    return [
        *((title, shlex.join(["hf-detrkd", *its])) for title, its in words.items()),
        ("Publish it", upload_command(folder, repository)),
    ]


def data_flags(run: Run) -> list[str]:
    """The words that have a command measure on the images that the run did."""
    words = []
    for name, default in WHICH_DATA.items():
        value = setting(run.results, "DataArguments", name)
        if value is not None and value != default:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


# -- what is drawn -----------------------------------------------------------------------------------------------------


def sheets(run: Run) -> list[tuple[str, str]]:
    """Sheets of detections, the newest first: a caption, and the picture as a data URI."""
    names = {file.stem.removeprefix("step_"): file for file in run.folder.glob("sheets/step_*.png")}
    drawn = sorted(int(step) for step in names if step.isdecimal())  # others are somebody's own
    number = SHEETS if run.finished else 1
    chosen = dict.fromkeys(drawn[round(index)] for index in np.linspace(len(drawn) - 1, 0, number)) if drawn else ()
    files = [(f"Step {step}, validation split", names[str(step)]) for step in chosen]
    last = run.folder / "sheet.png"
    if run.finished and last.is_file():
        files.insert(0, (f"At the end, {run.results.get('data', {}).get('test_split', 'test')} split", last))
    pictures = []
    for caption, file in files:
        with suppress(OSError, SyntaxError):  # one that isn't whole; PIL raises SyntaxError for a broken PNG
            pictures.append((caption, data_uri(file)))
    return pictures


def data_uri(file: Path) -> Markup:
    """A picture as a page can hold it."""
    with Image.open(file) as picture:
        picture = picture.convert("RGB")
        if picture.width > SHEET_WIDTH:
            picture = picture.resize((SHEET_WIDTH, round(picture.height * SHEET_WIDTH / picture.width)))
        encoded = io.BytesIO()
        picture.save(encoded, "WEBP", **WEBP)
    return Markup(f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}")


def main(argv: Sequence[str] | None = None) -> Path:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, finished or not")
    parser.add_argument("--output", help=f"file to write; default: {NAME} in the folder")
    arguments = parser.parse_args(argv)
    path = write_report(arguments.run, arguments.output)
    print(path)
    return path


if __name__ == "__main__":
    main()
