"""The harness: grids, runs that go on, fair comparisons, and the numbers that come out."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import yaml
import zoo
from grid_lab import GRID, Lab
from PIL import Image
from transformers import TrainerState

from hf_detrkd import DistillationConfig
from hf_detrkd.commands import compare, distill
from hf_detrkd.commands.arguments import DataArguments, ModelArguments, parse
from hf_detrkd.commands.compare import Runner, write_summary
from hf_detrkd.commands.grid_file import read_grid
from hf_detrkd.commands.records import StepClock
from hf_detrkd.families import FAMILIES
from hf_detrkd.methods import METHODS, choose, configure
from hf_detrkd.reporting.embed import embed, embed_files, read_runs
from hf_detrkd.reporting.fairness import METHOD_FIELDS, check_fair
from hf_detrkd.reporting.gains import compared_runs, line_styles
from hf_detrkd.reporting.page import markdown, number
from hf_detrkd.reporting.summary import ROW, interval, overview, read_summaries, summarize

ROOT = Path(__file__).parents[1]
DRAWN = {"drawn": {"teacher": "runs/{data}/teacher{seed}", "model_name_or_path": "runs/start{seed}"}}


@pytest.fixture
def lab(tmp_path, monkeypatch):
    return Lab(tmp_path, monkeypatch)


def clock(seconds: list[float]) -> StepClock:
    """One whose steps took so long."""
    made = StepClock()
    made.seconds = seconds
    return made


def test_time_of_a_step():
    steps = [3.0] * 30 + [1.0] * 70  # the teacher is left out after 30 of 100 steps: the median step is 1 s
    assert clock(steps).typical() == pytest.approx(1.6)
    evaluated = [50 + seconds if step % 25 == 0 else seconds for step, seconds in enumerate(steps)]
    assert clock(evaluated).typical() == pytest.approx(1.6)
    assert clock([2.0]).typical() == 2 and clock([]).typical() is None and StepClock().typical() is None
    assert clock([2.0, 2.0, 9.0, 2.0, 2.0, 2.0, 2.0]).typical() == 2


@pytest.mark.parametrize("every", [1, 2, 4, 10])
def test_time_of_a_step_where_some_have_a_teacher(tmp_path, monkeypatch, every):
    """The median of long and short steps would be one of the two. Evaluations are none of the steps' time, even after every cycle."""
    now = 0.0
    monkeypatch.setattr("hf_detrkd.commands.records.time.perf_counter", lambda: now)
    made = StepClock()
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, kd_every=every)
    made.on_train_begin(args, TrainerState(), None)
    for step in range(100):
        now += 1 if step % every else 3
        made.on_step_end(args, None, None)
        if step % every == 0:
            now += 20
            made.on_evaluate(args, None, None)
            now += 5
            made.on_save(args, None, None)
    assert made.typical() == pytest.approx(1 + 2 / every)


def test_time_of_a_step_where_a_run_with_kd_stop_was_resumed(tmp_path):
    """The steps before the resume, more of them with the teacher, aren't among those it has timed."""
    for step, settings, known in (
        (40, {"kd_stop": 0.3}, False),
        (0, {"kd_stop": 0.3}, True),
        (40, {}, True),
        (40, {"kd_stop": 0.3, "method": "none"}, True),
    ):
        resumed = clock([1.0] * 60)
        args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
        resumed.on_train_begin(args, TrainerState(global_step=step), None)
        assert (resumed.typical() is not None) == known


