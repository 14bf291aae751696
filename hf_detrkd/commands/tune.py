"""Choose the learning rate of the twins; and the weights of methods, by their share of the gradient or a small search.

    python scripts/tune.py --config scripts/recipes/grids/bccd.yaml --learning_rates 0.001 0.003 0.006 --jobs 2
    python scripts/tune.py --config scripts/recipes/grids/bccd.yaml --only "bccd/*/kd_detr/*" --target_share 0.3
    python scripts/tune.py --config ... --only ... --search 0.1 0.3 0.5 --jobs 2     the best of these shares on val

First the learning rate. A twin that could be better makes any method look good: with --learning_rates every pair's twin is
trained whole with each of them (runs/<grid>_rates/), the one with the best AP on the validation split is printed, for the
pair's `learning_rate`, and the evidence goes to docs/results/tuning/<grid>_rates.json.

Losses of different papers have different scales: equal weights say nothing. What can be compared is how much of the
gradient norm distillation has, ||g_kd|| / (||g_detection|| + ||g_kd||) with respect to the student's parameters. It is
measured after the first steps of the run itself, and ``kd_weight`` is set so that it becomes the target. With
``--balance`` the weights of the terms are first set so that all terms have gradients of the same norm.

With --search every share is also tried in a whole run, and the share with the best AP on the validation split is taken.
What was found goes to a file of ``overrides`` for the grid, the evidence to docs/results/tuning/.

Whole runs are a grid of their own, which goes on where it was stopped. The test split is never read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from ..gradient_shares import USUAL_SHARE, weight_for
from ..progress import DistillationPrinter, DistillationProgress
from ..reporting.fairness import METHOD_FIELDS
from ..reporting.summary import TWIN
from ..reporting.versions import versions
from ..trainer import DistillationTrainer
from .diagnose import flags_in
from .distill import prepare
from .grid import TEACHER, Cell, Grid
from .grid_file import read_grid
from .records import mean_shares
from .setup import write_json
from .trials import search, tune_rate

ROUNDS = 4
TOLERANCE = 0.02
"""How near the share must come to the target."""


@dataclass(frozen=True)
class Measured:
    """Means over some steps."""

    share: float
    """Of all terms together in the gradient norm."""
    terms: Mapping[str, float]
    """By term, its norm over the same denominator."""
    weights: Mapping[str, float]
    """The weights of the terms in the run."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns by data/pair/method the fields found and the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the grid, a YAML file")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of names data/pair/method/seed0")
    parser.add_argument(
        "--target_share", type=float, help=f"of the gradient norm, between 0 and 1; default: {USUAL_SHARE}"
    )
    parser.add_argument("--search", type=float, nargs="+", default=[], help="shares to try in whole runs")
    parser.add_argument(
        "--learning_rates", type=float, nargs="+", default=[], help="to try with the twins, in whole runs"
    )
    parser.add_argument("--balance", action="store_true", help="give all terms gradients of the same norm")
    parser.add_argument("--after", type=int, default=20, help="steps before the measurement")
    parser.add_argument("--steps", type=int, default=10, help="steps of the measurement")
    parser.add_argument("--jobs", type=int, default=1, help="runs of the search side by side")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument(
        "--output", type=Path, help="YAML with the overrides; by default tuned/<grid>.yaml beside the grid"
    )
    parser.add_argument("--evidence", type=Path, default=Path("docs/results/tuning"), help="folder of the evidence")
    arguments = parser.parse_args(argv)
    if arguments.target_share is not None and arguments.search:
        raise ValueError(
            f"--target_share {arguments.target_share} beside --search {' '.join(map(str, arguments.search))}: a search tries "
            "its own shares. Put it among them, or leave --search out."
        )
    if arguments.learning_rates and (arguments.balance or arguments.search or arguments.target_share is not None):
        raise ValueError(
            "--learning_rates is of the twin, which has no teacher: choose it first, and the shares of methods by a second call."
        )
    arguments.target_share = USUAL_SHARE if arguments.target_share is None else arguments.target_share
    for share in (arguments.target_share, *arguments.search):
        if not 0 < share < 1:
            raise ValueError(f"A share of the gradient norm is {share}; it must lie between 0 and 1.")
    grid = read_grid(arguments.config, arguments.runs, to_be_tuned=True)
    found: dict[str, Any] = {}
    if arguments.learning_rates:
        for cell in grid.selected(arguments.only):
            name = f"{cell.data}/{cell.pair}"
            if cell.method == TWIN and name not in found:  # the first seed
                found[name] = tune_rate(grid, cell, arguments)
                _keep_evidence(name, found[name], f"{grid.name}_rates", arguments)
        return found
    cells = [cell for cell in grid.selected(arguments.only) if cell.method not in (TEACHER, TWIN) and not cell.time_of]
    for cell in cells:
        name = f"{cell.data}/{cell.pair}/{cell.method}"
        if name not in found:  # the first seed
            found[name] = tune(grid, cell, arguments)
            _keep(name, found[name], arguments)
    return found


