"""A grid in a temporary folder, with something quick in place of distill.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from hf_detrkd.commands import compare
from hf_detrkd.commands.compare import Runner
from hf_detrkd.commands.grid import Grid
from hf_detrkd.commands.grid_file import read_grid

GRID = {
    "common": {"max_steps": 10, "learning_rate": 0.001},
    "data": {"bccd": {"dataset_name": "data/bccd"}, "shapes": {}},
    "pairs": {"small": {"teacher": "runs/{data}/teacher", "config_name": "student.json"}},
    "methods": {
        "logit_kd": {},
        "heavy": {"method": "kd_detr", "kd_weight": 9},
        "longer_twin": {"time_of": "heavy"},
    },
    "seeds": [3, 5],
}


# Stands for distill.py: writes a results.json as its recipe wants it, or fails where a wish says so.
FAKE = """
import json, sys, time, pathlib, yaml
recipe = yaml.safe_load(open(sys.argv[1]))
folder = pathlib.Path(recipe["output_dir"])
wishes = json.loads(pathlib.Path(sys.argv[2]).read_text())
with open(folder / "starts", "a") as starts:
    starts.write("x")
name = "/".join(folder.parts[-4:] if "seed" in folder.name else folder.parts[-3:])
wish = wishes.get(name, {})
time.sleep(wish.get("seconds", 0))
if wish.get("fails"):
    sys.exit("ValueError: this went wrong")
method = recipe["method"]
ap = wish.get("map", {"none": 0.1}.get(method, 0.2)) + 0.01 * recipe.get("seed", 0)
metrics = {"loss": 3.0, "map": ap, "map_50": 2 * ap, "map_small": ap, "map_cell": ap}
settings = {"Arguments": {name: value for name, value in recipe.items() if name.endswith(("name", "path", "split"))}}
config = {
    "method": method.split(","), "method_config": None, "kd_weight": recipe.get("kd_weight", 1),
    "kd_warmup_steps": 0, "kd_stop": 0, "kd_decay": "none",
    "learning_rate": float(recipe["learning_rate"]), "seed": recipe.get("seed"), "max_steps": recipe["max_steps"],
    "output_dir": str(folder), **wish.get("config", {})}
settings |= {"DistillationConfig": config}
student = {
    "method": "+".join(config["method"]), "model_type": "rt_detr", "initial_digest": str(recipe.get("seed")), "parameters": 1000,
    "steps": recipe["max_steps"], "train_seconds": 9.0,
    "step_seconds": wish.get("slow", 1) * (0.1 if method == "none" else 0.25),
    "peak_memory_MiB": 10.0, "gradient_shares": {} if method == "none" else {"kd": 0.5, "l1": 0.25},
    "curve": [[5, ap / 2], [10, ap]], "resumed_from": None, "validation": metrics, "test": metrics}
teacher_metrics = {"map": wish.get("map", 0.5), "map_50": 0.6}
teacher = {
    "name_or_path": "t", "digest": wish.get("digest", "d"), "parameters": 4000, "validation": teacher_metrics,
    "test": wish.get("test", teacher_metrics)}
results = {
    "teacher": teacher, "twin": None, "settings": settings, "versions": {"torch": "2", "machine": "m"},
    "data": {"images": {"train": 5, "validation": 2, "test": 3}, "test_split": "test"}}
if not recipe.get("only_teacher"):
    results["student"] = student
(folder / "checkpoint-5").mkdir(exist_ok=True)
(folder / "results.json").write_text(json.dumps(results))
"""


class Lab:
    """Writes grids, runs them, and says what was run."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder
        self.said: list[str] = []
        (folder / "fake.py").write_text(FAKE)
        command = [sys.executable, str(folder / "fake.py"), "{}", str(folder / "wishes.json")]
        monkeypatch.setattr(
            compare, "command_of", lambda cell: [word.format(cell.folder / "recipe.yaml") for word in command]
        )
        monkeypatch.setattr(compare, "POLL_SECONDS", 0.02)
        self.wish()

    def write(self, name: str = "grid", **sections) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**GRID, **sections}, sort_keys=False))
        return path

    def grid(self, name: str = "grid", **sections) -> Grid:
        return read_grid(self.write(name, **sections), self.folder / "runs")

    def wish(self, **wishes) -> None:
        """Of cells, with __ for /: ``map``, ``seconds`` to take, ``fails``, ``slow`` (times as long a step), ``config`` (settings that
        it records), the teacher's ``digest`` and metrics on ``test``."""
        wishes = {name.replace("__", "/"): wish for name, wish in wishes.items()}
        (self.folder / "wishes.json").write_text(json.dumps(wishes))

    def run(self, grid: Grid, pattern: str = "*", jobs: int = 4) -> dict[str, str]:
        self.said = []
        return Runner(grid, jobs, self.said.append).run(grid.selected(pattern))

    def starts(self) -> dict[str, int]:
        """How often each cell was started."""
        return {
            "/".join(path.parent.parts[-4:]).removeprefix("grid/"): len(path.read_text())
            for path in self.folder.glob("runs/grid/**/starts")
        }