class TestGrid:
    def test_cells_come_seed_by_seed_with_the_twin_first(self, lab):
        names = [cell.name for cell in lab.grid().cells]
        methods = ["none", "logit_kd", "heavy", "longer_twin"]
        expected = []
        for seed in (3, 5):
            for data in ("bccd", "shapes"):
                expected += [f"{data}/small/teacher"] * (seed == 3)
                expected += [f"{data}/small/{method}/seed{seed}" for method in methods]
        assert names == expected

    def test_a_recipe_is_common_data_pair_method_and_overrides(self, lab):
        grid = lab.grid(
            overrides={"bccd/*/heavy": {"kd_weight": 4}, "shapes/*": {"learning_rate": 0.5}}, skip=["bccd/*/logit_kd"]
        )
        heavy = grid.cell("bccd", "small", "heavy", 5).recipe
        assert {name: heavy[name] for name in ("method", "kd_weight", "seed", "learning_rate", "dataset_name")} == {
            "method": "kd_detr",
            "kd_weight": 4,
            "seed": 5,
            "learning_rate": 0.001,
            "dataset_name": "data/bccd",
        }
        assert heavy["teacher_model_name_or_path"] == "runs/bccd/teacher"
        assert heavy["output_dir"].endswith("runs/grid/bccd/small/heavy/seed5")
        twin = grid.cell("shapes", "small", "none", 3).recipe
        assert twin["method"] == "none" and twin["learning_rate"] == 0.5 and "kd_weight" not in twin
        assert twin["teacher_model_name_or_path"] == "runs/shapes/teacher"
        assert grid.cell("bccd", "small", "logit_kd", 3) is None
        teacher = grid.cell("shapes", "small", "teacher").recipe
        assert teacher["only_teacher"] and teacher["learning_rate"] == 0.5

    def test_a_seed_of_a_cell_can_be_skipped(self, lab):
        """Where one pair or method has more seeds than the others; a teacher of its own for a seed goes with it."""
        pairs = {"small": {"teacher": "t"}, "drawn": {"teacher": "runs/seed{seed}"}}
        methods = {"logit_kd": {}, "heavy": {"method": "kd_detr"}}
        skip = ["bccd/drawn/*/seed5", "*/small/heavy/seed3"]
        names = {cell.name for cell in lab.grid(data={"bccd": {}}, pairs=pairs, methods=methods, skip=skip).cells}
        small = {f"bccd/small/{method}/seed{seed}" for method in ("none", "logit_kd") for seed in (3, 5)}
        drawn = {f"bccd/drawn/{method}/seed3" for method in ("teacher", "none", "logit_kd", "heavy")}
        assert names == small | drawn | {"bccd/small/teacher", "bccd/small/heavy/seed5"}

    @pytest.mark.parametrize("seed", [3, 5])
    def test_a_pair_with_skipped_seeds_runs(self, lab, tmp_path, seed):
        """The first among them: the teacher is measured all the same."""
        grid = lab.grid(data={"bccd": {}}, skip=[f"bccd/small/*/seed{seed}"])
        outcomes = lab.run(grid)
        assert set(outcomes.values()) == {"done"} and "bccd/small/teacher" in outcomes
        write_summary(grid, tmp_path / "docs", outcomes, say=lambda *_: None)
        (row,) = json.loads((tmp_path / "docs" / "grid.json").read_text())["rows"][:1]
        assert row["seeds"] == [8 - seed]

    def test_overrides_can_be_a_file(self, lab, tmp_path):
        (tmp_path / "tuned.yaml").write_text("'bccd/small/heavy': {kd_weight: 7}")
        assert (
            lab.grid(overrides=str(tmp_path / "tuned.yaml")).cell("bccd", "small", "heavy", 3).recipe["kd_weight"] == 7
        )

    def test_the_file_of_overrides_may_be_missing_only_before_tuning(self, lab, tmp_path):
        missing = str(tmp_path / "tuned.yaml")
        with pytest.raises(ValueError, match=r"tuned.yaml, which is not there. Write it first: python scripts/tune.py"):
            lab.grid(overrides=missing)
        path = lab.write(overrides=missing)
        assert read_grid(path, lab.folder / "runs", to_be_tuned=True).cell("bccd", "small", "heavy", 3)

    def test_a_grid_that_chooses_settings_never_sees_test(self, lab):
        recipe = lab.grid(split="validation").cells[1].recipe
        assert recipe["dataset_test_split"] == "validation"

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"dat": {}}, r"unknown sections \['dat'\]"),
            ({"seeds": []}, r"missing \['seeds'\]"),
            ({"split": "train"}, "`split` is 'train'; allowed are test, validation"),
            (
                {"methods": {"a": {"learning_rate": 1}}},
                r"method 'a' sets \['learning_rate'\]. A method may set kd_decay",
            ),
            ({"methods": {"a": {"time_of": "a"}}}, "method 'a' sets"),
            ({"methods": {"a": {"time_of": "b"}}}, "`time_of` of 'a' is 'b'"),
            (
                {"overrides": {"*/logit_kd": {"warmup_steps": 1}}},
                r"logit_kd/seed3 and .*none/seed3 differ in \['warmup_steps'\]",
            ),
            ({"common": {"seed": 1}}, r"sets \['seed'\], which the harness sets itself"),
            ({"pairs": {"p": {"config_name": "x"}}}, "needs a `teacher`"),
            ({"pairs": {"p": None}}, "needs a `teacher`"),
            ({"pairs": {"p": {"teacher": None}}}, "needs a `teacher`"),
            ({"common": {"lerning_rate": 1}}, r"sets \['lerning_rate'\], which are no flags of distill.py"),
            ({"common": ["max_steps"]}, r"`common` is \['max_steps'\]; it must be a mapping"),
            ({"data": "shapes"}, "`data` is 'shapes'; it must be a mapping"),
            ({"methods": ["a"]}, r"`methods` is \['a'\]; it must be a mapping"),
            ({"methods": {"a/b": {}}}, "`methods` is 'a/b'; it must be a mapping from names without /"),
            ({"methods": {"a": "kd_detr"}}, "`methods: a` is 'kd_detr'; it must be a mapping of flags"),
            ({"data": {True: {}}}, "`data` is True; it must be a mapping from names; put this one in quotation marks"),
            ({"seeds": 3}, "`seeds` is 3; it must be a list of whole numbers"),
            ({"seeds": ["a"]}, r"`seeds` is \['a'\]; it must be a list of whole numbers"),
            ({"seeds": [1, 1]}, "each once"),
            ({"skip": "bccd/*"}, r"`skip` is 'bccd/\*'; it must be a list of patterns"),
            ({"overrides": ["a"]}, r"`overrides` is \['a'\]; it must be a mapping"),
            (
                {"skip": ["bccd/small/logit_dk"]},
                r"\['bccd/small/logit_dk'\] in `skip` or `overrides` fit no cell; cells are bccd/s",
            ),
            (
                {"overrides": {"bccd/smal/heavy": {"kd_weight": 4}}},
                r"\['bccd/smal/heavy'\] in `skip` or `overrides` fit no cell",
            ),
            (
                {"methods": {"a": {}, "b": {"time_of": "a", "kd_weight": 3}}},
                r"'b' is a twin, without a teacher, and sets \['kd_w",
            ),
            (
                {"methods": {"a": {}, "none": {"kd_weight": 3}}},
                r"'none' is a twin, without a teacher, and sets \['kd_weight'\]",
            ),
            ({"methods": {"a": {}, "b": {"time_of": "none"}}}, r"`time_of` of 'b' is 'none'; methods are \['a'\]"),
            ({"methods": {"again": {"method": "none"}}}, "Method 'again' is 'none', the twin, which is always there"),
            (
                {"skip": ["*/none"]},
                "`skip` leaves out none of bccd/small and not logit_kd, which needs it: skip both or none",
            ),
            ({"skip": ["*/heavy"]}, "`skip` leaves out heavy of bccd/small and not longer_twin, which needs it"),
            ({"skip": ["*/none/seed5"]}, "`skip` leaves out none of bccd/small and not logit_kd, which needs it"),
            (
                {"skip": ["bccd/small/heavy/seed4"]},
                r"\['bccd/small/heavy/seed4'\] in `skip` or `overrides` fit no cell",
            ),
            ({"overrides": {"bccd/small/heavy/seed3": {"kd_weight": 4}}}, r"\['bccd/small/heavy/seed3'\] in `skip` or"),
        ],
    )
    def test_refuses(self, lab, sections, message):
        with pytest.raises(ValueError, match=message):
            lab.grid(**sections)

    def test_an_empty_file_is_no_grid(self, tmp_path):
        (tmp_path / "grid.yaml").write_text("")
        with pytest.raises(ValueError, match=r"grid.yaml is None; a grid is a mapping with common, data"):
            read_grid(tmp_path / "grid.yaml")

    def test_a_selection_brings_what_it_needs(self, lab):
        names = [cell.name for cell in lab.grid().selected("bccd/*/longer_twin/seed5")]
        assert names == ["bccd/small/teacher"] + [f"bccd/small/{m}/seed5" for m in ("none", "heavy", "longer_twin")]
        with pytest.raises(ValueError, match="fits no cell of grid"):
            lab.grid().selected("coco/*")

    def test_a_teacher_and_a_start_for_every_seed(self, lab):
        grid = lab.grid(pairs=DRAWN, data={"bccd": {}}, methods={"logit_kd": {}})
        methods = ("teacher", "none", "logit_kd")
        assert [cell.name for cell in grid.cells] == [f"bccd/drawn/{m}/seed{s}" for s in (3, 5) for m in methods]
        for method in methods:
            recipe = grid.cell("bccd", "drawn", method, 5).recipe
            assert recipe["teacher_model_name_or_path"] == "runs/bccd/teacher5"
            assert recipe["model_name_or_path"] == "runs/start5"
        names = [cell.name for cell in grid.selected("bccd/drawn/logit_kd/seed5")]
        assert names == [f"bccd/drawn/{method}/seed5" for method in methods]

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "scripts" / "recipes" / "grids").glob("*.yaml")), ids=lambda p: p.stem
    )
    def test_the_grids_of_the_repository(self, path, monkeypatch, tmp_path):
        monkeypatch.chdir(ROOT)
        grid = read_grid(path)
        for cell in grid.cells:
            if cell.seed in (None, grid.cells[1].seed):
                (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dict(cell.recipe)))
                groups = (ModelArguments, DataArguments, distill.DistillArguments, DistillationConfig)
                *_, args = parse(groups, ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path)])
                for name in set(args.method) - {"none"}:
                    settings = args.method_config or {}
                    configure(METHODS[name].config_class, settings if len(args.method) == 1 else settings.get(name))


