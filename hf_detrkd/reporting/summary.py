"""A grid's runs as numbers: every method beside its twin, with intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from .fairness import METHOD_DEFAULTS

Result = Mapping[str, Any]
"""What a run wrote to its ``results.json``."""

TWIN = "none"
ROW = (
    *(
        "dataset",
        "family",
        "pair",
        "method",
        "seeds",
        "teacher_map",
        "twin_map",
        "map",
        "delta",
        "delta_low",
        "delta_high",
    ),
    *("steps", "time_ratio"),
)
"""What ``summary.json`` says of a method: AP in points of 100, as means over the seeds that have both runs; the interval of
`interval`; the seconds of a training step as a multiple of the twin's."""


def interval(deltas: Sequence[float], confidence: float = 0.95) -> tuple[float | None, float | None]:
    """Student's t-interval of the mean of paired differences, one per seed; (None, None) for a single one.

    It takes the differences as normally distributed. With 3 seeds it is wide (the factor of the standard error is 4.3):
    that is what 3 seeds tell.
    """
    if len(deltas) < 2:
        return None, None
    reach = t.ppf((1 + confidence) / 2, len(deltas) - 1) * statistics.stdev(deltas) / math.sqrt(len(deltas))
    return statistics.mean(deltas) - reach, statistics.mean(deltas) + reach


