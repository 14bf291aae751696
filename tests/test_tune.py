"""Weights of methods from their share of the gradient, and from a search on the validation split."""

from __future__ import annotations

import json

import pytest
import yaml
from grid_lab import Lab
from test_commands import NAMES, SHAPES, save

from hf_detrkd.commands import tune
from hf_detrkd.commands.grid_file import read_grid
from hf_detrkd.commands.tune import ROUNDS, TOLERANCE, Measured, balanced, by_gradient_share
from hf_detrkd.gradient_shares import weight_for


def test_weight_by_hand():
    # A share of 1/4 is k = d / 3; for 1/2 it must be k = d
    assert weight_for(0.5, 0.25, 2.0) == 6.0
    assert weight_for(0.25, 0.5, 6.0) == 2.0
    assert weight_for(0.3, 0.3, 1.2345) == 1.23


def test_balanced_terms_by_hand():
    seen = Measured(0.4, {"a": 4.0, "b": 1.0, "off": 0.0}, {"a": 1.0, "b": 2.0, "off": 0.0})
    assert balanced(seen) == {"a": 0.5, "b": 4.0}  # both at the geometric mean, 2
    assert balanced(Measured(0.4, {"a": 0.0}, {"a": 1.0})) == {}
    with pytest.raises(ValueError, match=r"Terms \['m_a'\] belong to several methods"):
        balanced(Measured(0.4, {"m_a": 4.0}, {}))


class World:
    """Norms of the terms per unit of weight beside a detection gradient of 1; the state drifts with the weight."""

    def __init__(self, **norms: float):
        self.norms, self.asked = norms, []

    def __call__(self, cell, fields, after, steps) -> Measured:
        self.asked.append(fields["kd_weight"])
        weights = {"a": 1.0, "b": 2.0} | (fields.get("method_config") or {}).get("weights", {})
        kd = {name: fields["kd_weight"] * weights[name] * norm for name, norm in self.norms.items()}
        total = sum(kd.values()) * (1 + 0.1 * fields["kd_weight"] / (1 + fields["kd_weight"]))
        return Measured(total / (1 + total), {name: norm / (1 + total) for name, norm in kd.items()}, weights)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    return Lab(tmp_path, monkeypatch)


class TestByShare:
    @pytest.mark.parametrize("target", [0.1, 0.5, 0.8])
    def test_reaches_the_target(self, lab, monkeypatch, target):
        world = World(a=0.01, b=0.02)
        monkeypatch.setattr(tune, "measure", world)
        cell = lab.grid().cell("bccd", "small", "heavy", 3)
        fields, rounds = by_gradient_share(cell, target, 20, 10, balance=False)
        assert abs(rounds[-1]["share"] - target) <= TOLERANCE and len(rounds) <= ROUNDS
        assert world.asked[0] == 9 and fields == {"method": "kd_detr", "kd_weight": world.asked[-1]}

    def test_balances_first(self, lab, monkeypatch):
        monkeypatch.setattr(tune, "measure", World(a=0.04, b=0.005))
        cell = lab.grid().cell("bccd", "small", "heavy", 3)
        fields, rounds = by_gradient_share(cell, 0.4, 20, 10, balance=True)
        terms = rounds[-1]["terms"]
        assert terms["a"] == pytest.approx(terms["b"], rel=0.01)
        assert abs(rounds[-1]["share"] - 0.4) <= TOLERANCE
        assert set(fields["method_config"]["weights"]) == {"a", "b"}

    def test_a_method_without_gradient(self, lab, monkeypatch):
        monkeypatch.setattr(tune, "measure", World(a=0.0))
        with pytest.raises(ValueError, match=r"distillation has 0\.0 of the gradient norm: no weight can change that"):
            by_gradient_share(lab.grid().cell("bccd", "small", "heavy", 3), 0.4, 20, 10, balance=False)


def test_search_on_val_and_what_is_written(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "measure", World(a=0.01, b=0.02))
    best = "bccd/small/heavy@0.3/seed3".replace("/", "__")
    lab.wish(**{best: {"map": 0.4}})
    path = lab.write()
    flags = ["--config", str(path), "--runs", str(tmp_path / "runs"), "--only", "bccd/*/heavy/*", "--jobs", "4"]
    flags += ["--evidence", str(tmp_path / "evidence")]
    found = tune.main([*flags, "--search", "0.1", "0.3", "0.6"])
    assert list(found) == ["bccd/small/heavy"]
    rows = found["bccd/small/heavy"]["search"]
    assert [row["share"] for row in rows] == [0.1, 0.3, 0.6]
    assert [row["validation_map"] for row in rows] == [23.0, 43.0, 23.0] and rows[0]["twin_map"] == 13.0
    weight = rows[1]["kd_weight"]
    assert rows[0]["kd_weight"] < weight < rows[2]["kd_weight"]
    recipe = yaml.safe_load((tmp_path / "runs/grid_search/bccd/small/heavy@0.3/seed3/recipe.yaml").read_text())
    assert recipe["dataset_test_split"] == "validation" and recipe["kd_weight"] == weight

    tuned = tmp_path / "tuned" / "grid.yaml"
    assert yaml.safe_load(tuned.read_text()) == {"bccd/small/heavy": {"kd_weight": weight}}
    grid = read_grid(lab.write(overrides=str(tuned)), tmp_path / "runs")
    assert grid.cell("bccd", "small", "heavy", 5).recipe["kd_weight"] == weight
    lab.write()
    tune.main([*flags[:5], "shapes/*/logit_kd/*", *flags[6:], "--target_share", "0.5"])
    assert list(yaml.safe_load(tuned.read_text())) == ["bccd/small/heavy", "shapes/small/logit_kd"]
    evidence = json.loads((tmp_path / "evidence" / "grid.json").read_text())
    assert set(evidence) == {"bccd/small/heavy", "shapes/small/logit_kd"}
    assert evidence["shapes/small/logit_kd"]["rounds"][-1]["share"] == pytest.approx(0.5, abs=TOLERANCE)
    assert "share 0.3: kd_weight" in capsys.readouterr().out


