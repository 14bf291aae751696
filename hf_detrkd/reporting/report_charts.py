"""The diagrams of a run's page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .charts import Chart, charts_of
from .curves import Panel
from .run import TWIN, Run

LOSSES = {"loss": "with distillation", "detection_loss": "detection"}
"""The losses in training, as a legend calls them."""


def curves(run: Run) -> list[Chart]:
    """AP against steps and seconds, and the losses."""
    level = (run.results.get("teacher") or {}).get("validation", {}).get("map")
    level = None if level is None or math.isnan(level) else 100 * level
    histories = run.histories
    ap = "AP on the validation split, by {}"
    # Without a teacher the loss has one part
    names = {(run.role, key): f"{run.role}, {text}" for key, text in LOSSES.items()} if run.methods else {}
    return [
        *charts_of(histories, [Panel(ap.format("step"), _is("eval_map"), factor=100)], level=level),
        *charts_of(histories, [Panel(ap.format("time"), _is("eval_map"), factor=100)], level=level, x="seconds"),
        *charts_of(histories, [Panel("Loss in training", _is(*LOSSES))], labels=names),
        *charts_of(histories, [Panel("Loss on the validation split", _is("eval_loss"))]),
    ]


def _is(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys


def terms(run: Run) -> dict[str, Any]:
    """Every distillation term, and its share of the gradient; those that are 0 throughout only by name."""
    histories = {role: history for role, history in run.histories.items() if role != TWIN}
    logged = dict.fromkeys(key for history in histories.values() for log in history for key in log)
    names = [key.removeprefix("kd_") for key in logged if key.startswith("kd_") and key != "kd_scale"]
    idle = [name for name in names if not any(log.get(f"kd_{name}") for its in histories.values() for log in its)]
    active = [name for name in names if name not in idle]
    shares = {f"gradient_share_{name}": name for name in active} | {"gradient_share_kd": "all of distillation"}
    labels = {(role, key): name for role in histories for key, name in shares.items()}
    share = Panel("Share of the gradient norm (%)", lambda key: key in shares, factor=100)
    return {
        "charts": charts_of(histories, [Panel(name, _is(f"kd_{name}")) for name in active], wide=False),
        "shares": charts_of(histories, [share], labels=labels),
        "idle": idle,
    }


def schedule(run: Run) -> list[Chart]:
    """What changes from step to step besides the weights."""
    titles = {"learning_rate": "Learning rate", "kd_scale": "Scale of distillation", "grad_norm": "Gradient norm"}
    return charts_of(run.histories, [Panel(title, _is(key)) for key, title in titles.items()], wide=False)
