"""Runs of one recipe over several seeds as a table: mean, spread and gain over the twin.

python scripts/summarize.py runs/bccd/seed*/results.json --output docs/results/bccd_kd_detr
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reporting.fairness import HARMLESS, differing, flat
from ..reporting.table import text_table
from .setup import write_json

METRICS = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Prints the table; with ``--output`` writes it as .md and the numbers as .json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="results.json of runs with --with_twin, one per seed")
    parser.add_argument("--output", help="file name without suffix")
    arguments = parser.parse_args(argv)
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in arguments.results]
    check_alike(dict(zip(arguments.results, runs, strict=True)))
    summary = summarize(runs)
    table = text_table(["AP in points", *METRICS], rows(summary), markdown=True)
    print(table)
    if arguments.output:
        write_json(summary, f"{arguments.output}.json")
        ratio = summary["time_ratio"]
        time = "" if ratio is None else f" The distilled run took {ratio:.2f} times as long as its twin."
        seeds = ", ".join(map(str, summary["seeds"]))
        Path(f"{arguments.output}.md").write_text(
            f"Method {summary['method']}, seeds {seeds}, {summary['steps']} steps, {summary['dataset']}, {summary['split']} split; "
            "mean ± standard deviation over the seeds, and the gain as the mean of the differences with its smallest and "
            f"largest.\n\n{table}\n\nStudent: {summary['student_parameters'] / 1e6:.2f} M parameters, teacher: "
            f"{summary['teacher_parameters'] / 1e6:.2f} M.{time}\n",
            encoding="utf-8",
        )
    return summary


def check_alike(runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether runs are those of one recipe with several seeds.

    Args:
        runs: what ``results.json`` says, by its path.

    Raises:
        ValueError: naming the path, and in what it is another run than the first.
    """
    first, *others = runs
    lacking = [
        path for path, run in runs.items() if not (run.get("student") and run.get("twin") and run.get("teacher"))
    ]
    if lacking:
        raise ValueError(f"{lacking} have no student, no twin or no teacher: run distill.py with --with_twin true.")
    for path in others:
        ours, theirs = (_of_all_seeds(runs[one]) for one in (first, path))
        different = [f"{name} ({ours.get(name)!r}, {theirs.get(name)!r})" for name in differing(ours, theirs)]
        if different:
            raise ValueError(
                f"{first} and {path} differ in more than the seed: {', '.join(different)}. Their mean would be of nothing; "
                "compare.py sets methods side by side."
            )
    seeds = [run["settings"]["DistillationConfig"]["seed"] for run in runs.values()]
    if len(set(seeds)) < len(seeds):
        raise ValueError(
            f"{', '.join(runs)} have the seeds {seeds}: a run that counts twice makes the spread too small."
        )


def _of_all_seeds(run: Mapping[str, Any]) -> dict[str, Any]:
    """What runs of one recipe have in common."""
    student = {name: run["student"][name] for name in ("method", "steps", "parameters")}
    settings = {
        group: {name: value for name, value in values.items() if name not in HARMLESS | {"seed"}}
        for group, values in run["settings"].items()
    }
    return flat(
        {"student": student, "settings": settings, "data": run.get("data"), "teacher": run["teacher"].get("digest")}
    )


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, spread and gains of runs that differ in their seed only."""
    config = [run["settings"]["DistillationConfig"] for run in runs]

    def points(role: str, metric: str) -> list[float]:
        return [100 * run[role]["test"][metric] for run in runs if metric in run[role]["test"]]

    gains = {
        metric: [a - b for a, b in zip(points("student", metric), points("twin", metric), strict=True)]
        for metric in METRICS
    }
    return {
        "dataset": runs[0]["settings"]["DataArguments"]["dataset_name"],
        "split": runs[0].get("data", {}).get("test_split", "test"),
        "method": runs[0]["student"]["method"],
        "seeds": [c["seed"] for c in config],
        "steps": runs[0]["student"]["steps"],
        "student_parameters": runs[0]["student"]["parameters"],
        "teacher_parameters": runs[0]["teacher"]["parameters"],
        "time_ratio": time_ratio(runs),
        "teacher": {metric: points("teacher", metric)[0] for metric in METRICS if points("teacher", metric)},
        "twin": {metric: points("twin", metric) for metric in METRICS},
        "student": {metric: points("student", metric) for metric in METRICS},
        "gain": gains,
        "versions": runs[0]["versions"],
    }


def time_ratio(runs: Sequence[dict[str, Any]]) -> float | None:
    """How much longer the student trained than its twin, over the runs in which neither was resumed; None without any."""
    whole = [run for run in runs if not (run["student"]["resumed_from"] or run["twin"]["resumed_from"])]
    ratios = [run["student"]["train_seconds"] / run["twin"]["train_seconds"] for run in whole]
    return statistics.mean(ratios) if ratios else None


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The lines of the table."""

    def spread(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}" if values else "-"

    def gain(values: list[float]) -> str:
        return f"{statistics.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f})" if values else "-"

    return [
        ["teacher", *(spread([summary["teacher"][m]] if m in summary["teacher"] else []) for m in METRICS)],
        ["twin", *(spread(summary["twin"][m]) for m in METRICS)],
        ["student", *(spread(summary["student"][m]) for m in METRICS)],
        ["gain", *(gain(summary["gain"][m]) for m in METRICS)],
    ]


if __name__ == "__main__":
    main()