class TestRunner:
    def test_runs_every_cell_once_and_goes_on(self, lab):
        grid = lab.grid()
        outcomes = lab.run(grid)
        assert set(outcomes.values()) == {"done"} and len(outcomes) == len(grid.cells) == 18
        assert set(lab.starts().values()) == {1}
        assert not list(Path(grid.cells[0].folder).parent.glob("**/checkpoint-*"))
        assert any("[18/18]" in line for line in lab.said)
        longer = grid.cell("bccd", "small", "longer_twin", 3)
        assert longer.read()["student"]["steps"] == 25  # 10 steps, each of 2.5 times the twin's seconds

        more = lab.grid(methods={**GRID["methods"], "new": {"method": "logit_kd"}})  # the grid grows
        assert set(lab.run(more).values()) == {"done"}
        assert set(lab.starts().values()) == {1} and len(lab.starts()) == 22

    def test_a_failed_cell_stops_only_what_needs_it(self, lab):
        lab.wish(bccd__small__heavy__seed3={"fails": True})
        grid = lab.grid()
        outcomes = lab.run(grid, "bccd/*")
        bad = {name: reason for name, reason in outcomes.items() if reason != "done"}
        assert "failed with code 1: ValueError: this went wrong" in bad.pop("bccd/small/heavy/seed3")
        assert bad == {"bccd/small/longer_twin/seed3": "it needs bccd/small/heavy/seed3"}
        lab.wish()
        assert set(lab.run(grid, "bccd/*").values()) == {"done"}
        assert {name: n for name, n in lab.starts().items() if n > 1} == {"bccd/small/heavy/seed3": 2}

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [
            (None, "bccd/small/heavy/seed3 doesn't know how long its steps take"),  # resumed after its last step
            (
                1e-9,
                "which is the same without a teacher: other work slowed them unevenly",
            ),  # would make it a shorter twin
        ],
    )
    def test_a_longer_twin_needs_the_time_of_a_step(self, lab, seconds, said):
        grid = lab.grid()
        lab.run(grid, "bccd/*/heavy/seed3")
        cell = grid.cell("bccd", "small", "heavy", 3)
        result = cell.read()
        result["student"]["step_seconds"] = seconds
        cell.results.write_text(json.dumps(result))
        outcomes = lab.run(grid, "bccd/*/longer_twin/seed3")
        assert said in outcomes["bccd/small/longer_twin/seed3"]

    def test_a_teacher_that_is_no_better_stops_its_pair(self, lab):
        lab.wish(bccd__small__teacher={"map": 0.12})
        outcomes = lab.run(lab.grid(), "bccd/*", jobs=1)
        stopped = {name for name, reason in outcomes.items() if reason != "done"}
        assert stopped == {f"bccd/small/{m}/seed{s}" for m in ("logit_kd", "heavy", "longer_twin") for s in (3, 5)}
        assert (
            "the teacher is no better than the twin, AP 12.0 and 13.0 on the validation"
            in outcomes["bccd/small/heavy/seed3"]
        )

    def test_changed_settings_are_refused(self, lab):
        lab.run(lab.grid(), "bccd/*/heavy/seed3")
        grid = lab.grid(methods={**GRID["methods"], "heavy": {"method": "kd_detr", "kd_weight": 5}})
        assert grid.cell("bccd", "small", "heavy", 3).state() == "changed"
        outcomes = lab.run(grid, "bccd/*/heavy/seed3")
        assert "its settings have changed since it was begun (kd_weight 9 -> 5)" in outcomes["bccd/small/heavy/seed3"]
        harmless = lab.grid(common={**GRID["common"], "logging_steps": 3})
        assert harmless.cell("bccd", "small", "heavy", 3).state() == "done"

    def test_a_cell_that_failed_at_once_has_not_begun(self, lab):
        """A wrong value that was mended: no step was made with it."""
        lab.wish(bccd__small__heavy__seed3={"fails": True})
        lab.run(lab.grid(), "bccd/*/heavy/seed3")
        lab.wish()
        grid = lab.grid(methods={**GRID["methods"], "heavy": {"method": "kd_detr", "kd_weight": 5}})
        assert lab.run(grid, "bccd/*/heavy/seed3")["bccd/small/heavy/seed3"] == "done"

    @pytest.mark.parametrize(
        ("sections", "change"),
        [
            ({"methods": {**GRID["methods"], "longer_twin": {"time_of": "logit_kd"}}}, "time_of 'heavy' -> 'logit_kd'"),
            ({"common": {**GRID["common"], "max_steps": 20}}, "max_steps 10 -> 20"),
        ],
    )
    def test_a_longer_twin_of_another_time_has_changed(self, lab, sections, change):
        lab.run(lab.grid(), "bccd/*/seed3")
        cell = lab.grid(**sections).cell("bccd", "small", "longer_twin", 3)
        assert cell.changes() == [change]
        (cell.folder / "time_of.yaml").unlink()  # of earlier versions there is none
        assert cell.state() == "done"

    def test_a_longer_twin_that_is_shorter_is_refused(self, lab):
        """By an earlier version, which didn't write down from which schedule its steps were computed."""
        lab.run(lab.grid(), "bccd/*/seed3")
        grid = lab.grid(common={**GRID["common"], "max_steps": 100})
        for method in ("none", "logit_kd", "heavy"):
            shutil.rmtree(grid.cell("bccd", "small", method, 3).folder)
        shutil.rmtree(grid.cell("bccd", "small", "teacher").folder)
        cell = grid.cell("bccd", "small", "longer_twin", 3)
        (cell.folder / "time_of.yaml").unlink(missing_ok=True)
        assert "was trained for 25 steps and its twin for 100" in lab.run(grid, "bccd/*/seed3")[cell.name]

    def test_another_teacher_than_the_measured_one(self, lab, tmp_path):
        grid = lab.grid()
        lab.wish(bccd__small__heavy__seed3={"digest": "new"}, bccd__small__none__seed5={"digest": "new"})
        outcomes = lab.run(grid, "bccd/*")
        assert "had another teacher (its weights' digest is new) than the one" in outcomes["bccd/small/heavy/seed3"]
        assert outcomes["bccd/small/heavy/seed5"] == "it needs bccd/small/none/seed5"
        write_summary(grid, tmp_path / "docs", outcomes, say=lambda *_: None)
        rows = json.loads((tmp_path / "docs" / "grid.json").read_text())["rows"]
        assert [(row["method"], row["seeds"]) for row in rows] == [("logit_kd", [3])]

    def test_a_split_without_objects(self, lab):
        """Nothing is trained where nothing could be reported."""
        lab.wish(bccd__small__teacher={"test": {}})
        outcomes = lab.run(lab.grid(), "bccd/*/seed3")
        assert "no AP on test: there is no object to find" in outcomes["bccd/small/teacher"]
        assert outcomes["bccd/small/heavy/seed3"] == "it needs bccd/small/teacher" and len(lab.starts()) == 1

    def test_the_command_fails_where_cells_do(self, lab, tmp_path):
        lab.wish(bccd__small__teacher={"fails": True})
        words = ["--config", str(lab.write()), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "docs")]
        with pytest.raises(SystemExit) as failed:
            compare.main([*words, "--only", "bccd/*/none/seed3"])
        assert failed.value.code == 1
        assert compare.main([*words, "--summarize_only"])
        assert compare.main([*words, "--only", "shapes/*/none/seed3"])["shapes/small/none/seed3"] == "done"

    def test_waits_for_a_cell_that_another_harness_works_on(self, lab):
        grid = lab.grid()
        cell = grid.cell("bccd", "small", "teacher")
        cell.folder.mkdir(parents=True)
        with open(cell.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            worker = threading.Timer(0.6, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
            worker.start()
            start = time.monotonic()
            assert lab.run(grid, cell.name) == {cell.name: "done"}
            assert time.monotonic() - start > 0.5
            worker.join()

    def test_a_terminated_harness_takes_its_runs_with_it(self, lab):
        lab.wish(bccd__small__teacher={"seconds": 60})
        grid = lab.grid()
        alarm = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
        alarm.start()
        runner = Runner(grid, 1, print)
        with pytest.raises(SystemExit):
            runner.run(grid.selected("bccd/*/teacher"))
        (run,) = runner.running.values()
        assert run.process.wait(timeout=10) == -signal.SIGTERM
        alarm.join()

    def test_dry_run(self, lab, tmp_path, capsys):
        lab.run(lab.grid(), "bccd/*/none/seed3")
        states = compare.main(["--config", str(lab.write()), "--runs", str(tmp_path / "runs"), "--dry_run"])
        assert states["bccd/small/none/seed3"] == "done" and states["bccd/small/none/seed5"] == "to do"
        assert "to do            shapes/small/heavy/seed5" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ({"method": "kd_dter"}, "bccd/small/heavy/seed5: `method` is 'kd_dter'.* Did you mean 'kd_detr'"),
            ({"method": "qskd", "method_config": {"weights": {"l2": 1}}}, "heavy/seed5: `weights` names unknown terms"),
            ({"method": "qskd", "kd_weight": -1}, "heavy/seed5: `kd_weight` is -1.0; it must be 0 or more"),
            (
                {"method": "qskd", "kd_weight": "heavy"},
                "heavy/seed5: argument --kd_weight.*: invalid float value: 'heavy'",
            ),
        ],
    )
    @pytest.mark.parametrize("option", [[], ["--dry_run"]])
    def test_values_are_checked_before_anything_runs(self, lab, tmp_path, method, message, option):
        path = lab.write(methods={"heavy": method})
        with pytest.raises(ValueError, match=message):
            compare.main(["--config", str(path), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path), *option])
        assert not list(tmp_path.glob("runs/**/recipe.yaml"))

    def test_jobs_must_be_positive(self, lab):
        with pytest.raises(ValueError, match="`jobs` is 0"):
            Runner(lab.grid(), 0)