def test_learning_rates_of_the_twin(lab, tmp_path, capsys):
    """Whole twins on the validation split; one that diverges is no reason to stop."""
    best, worst = (f"bccd/small@{rate}/none/seed3".replace("/", "__") for rate in ("0.003", "0.1"))
    lab.wish(**{best: {"map": 0.4}, worst: {"fails": True}})
    flags = ["--config", str(lab.write()), "--runs", str(tmp_path / "runs"), "--only", "bccd/*", "--jobs", "4"]
    flags += ["--evidence", str(tmp_path / "evidence")]
    found = tune.main([*flags, "--learning_rates", "0.001", "0.003", "0.1"])
    assert list(found) == ["bccd/small"] and found["bccd/small"]["learning_rate"] == 0.003
    rows = [(row["learning_rate"], row["validation_map"]) for row in found["bccd/small"]["search"]]
    assert rows == [(0.001, 13.0), (0.003, 43.0), (0.1, None)]
    recipe = yaml.safe_load((tmp_path / "runs/grid_rates/bccd/small@0.003/none/seed3/recipe.yaml").read_text())
    assert recipe["dataset_test_split"] == "validation" and recipe["learning_rate"] == 0.003
    assert set(json.loads((tmp_path / "evidence" / "grid_rates.json").read_text())) == {"bccd/small"}
    said = capsys.readouterr().out
    assert "bccd/small: learning_rate 0.003" in said and "largest" not in said
    tune.main([*flags, "--learning_rates", "0.001", "0.003"])  # goes on where it was
    assert "0.003 is the largest that was tried" in capsys.readouterr().out
    assert not (tmp_path / "tuned").exists()


def test_no_rate_that_works(lab, tmp_path):
    lab.wish(**{"bccd__small@0.1__none__seed3": {"fails": True}})
    flags = ["--config", str(lab.write()), "--runs", str(tmp_path / "runs"), "--only", "bccd/*"]
    with pytest.raises(RuntimeError, match="no twin of bccd/small ended"):
        tune.main([*flags, "--evidence", str(tmp_path), "--learning_rates", "0.1"])


@pytest.mark.parametrize("others", [["--search", "0.1"], ["--target_share", "0.1"], ["--balance"]])
def test_rates_beside_shares_are_refused(lab, others):
    with pytest.raises(ValueError, match="--learning_rates is of the twin"):
        tune.main(["--config", str(lab.write()), "--learning_rates", "0.1", *others])


def test_shares_must_be_shares(lab):
    with pytest.raises(ValueError, match=r"is 1\.5; it must lie between 0 and 1"):
        tune.main(["--config", str(lab.write()), "--target_share", "1.5"])


def test_a_target_beside_a_search_is_refused(lab):
    with pytest.raises(ValueError, match=r"--target_share 0\.5 beside --search 0\.1 0\.3"):
        tune.main(["--config", str(lab.write()), "--target_share", "0.5", "--search", "0.1", "0.3"])


def test_measures_a_real_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    lab = Lab(tmp_path, monkeypatch)
    teacher, student = save(tmp_path / "teacher", NAMES), save(tmp_path / "student", NAMES, decoder_layers=2)
    grid = lab.grid(
        common={"max_steps": 3, "use_cpu": True, "per_device_train_batch_size": 2, "eval_strategy": "epoch"},
        data={"shapes": {"dataset_name": SHAPES}},
        pairs={"rt": {"teacher": teacher, "model_name_or_path": student}},
        methods={"logit_kd": {"kd_warmup_steps": 50}},
    )
    cell = grid.cell("shapes", "rt", "logit_kd", 3)
    first = tune.measure(cell, {"kd_weight": 1.0}, 0, 1)
    weight = weight_for(0.6, first.share, 1.0)
    then = tune.measure(cell, {"kd_weight": weight}, 0, 1)  # the same step of the same run
    assert then.share == pytest.approx(0.6, abs=0.01)
    assert first.terms.keys() == first.weights.keys() == then.terms.keys() and first.share > 0
    with pytest.raises(ValueError, match="ended before step 200"):
        tune.measure(cell, {"kd_weight": 1.0}, 200, 2)