def tune(grid: Grid, cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that a method should have on a pair, and how they were found."""
    first = arguments.search[0] if arguments.search else arguments.target_share
    fields, rounds = by_gradient_share(cell, first, arguments.after, arguments.steps, arguments.balance)
    evidence = {"seed": cell.seed, "rounds": rounds, "after_steps": arguments.after, "steps": arguments.steps}
    if arguments.search:
        share = rounds[-1]["share"]
        weights = {target: weight_for(target, share, rounds[-1]["kd_weight"]) for target in arguments.search}
        evidence["search"] = search(grid, cell, fields, weights, arguments)
        best = max(evidence["search"], key=lambda row: row["validation_map"])
        fields = {**fields, "kd_weight": best["kd_weight"]}
    return {"fields": fields, **evidence}


def by_gradient_share(
    cell: Cell, target: float, after: int, steps: int, balance: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """``kd_weight``, and with ``balance`` the terms' weights, with which distillation has ``target`` of the gradient norm.

    Returns:
        the fields of the method, and what was measured round by round; the last round is the one with these fields.
    """
    fields = {name: cell.recipe[name] for name in METHOD_FIELDS & cell.recipe.keys()}
    fields.setdefault("kd_weight", 1.0)
    rounds: list[dict[str, Any]] = []
    while True:
        seen = measure(cell, fields, after, steps)
        rounds.append(
            {
                "kd_weight": fields["kd_weight"],
                "share": seen.share,
                "terms": dict(seen.terms),
                "weights": dict(seen.weights),
            }
        )
        if not 0 < seen.share < 1:
            raise ValueError(
                f"{cell.name}: distillation has {seen.share} of the gradient norm: no weight can change that. Are all terms "
                "switched off, or is the student the teacher?"
            )
        near = abs(seen.share - target) <= TOLERANCE
        if len(rounds) == ROUNDS or (near and (len(rounds) > 1 or not balance)):
            return fields, rounds
        if balance and len(rounds) == 1:
            config = dict(fields.get("method_config") or {})
            fields["method_config"] = config | {"weights": {**config.get("weights", {}), **balanced(seen)}}
        fields["kd_weight"] = weight_for(target, seen.share, fields["kd_weight"])


def balanced(seen: Measured) -> dict[str, float]:
    """Weights with which every term that is on has the geometric mean of the norms."""
    on = {name: norm for name, norm in seen.terms.items() if norm > 0 and seen.weights.get(name)}
    unknown = sorted(seen.terms.keys() - seen.weights.keys())
    if unknown:
        raise ValueError(f"Terms {unknown} belong to several methods in one run; --balance works with one method only.")
    if not on:
        return {}
    mean = math.exp(statistics.mean(math.log(norm) for norm in on.values()))
    return {name: float(f"{seen.weights[name] * mean / norm:.3g}") for name, norm in on.items()}


def measure(cell: Cell, fields: Mapping[str, Any], after: int, steps: int) -> Measured:
    """The shares in steps ``after`` to ``after + steps`` of the cell's own run: same seed, schedule and data."""
    # Without the warm-up of the weights, which would be measured instead of them
    recipe = {
        **cell.recipe,
        **fields,
        "kd_warmup_steps": 0,
        "kd_stop": 0,
        "logging_steps": 1,
        "gradient_share_steps": 0,
    }
    recipe |= {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "resume_from_checkpoint": None,
    }
    folder = cell.folder.parent / "tuning"
    recipe["output_dir"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    *arguments, args = flags_in(folder)
    run = prepare(*arguments, args, say=lambda *_: None)
    trainer = DistillationTrainer(
        model=run.student,
        teacher_model=run.teacher,
        args=args,
        train_dataset=run.data.train,
        processing_class=run.processor,
        teacher_processing_class=run.teacher_processor,
        callbacks=[_Measure(after, steps)],
    )
    for printing in (DistillationPrinter, DistillationProgress):  # a line for every step of every round
        trainer.remove_callback(printing)
    trainer.train()
    shares = mean_shares(trainer.state.log_history)
    if not shares:
        raise ValueError(f"{cell.name} ended before step {after}: measure earlier with --after.")
    methods = list(trainer.model.methods.values())
    weights = methods[0].config.weights if len(methods) == 1 else {}
    return Measured(shares.pop("kd"), shares, weights)


class _Measure(TrainerCallback):
    """Switches the measurement on, and ends the run after it; the schedule is that of the whole run."""

    def __init__(self, after: int, steps: int):
        self.after, self.end = after, after + steps

    def on_step_begin(self, args, state, control, **kwargs):
        args.gradient_share_steps = int(state.global_step >= self.after)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.end


def _keep(name: str, found: Mapping[str, Any], arguments: argparse.Namespace) -> None:
    """Adds what was found to the overrides and the evidence, which may be of several calls."""
    output = arguments.output or arguments.config.parent / "tuned" / f"{arguments.config.stem}.yaml"
    output.parent.mkdir(parents=True, exist_ok=True)
    overrides = (yaml.safe_load(output.read_text(encoding="utf-8")) or {}) if output.is_file() else {}
    fields = {field: value for field, value in found["fields"].items() if field in ("kd_weight", "method_config")}
    overrides[name] = {field: value for field, value in fields.items() if value is not None}
    output.write_text(
        "# Written by scripts/tune.py: `overrides` of a grid\n" + yaml.safe_dump(overrides, sort_keys=True),
        encoding="utf-8",
    )
    evidence = _keep_evidence(name, found, arguments.config.stem, arguments)
    last = found["rounds"][-1]
    print(f"{name}: {overrides[name]}, share of the gradient {last['share']:.2f} -> {output}, {evidence}")
    for row in found.get("search", []):
        print("  share {share}: kd_weight {kd_weight}, AP {validation_map} on val, twin {twin_map}".format(**row))


def _keep_evidence(name: str, found: Mapping[str, Any], stem: str, arguments: argparse.Namespace) -> Path:
    """Adds it to what earlier calls found."""
    path = arguments.evidence / f"{stem}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json({**before, name: {**found, "versions": versions()}}, path)
    return path


if __name__ == "__main__":
    main()