@pytest.fixture(scope="module")
def result():
    settings = {"DistillationConfig": {"method": ["kd_detr"], "kd_weight": 3, "learning_rate": 0.1, "max_steps": 9}}
    student = {"initial_digest": "a", "steps": 9, "parameters": 5}
    return {
        "settings": settings,
        "student": student,
        "teacher": {"digest": "t"},
        "data": {"images": {"train": 3}},
        "versions": {"torch": "2", "machine": "x"},
    }


class TestFairness:
    def twin(self, result, **changes):
        twin = copy.deepcopy(result)
        twin["settings"]["DistillationConfig"] |= {"method": ["none"], "kd_weight": 1}
        twin["versions"]["machine"] = "another"
        for path, value in changes.items():
            *groups, name = path.split("__")
            place = twin
            for group in groups:
                place = place[group]
            place[name] = value
        return twin

    def test_the_method_may_differ(self, result):
        check_fair(result, self.twin(result), "run")

    @pytest.mark.parametrize(
        ("change", "value", "named"),
        [
            ("settings__DistillationConfig__learning_rate", 0.2, r"learning_rate \(0.1, the twin 0.2\)"),
            ("student__initial_digest", "b", "student.initial_digest"),
            ("student__steps", 8, r"student.steps \(9, the twin 8\)"),
            ("data__images__train", 2, "data.images.train"),
            ("teacher__digest", "other", "teacher"),
            ("versions__torch", "3", "versions.torch"),
        ],
    )
    def test_anything_else_is_named(self, result, change, value, named):
        with pytest.raises(ValueError, match=f"run and its twin differ in more than the method: .*{named}"):
            check_fair(result, self.twin(result, **{change: value}), "run")

    def test_every_field_of_a_method_may_differ(self):
        known = {field.name for field in dataclasses.fields(DistillationConfig)}
        assert {name for name in known if name.startswith(("kd_", "method"))} <= METHOD_FIELDS

    def test_a_longer_twin_is_longer(self, result):
        longer = self.twin(result, student__steps=20, settings__DistillationConfig__max_steps=20)
        with pytest.raises(ValueError, match=r"max_steps.*steps"):
            check_fair(longer, result, "run")
        check_fair(longer, result, "run", longer=True)
        shorter = self.twin(result, student__steps=8, settings__DistillationConfig__max_steps=8)
        with pytest.raises(
            ValueError, match="run was trained for 8 steps and its twin for 9: it is to be a longer one"
        ):
            check_fair(shorter, result, "run", longer=True)