def summarize(
    grid: str,
    split: str,
    runs: Mapping[tuple[str, str, str, int], Result],
    teachers: Mapping[tuple[str, str, int | None], Result],
    time_of: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All that is reported of a grid.

    Args:
        grid: its name.
        split: what the runs call ``test``: the test split, or the validation split in grids that choose settings.
        runs: by (data, pair, method, seed); those that are done.
        teachers: by (data, pair, seed), with None for the seed where all seeds have the same.
        time_of: as in `gain_rows`.

    Returns:
        ``rows`` of `gain_rows`; ``pairs`` (`pair_name`) and ``runs`` with what they are made of, a run with
        ``twin_step_seconds`` of its twin.
    """
    pairs = {pair_name(*key): _pair(teacher) for key, teacher in teachers.items()}
    recorded = {"{}/{}/{}/seed{}".format(*key): _run(result) for key, result in runs.items()}
    for name, run in recorded.items():
        pair, method, seed = name.rsplit("/", 2)
        if method != TWIN:  # the same twin may later be timed elsewhere, on a slower machine
            run["twin_step_seconds"] = recorded.get(f"{pair}/{TWIN}/{seed}", {}).get("step_seconds")
    return {"grid": grid, "split": split, "rows": gain_rows(recorded, pairs, time_of), "pairs": pairs, "runs": recorded}


def gain_rows(
    runs: Mapping[str, Mapping], pairs: Mapping[str, Mapping], time_of: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Every method beside its twin, from what `summarize` recorded of the runs.

    Args:
        runs: by "data/pair/method/seed0".
        pairs: by `pair_name`.
        time_of: by name of a longer twin, the method whose time it has.

    Returns:
        `ROW` and, for each, ``delta_min``, ``delta_max`` and ``deltas`` over the seeds, ``delta_validation`` (the mean gain on
        the validation split), ``gap_closed`` (% of teacher - twin), ``metrics`` (means), ``gains`` (means, for every metric,
        size and class), ``kd_share`` (of the gradient norm), ``peak_memory_MiB``; where the pair has a longer twin,
        ``delta_longer`` with its interval and seeds: the same beside the one that has the method's time, or else the first.
    """
    cells: dict[tuple[str, str], dict[int, Mapping]] = {}
    for name, run in runs.items():
        pair, method, seed = name.rsplit("/", 2)
        cells.setdefault((pair, method), {})[int(seed.removeprefix("seed"))] = run
    rows = []
    for (pair, method), students in cells.items():
        twins = cells.get((pair, TWIN), {})
        teachers = {seed: pair_of(pairs, pair, seed) for seed in students}
        both = {seed: (student, twins[seed]) for seed, student in students.items() if seed in twins and teachers[seed]}
        if method != TWIN and both:
            taught = statistics.mean(teachers[seed]["teacher"]["metrics"]["map"] for seed in both)
            longer = _longer_twin(cells, pair, method, time_of or {})
            rows.append(_row(pair, method, both, taught) | _over_longer_twin(students, longer))
    return rows


def _longer_twin(
    cells: Mapping[tuple[str, str], Mapping[int, Mapping]], pair: str, method: str, time_of: Mapping[str, str]
) -> Mapping[int, Mapping]:
    """By seed, the runs of a pair that had no teacher either and aren't the twins: those with the time of the method, or else the
    first; empty where there are none, and of a longer twin itself."""
    longer = {
        name: runs
        for (of, name), runs in cells.items()
        if of == pair and name != TWIN and all(run["method"] == TWIN for run in runs.values())
    }
    if method in longer:
        return {}
    own = (runs for name, runs in longer.items() if time_of.get(name) == method)
    return next(own, next(iter(longer.values()), {}))


def _over_longer_twin(students: Mapping[int, Mapping], longer: Mapping[int, Mapping]) -> dict[str, Any]:
    seeds = [seed for seed in students if seed in longer]
    if not seeds:
        return {}
    deltas = [100 * (students[seed]["test"]["map"] - longer[seed]["test"]["map"]) for seed in seeds]
    low, high = interval(deltas)
    ends = {"delta_longer_low": low, "delta_longer_high": high}
    return _rounded({"delta_longer": statistics.mean(deltas), **ends, "delta_longer_seeds": seeds})


def pair_name(data: str, pair: str, seed: int | None) -> str:
    """data/pair, and data/pair/seed0 where every seed has a teacher (or a start) of its own."""
    return f"{data}/{pair}" if seed is None else f"{data}/{pair}/seed{seed}"


def pair_of(pairs: Mapping[str, Mapping], pair: str, seed: int) -> Mapping | None:
    """What is recorded of the teacher of "data/pair" and a seed."""
    return pairs.get(f"{pair}/seed{seed}") or pairs.get(pair)


def _row(name: str, method: str, both: Mapping[int, tuple[Mapping, Mapping]], teacher_map: float) -> dict[str, Any]:
    data, pair = name.split("/")
    students, twins = zip(*both.values(), strict=True)
    names = [name for name in students[0]["test"] if all(name in row["test"] for row in (*students, *twins))]
    metrics, base = (
        {name: 100 * statistics.mean(row["test"][name] for row in rows) for name in names} for rows in (students, twins)
    )
    deltas, on_validation = (
        [100 * (a[split]["map"] - b[split]["map"]) for a, b in both.values()] for split in ("test", "validation")
    )
    low, high = interval(deltas)
    gap = teacher_map - base["map"]
    peaks = [row["peak_memory_MiB"] for row in students if row["peak_memory_MiB"] is not None]
    shares = [row["gradient_shares"]["kd"] for row in students if "kd" in row["gradient_shares"]]
    return _rounded(
        {
            "dataset": data,
            "family": students[0]["model_type"],
            "pair": pair,
            "method": method,
            "seeds": list(both),
            "teacher_map": teacher_map,
            "twin_map": base["map"],
            "map": metrics["map"],
            "delta": statistics.mean(deltas),
            "delta_low": low,
            "delta_high": high,
            "steps": round(statistics.mean(row["steps"] for row in students)),
            "time_ratio": time_ratio(students, twins),
            "delta_min": min(deltas),
            "delta_max": max(deltas),
            "deltas": deltas,
            "delta_validation": statistics.mean(on_validation),
            "gap_closed": 100 * statistics.mean(deltas) / gap if gap > 0 else None,
            "metrics": metrics,
            "twin_metrics": base,
            "gains": {name: metrics[name] - base[name] for name in names},
            "kd_share": 100 * statistics.mean(shares) if shares else None,
            "peak_memory_MiB": statistics.mean(peaks) if peaks else None,
        }
    )


def time_ratio(students: Sequence[Mapping], twins: Sequence[Mapping]) -> float | None:
    """How many times as long a training step of the student takes, as the mean over the seeds.

    A longer twin's steps are no longer than the twin's, so what counts for it is all of its steps.
    """
    ratios = [(step_ratio(a), a["steps"] / b["steps"]) for a, b in zip(students, twins, strict=True)]
    known = [ratio * steps for ratio, steps in ratios if ratio is not None]
    return statistics.mean(known) if known else None


def step_ratio(run: Mapping) -> float | None:
    """A step's time as a multiple of the twin's on the same machine; None where one of the two isn't known."""
    seconds, twin = run["step_seconds"], run["twin_step_seconds"]
    return seconds / twin if seconds and twin else None


def _pair(teacher: Result) -> dict[str, Any]:
    metrics = {name: 100 * value for name, value in teacher["teacher"]["test"].items()}
    return {
        "teacher": {
            "name_or_path": teacher["teacher"]["name_or_path"],
            "parameters": teacher["teacher"]["parameters"],
            "metrics": _rounded(metrics),
        },
        "data": teacher["data"],
        "settings": teacher["settings"],
        "versions": teacher["versions"],
    }


def _run(result: Result) -> dict[str, Any]:
    student = {name: value for name, value in result["student"].items() if name not in ("validation", "test")}
    config = result["settings"]["DistillationConfig"]
    metrics = {split: _metrics(result["student"][split]) for split in ("validation", "test")}
    method = {name: config.get(name, default) for name, default in sorted(METHOD_DEFAULTS.items())}
    return {**student, **method, **metrics, "machine": result["versions"]["machine"]}


def _metrics(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(("map", "mar"))}


def _rounded(value: Any) -> Any:
    """Numbers to two decimals, at any depth."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):  # also numpy's, which rounds in its own way and would on the page round 1.85 down
        return round(float(value), 2) + 0.0  # no -0.0
    return value


def overview(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``summary.json``: `ROW` of all grids that report the test split."""
    rows = [row for summary in summaries if summary["split"] == "test" for row in summary["rows"]]
    return sorted(
        ({name: row[name] for name in ROW} for row in rows),
        key=lambda row: [row[name] for name in ("dataset", "pair", "method")],
    )


def read_summaries(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The summaries of grids in a folder, by name."""
    contents = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json")))
    return {content["grid"]: content for content in contents if isinstance(content, dict) and "grid" in content}