class TestSummary:
    def test_a_method_stands_beside_the_longer_twin_of_its_own_time(self, lab, tmp_path):
        """And beside the first one where it has none, as has `light`; a longer twin stands beside none."""
        methods = {**GRID["methods"], "light": {"method": "qskd"}, "longer_light": {"time_of": "logit_kd"}}
        lab.wish(bccd__small__longer_twin__seed3={"map": 0.11}, bccd__small__longer_light__seed3={"map": 0.16})
        grid = lab.grid(methods=methods)
        lab.run(grid, "bccd/*/seed3")
        write_summary(grid, tmp_path / "docs", {}, say=lambda *_: None)
        rows = json.loads((tmp_path / "docs" / "grid.json").read_text())["rows"]
        # 23 each, the longer twins 14 and 19
        beside = {row["method"]: row.get("delta_longer") for row in rows}
        assert beside == {"logit_kd": 4.0, "heavy": 9.0, "light": 9.0, "longer_twin": None, "longer_light": None}
        shutil.rmtree(tmp_path / "runs")  # of the record
        write_summary(grid, tmp_path / "docs", {}, say=lambda *_: None)
        rows = json.loads((tmp_path / "docs" / "grid.json").read_text())["rows"]
        assert {row["method"]: row.get("delta_longer") for row in rows} == beside

    def test_interval(self):
        # mean 2, standard deviation 1, 97.5 % quantile of t with 2 degrees of freedom 4.302653
        assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
        assert interval([1.0]) == (None, None)

    def test_rows(self, lab, tmp_path):
        lab.wish(
            bccd__small__heavy__seed3={"map": 0.3},
            bccd__small__logit_kd__seed5={"fails": True},
            bccd__small__longer_twin__seed3={"map": 0.18},
        )
        grid = lab.grid()
        outcomes = lab.run(grid)
        output = tmp_path / "docs"
        write_summary(grid, output, outcomes, say=lambda *_: None)
        rows = json.loads((output / "summary.json").read_text())
        assert [tuple(row) for row in rows] == [tuple(sorted(ROW))] * 6
        row = next(row for row in rows if (row["dataset"], row["method"]) == ("bccd", "heavy"))
        # twins 13 and 15; students 33 and 25: gains 20 and 10, t of 1 degree of freedom 12.7062
        reach = 12.7062 * 50**0.5 / 2**0.5
        assert row == {
            "dataset": "bccd",
            "family": "rt_detr",
            "pair": "small",
            "method": "heavy",
            "seeds": [3, 5],
            "teacher_map": 50.0,
            "twin_map": 14.0,
            "map": 29.0,
            "delta": 15.0,
            "delta_low": pytest.approx(15 - reach, abs=0.01),
            "delta_high": pytest.approx(15 + reach, abs=0.01),
            "steps": 10,
            "time_ratio": 2.5,
        }
        single = next(row for row in rows if (row["dataset"], row["method"]) == ("bccd", "logit_kd"))
        assert single["seeds"] == [3] and single["delta_low"] is None
        detail = json.loads((output / "grid.json").read_text())
        heavy = next(row for row in detail["rows"] if (row["dataset"], row["method"]) == ("bccd", "heavy"))
        assert heavy["gap_closed"] == pytest.approx(100 * 15 / 36, abs=0.01)
        assert heavy["delta_validation"] == 15.0
        assert heavy["gains"]["map_cell"] == 15.0 and heavy["kd_share"] == 50.0 and heavy["deltas"] == [20.0, 10.0]
        longer = next(row for row in detail["rows"] if (row["dataset"], row["method"]) == ("bccd", "longer_twin"))
        assert longer["steps"] == 25 and longer["time_ratio"] == 2.5  # of all steps
        # beside the longer twin, of 21 and 15: 12 and 10, with a standard deviation of the root of 2
        ends = [heavy["delta_longer"], heavy["delta_longer_low"], heavy["delta_longer_high"]]
        assert ends == pytest.approx([11, 11 - 12.7062, 11 + 12.7062], abs=0.01)
        assert heavy["delta_longer_seeds"] == [3, 5]
        assert "delta_longer" not in longer
        page = (output / "grid.md").read_text()
        words = " ".join(page.split())
        assert "over longer twin" in words and "| +11.0 (-1.7 to +23.7) |" in words and "| +2.0 (1 seed) |" in words
        # Each method below the twin of its own seeds
        lines = (
            "| teacher | 50.0 | 60.0 |",
            "| twin, seeds 3, 5 | 14.0 |",
            "| twin, seed 3 | 13.0 |",
            "| logit_kd, seed 3 | 23.0 |",
        )
        places = [words.partition("## shapes")[0].find(line) for line in lines]
        assert places == sorted(places) and places[0] > 0
        assert "| bccd/small/heavy |" in words and "bccd/small/logit_kd/seed5: failed" in page
        for name in ("grid_gains.png", "grid_progress.png"):
            with Image.open(output / name) as picture:
                assert picture.width > 400

        # Another grid, and one that only chose settings
        other = lab.grid("other", data={"bccd": {}}, seeds=[3])
        write_summary(other, output, lab.run(other), say=lambda *_: None)
        chosen = lab.grid("chosen", data={"bccd": {}}, seeds=[3], split="validation")
        write_summary(chosen, output, lab.run(chosen), say=lambda *_: None)
        assert len(json.loads((output / "summary.json").read_text())) == 9
        assert "validation split" in (output / "chosen.md").read_text()

    def test_a_method_looks_alike_in_every_panel(self):
        """One pair lacks a method, and there are more methods than colours."""
        names = [f"method{number}" for number in range(8)]
        longer = ["longer_twin", "longer_twin_half"]
        rows = [{"method": name} for name in (*names[3:], *longer, *names)]
        runs = {f"bccd/small/{name}/seed0": {"method": name} for name in names}
        runs |= {f"bccd/small/{name}/seed0": {"method": "none"} for name in longer}
        styles = line_styles({"rows": rows, "runs": runs})
        looks = [(style["color"], style["linestyle"]) for style in styles.values()]
        assert list(styles) == ["none", *names[3:], *longer, *names[:3]] and len(set(looks)) == len(looks)
        black = {name for name, style in styles.items() if style["color"] == "#000000"}
        assert black == {"none", *longer}

    def test_a_panel_compares_runs_of_the_same_seeds(self):
        seeds = {"none": [0, 1, 2], "often": [1, 0], "too": [0, 1], "once": [2]}
        runs = {f"bccd/small/{method}/seed{seed}": {"seed": seed} for method in seeds for seed in seeds[method]}
        rows = [{"dataset": "bccd", "pair": "small", "method": name, "seeds": seeds[name]} for name in list(seeds)[1:]]
        panels = compared_runs({"rows": rows, "runs": runs})
        assert {
            name: {method: sorted(run["seed"] for run in of) for method, of in methods.items()}
            for name, methods in panels.items()
        } == {
            "bccd/small, seeds 0, 1": {"none": [0, 1], "often": [0, 1], "too": [0, 1]},
            "bccd/small, seed 2": {"none": [2], "once": [2]},
        }

    def test_unfair_cells_are_left_out_and_named(self, lab, tmp_path):
        grid = lab.grid()
        lab.run(grid, "bccd/*")
        cell = grid.cell("bccd", "small", "heavy", 5)
        result = cell.read()
        result["student"]["initial_digest"] = "others"
        cell.results.write_text(json.dumps(result))
        outcomes = lab.run(grid, "bccd/*")
        assert "student.initial_digest" in outcomes[cell.name]
        write_summary(grid, tmp_path / "docs", outcomes, say=lambda *_: None)
        row = next(
            row for row in json.loads((tmp_path / "docs" / "summary.json").read_text()) if row["method"] == "heavy"
        )
        assert row["seeds"] == [3]
        assert f"{cell.name}: {cell.name} and its twin differ" in (tmp_path / "docs" / "grid.md").read_text()

    def test_from_the_record_where_the_runs_are_gone(self, lab, tmp_path):
        lab.wish(bccd__small__logit_kd__seed5={"fails": True})
        grid, output = lab.grid(), tmp_path / "docs"
        write_summary(grid, output, lab.run(grid), say=lambda *_: None)
        files = ("grid.json", "grid.md", "summary.json")
        before = [(output / name).read_text() for name in files]
        for cell in grid.cells:
            shutil.rmtree(cell.folder)
        recorded = json.loads(before[0])
        (output / "grid.json").write_text(json.dumps(recorded | {"rows": recorded["rows"][:1]}))
        said = []
        write_summary(grid, output, {}, say=said.append)
        after = [(output / name).read_text() for name in files]
        assert "17 cells of grid are not here" in said[0] and [after[0], after[2]] == [before[0], before[2]]
        # Why a cell isn't there is known only where it was run
        assert "seed5: failed" in before[1] and "bccd/small/logit_kd/seed5: to do" in after[1]
        assert before[1].partition("Not done")[0] == after[1].partition("Not done")[0]

    def test_a_record_goes_on(self, lab, tmp_path):
        """Some cells run elsewhere, some here: together they are what one machine would have made of all."""
        grid, output, everything = lab.grid(), tmp_path / "docs", tmp_path / "all"
        quiet = {"say": lambda *_: None}
        write_summary(grid, everything, lab.run(grid), **quiet)
        for cell in grid.cells:
            if cell.method == "heavy":
                shutil.rmtree(cell.folder)
        write_summary(grid, output, {}, **quiet)
        assert "heavy" not in (output / "summary.json").read_text()
        for cell in grid.cells:
            if cell.seed == 5 or cell.method in ("logit_kd", "longer_twin"):
                shutil.rmtree(cell.folder, ignore_errors=True)
        write_summary(grid, output, lab.run(grid, "*/heavy/*"), **quiet)
        for name in ("grid.json", "grid.md", "summary.json"):
            assert (output / name).read_text() == (everything / name).read_text()

    def test_a_slower_machine_goes_on_with_a_record(self, lab, tmp_path):
        """A step's time is compared with the twin's on the same machine: recorded with recorded, what is run here with what is here."""
        grid, output = lab.grid(), tmp_path / "docs"
        quiet = {"say": lambda *_: None}
        lab.run(grid, "bccd/small/none/*")
        lab.run(grid, "bccd/small/heavy/*")
        write_summary(grid, output, {}, **quiet)
        shutil.rmtree(lab.folder / "runs")
        lab.wish(bccd__small__none__seed5={"slow": 2}, bccd__small__logit_kd__seed5={"slow": 3})
        write_summary(grid, output, lab.run(grid, "bccd/small/logit_kd/seed5"), **quiet)
        detail = json.loads((output / "grid.json").read_text())
        assert {row["method"]: (row["seeds"], row["time_ratio"]) for row in detail["rows"]} == {
            "heavy": ([3, 5], 2.5),
            "logit_kd": ([5], 3.75),
        }

    def test_a_teacher_for_every_seed(self, lab, tmp_path):
        """The row has their mean, every seed is stopped by its own, and the record goes on seed by seed."""
        sections = {"pairs": DRAWN, "data": {"bccd": {}}, "methods": {"logit_kd": {}, "heavy": {"method": "kd_detr"}}}
        sections["seeds"] = [3, 5, 7]
        poor = {"map": 0.05}
        lab.wish(bccd__drawn__teacher__seed5={"map": 0.7}, bccd__drawn__teacher__seed7=poor)
        grid, output = lab.grid(**sections), tmp_path / "docs"
        outcomes = lab.run(grid, jobs=1)
        assert "no better than the twin" in outcomes["bccd/drawn/heavy/seed7"]
        assert outcomes["bccd/drawn/heavy/seed5"] == outcomes["bccd/drawn/none/seed7"] == "done"
        write_summary(grid, output, outcomes, say=lambda *_: None)
        recorded = json.loads((output / "grid.json").read_text())
        # twins 13 and 15, students 23 and 25
        found = {
            row["method"]: [row[name] for name in ("teacher_map", "delta", "gap_closed")] for row in recorded["rows"]
        }
        assert found == {name: [60.0, 10.0, pytest.approx(100 * 10 / 46, abs=0.01)] for name in ("logit_kd", "heavy")}
        assert [pair["teacher"]["metrics"]["map"] for pair in recorded["pairs"].values()] == [50.0, 70.0, 5.0]
        page = " ".join((output / "grid.md").read_text().split())
        assert "teacher `t` (seed 3; every seed has its own)" in page and "| teacher | 60.0 |" in page
        # On another machine, the teacher of seed 5 is another: seed 3 goes on
        shutil.rmtree(lab.folder / "runs")
        lab.wish(bccd__drawn__teacher__seed5={"map": 0.8})
        lab.run(grid, "bccd/drawn/teacher/*")
        write_summary(grid, output, {}, say=lambda *_: None)
        kept = json.loads((output / "grid.json").read_text())
        assert {row["method"]: row["seeds"] for row in kept["rows"]} == {"logit_kd": [3], "heavy": [3]}
        assert "seed5: to do; its record is left out: the teacher here" in (output / "grid.md").read_text()

    def test_a_record_of_a_machine_with_other_number_formats_goes_on(self, lab, tmp_path):
        """transformers refuses bf16 without a GPU; of a record nothing is run."""
        chosen = choose(FAMILIES["rt_detr"])
        ran = {"method": list(chosen.method), "method_config": chosen.method_config, "kd_decay": chosen.kd_decay}
        wishes = {name: {"config": {"bf16": True}} for name in ("bccd__small__teacher", "bccd__small__none__seed3")}
        lab.wish(**wishes, bccd__small__auto__seed3={"config": {"bf16": True, **ran}})
        sections = {"methods": {"auto": {}}, "seeds": [3], "data": {"bccd": {}}}
        grid, output = lab.grid(**sections, common={**GRID["common"], "bf16": True}), tmp_path / "docs"
        write_summary(grid, output, lab.run(grid), say=lambda *_: None)
        shutil.rmtree(lab.folder / "runs")
        write_summary(grid, output, {}, say=lambda *_: None)
        assert len(json.loads((output / "grid.json").read_text())["rows"]) == 1
        said = []
        write_summary(lab.grid(**sections, common={**GRID["common"], "bf16": False}), output, {}, say=said.append)
        assert any("bf16 was True and is False" in line for line in said)

    @pytest.mark.parametrize(
        ("change", "left_out", "reason"),
        [
            ({"common": {"max_steps": 10, "learning_rate": 0.1}}, "*", "learning_rate was 0.001 and is 0.1"),
            (
                {"methods": {"logit_kd": {}, "heavy": {"method": "kd_detr", "kd_weight": 8}}},
                "*/heavy/*",
                "was 9 and is 8",
            ),
            (
                {"methods": {"logit_kd": {}, "heavy": {"method": "kd_detr"}}},
                "*/heavy/*",
                "kd_weight was 9 and is 1.0",  # the default of what the grid doesn't say
            ),
            ({"wish": {"bccd__small__teacher": {"map": 0.4}}, "run": "bccd/small/teacher"}, "bccd/*", "teacher here"),
            (
                {"wish": {"bccd__small__none__seed5": {"map": 0.3}}, "run": "bccd/small/none/seed5"},
                "bccd/small/*/seed5",
                "the twin here is not the recorded one",
            ),
        ],
    )
    def test_a_record_that_is_of_something_else(self, lab, tmp_path, change, left_out, reason):
        """Other settings, another teacher, a twin that doesn't come out the same: left out, and the page says why."""
        grid, output = lab.grid(), tmp_path / "docs"
        write_summary(grid, output, lab.run(grid), say=lambda *_: None)
        recorded = json.loads((output / "grid.json").read_text())["runs"]
        shutil.rmtree(lab.folder / "runs")
        lab.wish(**change.pop("wish", {}))
        pattern = change.pop("run", None)
        grid = lab.grid(**change)
        if pattern is not None:
            lab.run(grid, pattern)
        said = []
        write_summary(grid, output, {}, say=said.append)
        assert any(reason in line for line in said)
        kept = json.loads((output / "grid.json").read_text())["runs"] if left_out != "*" else {}
        for name, run in recorded.items():
            if grid.cell(*name.split("/")[:3], int(name[-1])) is None or name == pattern:
                continue
            assert kept.get(name) == (None if fnmatchcase(name, left_out) else run), name
        if left_out == "*":
            assert "nothing to summarise" in said[-1]
        else:
            assert reason in (output / "grid.md").read_text()

    def test_a_record_in_another_spelling(self, lab, tmp_path):
        """The grid's settings are compared as the command reads them: YAML takes 1e-3 for text; `auto` is what it chose."""
        chosen = choose(FAMILIES["rt_detr"])
        config = {"method": list(chosen.method), "method_config": chosen.method_config, "kd_decay": chosen.kd_decay}
        methods = {"auto": {}, "two": {"method": "logit_kd,proposals"}}
        lab.wish(bccd__small__auto__seed3={"config": config})
        sections = {
            "methods": methods,
            "seeds": [3],
            "data": {"bccd": {}},
            "common": {**GRID["common"], "learning_rate": "1e-3"},
        }
        grid, output = lab.grid(**sections), tmp_path / "docs"
        write_summary(grid, output, lab.run(grid), say=lambda *_: None)
        recorded = (output / "grid.json").read_text()
        shutil.rmtree(lab.folder / "runs")
        write_summary(grid, output, {}, say=lambda *_: None)
        assert (output / "grid.json").read_text() == recorded and len(json.loads(recorded)["rows"]) == 2
        other = lab.grid(**{**sections, "methods": {"auto": {"kd_decay": "cosine"}}})
        said = []
        write_summary(other, output, {}, say=said.append)
        assert any("kd_decay was 'linear' and is 'cosine'" in line for line in said)

    def test_what_is_missing_has_a_line_per_method(self):
        missing = dict.fromkeys(("d/p/teacher", "d/p/a/seed0", "d/p/a/seed2", "d/p/b/seed0"), "to do") | {
            "d/p/a/seed1": "failed"
        }
        page = markdown({"grid": "g", "split": "test", "rows": [], "pairs": {}}, [], missing)
        lines = page.partition("Not done:\n\n")[2].splitlines()
        assert lines == [
            "- d/p/teacher: to do",
            "- d/p/a/seed0, 2: to do",
            "- d/p/b/seed0: to do",
            "- d/p/a/seed1: failed",
        ]

    def test_nothing_yet(self, lab, tmp_path):
        said = []
        write_summary(lab.grid(), tmp_path / "docs", {}, say=said.append)
        assert "nothing to summarise" in said[0] and not (tmp_path / "docs").exists()
        assert summarize("g", "test", {}, {})["rows"] == overview([]) == []


class TestEmbedding:
    row = dict.fromkeys(ROW, 1.0) | {"dataset": "d", "pair": "p", "seeds": [0, 1], "steps": 7, "delta": 3.14159}
    row |= {"gap_closed": None, "kd_share": 12.3, "delta_min": -0.04, "delta_max": 2.0, "delta_validation": 0.5}

    @property
    def summaries(self):
        return {"g": {"grid": "g", "rows": [self.row | {"method": "a"}, self.row | {"method": "b", "delta": -0.5}]}}

    runs = {"one": {"student": {"test": {"map": 0.1234}}, "twin": None, "teacher": {"test": {}}}}

    def test_single_runs(self, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "one.json").write_text(json.dumps(self.runs["one"]))
        (tmp_path / "g.json").write_text(json.dumps(self.summaries["g"]))
        runs = read_runs(tmp_path)
        assert list(runs) == ["other/one"]
        text = "<!-- results:other/one -->\n<!-- /results --> <!-- results:other/one student map -->?<!-- /results -->"
        new = embed(text, {}, runs)
        assert "| student |" in new and "| teacher |" not in new and new.endswith("map -->12.3<!-- /results -->")
        assert embed(new, {}, runs) == new

    def test_runs_of_finetune(self, tmp_path):
        (tmp_path / "alone.json").write_text(
            json.dumps({"model": {"test": {"map": 0.0641}, "validation": {"map": 0.07}}})
        )
        for name, value in (("map", "6.4"), ("validation_map", "7.0")):
            text = f"<!-- results:alone model {name} -->?<!-- /results -->"
            assert embed(text, {}, read_runs(tmp_path)) == text.replace("?", value)

    def test_benchmarks(self, tmp_path):
        rows = [{"method": "none", "peak_memory_MiB": 1340.5}, {"overhead": 1.0263, "method": "kd_detr"}]
        (tmp_path / "cost.json").write_text(json.dumps({"what": "step", "rows": rows}))
        new = embed("<!-- results:cost --><!-- /results -->", {}, read_runs(tmp_path)).splitlines()[1:-1]
        assert [line.replace(" ", "") for line in new] == [
            "|method|peak_memory_MiB|overhead|",
            "|-------|--------------:|-------:|",
            "|none|1340|-|",
            "|kd_detr|-|1.03|",
        ]

    def test_tables_and_numbers(self):
        text = "It gains <!-- results:g d/p/a delta -->?<!-- /results -->.\n<!-- results:g -->\nold\n<!-- /results -->\nEnd."
        new = embed(text, self.summaries, {})
        assert "It gains <!-- results:g d/p/a delta -->+3.1<!-- /results -->." in new
        assert "old" not in new and new.count("| d/p/") == 2 and new.endswith("<!-- /results -->\nEnd.")
        assert embed(new, self.summaries, {}) == new
        only = embed("<!-- results:g */b --><!-- /results -->", self.summaries, {})
        assert "| d/p/b |" in only and "d/p/a" not in only and "+0.0 to +2.0" in only  # no -0.0

    def test_gains_by_method_and_pair(self):
        """Bold where the interval leaves out 0, on either side; a line that ends at it doesn't."""
        rows = [
            ("p", "a", 3.14, [2, 4.2], [0, 1]),
            ("p", "b", 1, [0, 2], [0, 1]),
            ("q", "b", -1.5, [-2, -1], [0, 1, 2]),
            ("q", "c", 9, [None, None], [0]),
        ]
        names = ("pair", "method", "delta", "ends", "seeds")
        rows = [dict(zip(names, row, strict=True)) for row in rows]
        rows = [{"dataset": "d", "delta_low": row["ends"][0], "delta_high": row["ends"][1], **row} for row in rows]
        lines = embed("<!-- results:g * methods --><!-- /results -->", {"g": {"rows": rows}}, {}).splitlines()
        header, _, *cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:-1])
        assert header == ["", "d/p", "d/q"] and cells == [
            ["a", "**+3.1** (2)", "-"],
            ["b", "+1.0 (2)", "**-1.5** (3)"],
            ["c", "-", "+9.0 (1)"],
        ]

    def test_a_gain_with_its_interval(self):
        row = {
            "dataset": "d",
            "pair": "p",
            "method": "a",
            "seeds": [0, 1, 2],
            "delta": 3.14,
            "delta_low": -1,
            "delta_high": 7.2,
        }
        one = {**row, "method": "b", "seeds": [0], "delta_low": None, "delta_high": None}
        longer = {"delta_longer": 1, "delta_longer_low": -2, "delta_longer_high": 4, "delta_longer_seeds": [0, 1]}

        def embedded(row, name):
            return embed(f"<!-- results:g d/p/{row['method']} {name} -->?<!-- /results -->", {"g": {"rows": [row]}}, {})

        for asked, name, text in (
            (row, "gain", "+3.1 (-1.0 to +7.2)"),
            (one, "gain", "+3.1 (1 seed)"),
            (row, "gain_longer", "-"),
            ({**row, **longer}, "gain_longer", "+1.0 (-2.0 to +4.0, 2 seeds)"),
        ):
            assert f">{text}<" in embedded(asked, name)

    @pytest.mark.parametrize(
        ("mark", "message"),
        [
            ("h", "there is no grid or run 'h'"),
            ("one student AP", "no 'AP' of 'student'"),
            ("one twin map", "no 'map' of 'twin'"),
            ("g d/p/* delta", "2 lines of g fit"),
            ("g d/p/a AP", "the line has no 'AP'; it has "),
            ("g x", "0 lines of g fit"),
        ],
    )
    def test_what_is_not_there(self, mark, message):
        with pytest.raises(ValueError, match=message):
            embed(f"<!-- results:{mark} --><!-- /results -->", self.summaries, self.runs)

    def test_numbers(self):
        values = {"delta": 0.05, "steps": 12.0, "time_ratio": 1.257, "map": 3.0, "gap_closed": 50.6, "delta_low": None}
        assert [number(name, value) for name, value in values.items()] == ["+0.1", "12", "1.26", "3.0", "51 %", "-"]
        # Alike from memory, where they may be numpy's, and from the record; and no -0.0
        assert [number("delta_low", kind(1.85)) for kind in (float, np.float64)] == ["+1.9", "+1.9"]
        assert number("delta_low", -0.04) == "+0.0" and number("delta_low", -10.04) == "-10.0"

    def test_files(self, tmp_path):
        (tmp_path / "g.json").write_text(json.dumps(self.summaries["g"]))
        (tmp_path / "summary.json").write_text("[]")
        page = tmp_path / "page.md"
        page.write_text("<!-- results:g d/p/b delta --><!-- /results -->")
        assert embed_files([page], tmp_path) == [page] and embed_files([page], tmp_path) == []
        assert "-0.5" in page.read_text()

    def test_the_documents_say_what_the_results_say(self):
        """Fails? python scripts/compare.py --config GRID --summarize_only --embed README.md docs/*.md docs/*/*.md"""
        summaries, runs = read_summaries(ROOT / "docs" / "results"), read_runs(ROOT / "docs" / "results")
        for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
            text = path.read_text()
            assert embed(text, summaries, runs) == text, path
        rows = json.loads((ROOT / "docs" / "results" / "summary.json").read_text()) if summaries else []
        assert rows == overview(list(summaries.values()))


def test_a_twin_alone_is_the_twin_of_a_distilled_run(tmp_path, monkeypatch):
    """With real runs: one distilled with a twin beside it, one with method none; the teacher's images are of another size."""
    import test_commands

    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    teacher = test_commands.save(tmp_path / "teacher", test_commands.NAMES)
    settings = Path(teacher) / "preprocessor_config.json"
    processor = json.loads(settings.read_text())
    processor["size"] = {"height": 2 * zoo.SIZE, "width": 2 * zoo.SIZE}
    settings.write_text(json.dumps(processor))
    student = test_commands.save(tmp_path / "student", test_commands.NAMES, decoder_layers=2)
    peaks = iter([100.0])  # before the first training; then a process has the same peak to its end
    monkeypatch.setattr("hf_detrkd.commands.training.peak_memory", lambda: next(peaks, 150.0))
    flags = ["--teacher_model_name_or_path", teacher, "--model_name_or_path", student, "--max_steps", "3"]
    flags += ["--inherit_from_teacher", "true", "--sheet_images", "0", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--logging_steps", "1", "--kd_weight", "2", *test_commands.QUICK]

    def run(method: str, *more: str) -> dict:
        arguments = [*flags, "--method", method, "--output_dir", str(tmp_path / "-".join([method, *more])), *more]
        return json.loads(json.dumps(distill.main(arguments), default=str))

    both, alone = run("logit_kd", "--with_twin", "true"), run("none", "--with_twin", "true")
    assert alone["twin"] is None and alone["teacher"]["digest"] == both["teacher"]["digest"]
    check_fair(both, alone, "run")
    same = ("initial_digest", "steps", "curve", "test")
    times = {"runtime", "samples_per_second", "steps_per_second"}
    for name in same:
        pair = both["twin"][name], alone["student"][name]
        if name == "test":
            pair = tuple({k: v for k, v in metrics.items() if k not in times} for metrics in pair)
        assert pair[0] == pair[1]
    assert both["student"]["initial_digest"] == both["twin"]["initial_digest"]
    row = both["student"]
    assert row["model_type"] == "rt_detr" and row["step_seconds"] > 0
    assert (row["peak_memory_MiB"], both["twin"]["peak_memory_MiB"]) == (150, None)
    assert 0 < row["gradient_shares"]["kd"] < 1 and row["curve"][0][0] == 2
    assert alone["student"]["gradient_shares"] == {}

    measured = run("none", "--only_teacher", "true")
    # Of costs it says nothing: no student stands beside it
    assert measured["teacher"].items() <= alone["teacher"].items() and "student" not in measured
    assert not (tmp_path / "none---only_teacher-true" / "model.safetensors").exists()
    quick = run("none", "--evaluate_teacher", "false")
    assert quick["teacher"]["test"] == quick["teacher"]["validation"] == {}
