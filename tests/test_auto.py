"""`--method auto`: what it chooses can be run, and is what the run says it was."""

from __future__ import annotations

import json
from functools import cache

import pytest
import yaml
import zoo
from documents import ROOT
from scenes import Scenes, processor

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.families import FamilyAdapter, adapter_for
from hf_detrkd.methods import build_methods, choose, settled


@cache
def adapter(name: str, classes: int = zoo.CLASSES) -> FamilyAdapter:
    return adapter_for(zoo.build(name, classes=classes))


def config(**settings) -> DistillationConfig:
    return DistillationConfig(**{"output_dir": "unused", "use_cpu": True, "method": "auto", **settings})


@pytest.mark.parametrize("classes", [1, zoo.CLASSES])
@pytest.mark.parametrize("student", zoo.NAMES)
def test_every_pair_has_methods_that_can_be_built(student, classes):
    for teacher in zoo.NAMES:
        pair = adapter(student, classes), adapter(teacher, classes)
        choice = choose(*pair)
        assert [m.name for m in build_methods(choice.method, choice.method_config, *pair)] == list(choice.method)


def test_what_the_student_can_carry_decides():
    assert choose(adapter("rt_detr")).method == choose(adapter("detr")).method == ("features", "kd_detr")
    assert choose(adapter("yolos")).method == ("features", "logit_kd")


@pytest.mark.parametrize(
    ("student", "teacher", "method"),
    [
        ("detr", "detr", "d3etr"),
        ("conditional_detr", "conditional_detr", "d3etr"),
        ("dab-detr", "dab-detr", "d3etr"),
        ("conditional_detr", "detr", "features"),
        ("deformable_detr", "deformable_detr", "features"),
        ("rt_detr", "rt_detr", "features"),
        ("yolos", "yolos", "features"),
    ],
)
def test_a_student_that_could_be_made_from_its_teacher(student, teacher, method):
    pair = adapter(student), adapter(teacher)
    assert choose(*pair).method[0] == settled(config(), *pair).method[0] == method
    assert settled(config(gradient_checkpointing=True), *pair).method[0] == "features"


def test_a_narrower_student_is_none():
    narrow = adapter_for(zoo.build("detr", d_model=zoo.WIDTH // 2))
    assert choose(narrow, adapter("detr")).method == ("features", "kd_detr")


@pytest.mark.parametrize(
    ("grid", "pairs"),
    [
        ("bccd_weights", ["detr"]),
        ("bccd_finetuned", ["detr", "conditional_detr"]),
        ("bccd_long", ["detr", "conditional_detr"]),
    ],
)
def test_its_choice_for_such_students_is_what_validation_says(grid, pairs):
    """On the validation split, over the seeds that have both, `d3etr` gained more than maps and points in the mean."""
    runs = json.loads((ROOT / "docs" / "results" / f"{grid}.json").read_text())["runs"]
    for pair in pairs:
        found = {
            method: {name[-1]: run["validation"]["map"] for name, run in runs.items() if f"/{pair}/{method}/" in name}
            for method in ("d3etr", "maps_and_points")
        }
        both = found["d3etr"].keys() & found["maps_and_points"].keys()
        d3etr, maps = (sum(found[method][seed] for seed in both) for method in found)
        assert both and d3etr > maps, pair


@pytest.mark.parametrize(
    "grid", ["bccd_small", "bccd96", "bccd_finetuned", "bccd_weights", "shapes", "shapes_long", "shapes_families"]
)
def test_its_evidence_is_about_its_settings(grid):
    """The documents say that `maps_and_points` of these grids is what `auto` takes."""
    content = yaml.safe_load((ROOT / "scripts" / "recipes" / "grids" / f"{grid}.yaml").read_text())
    choice = choose(adapter("rt_detr"))
    fields = {"method": list(choice.method), "method_config": choice.method_config}
    assert content["methods"]["maps_and_points"] == fields and content["common"]["kd_decay"] == choice.kd_decay


def test_balanced_weights_are_those_that_were_found():
    """bccd_weights takes over what `tune.py` found for bccd_finetuned; the documents say so."""
    tuned = ROOT / "scripts" / "recipes" / "grids" / "tuned"
    found, taken = (yaml.safe_load((tuned / f"{name}.yaml").read_text()) for name in ("bccd_finetuned", "bccd_weights"))
    assert taken and all(found[name.replace("balanced_", "")] == fields for name, fields in taken.items())


def test_settings_of_the_choice():
    args = config()
    detr, other = adapter("detr"), adapter("conditional_detr")
    new = settled(args, detr, other)
    assert (new.method, new.kd_decay, args.method) == (["features", "kd_detr"], "linear", ["auto"])
    assert new.method_config["kd_detr"]["weights"]["general_class"] == 0
    assert settled(config(kd_decay="cosine"), detr, other).kd_decay == "cosine"
    named = config(method="qskd")
    assert settled(named, detr, other) is named


def test_trainer(tmp_path):
    args = config(output_dir=str(tmp_path))
    trainer = DistillationTrainer(
        zoo.build("rt_detr"),
        zoo.build("rt_detr"),
        args,
        train_dataset=Scenes(),
        processing_class=processor(),
    )
    assert list(trainer.model.methods) == trainer.args.method == ["features", "kd_detr"]
    assert args.method == ["auto"]  # the user's own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": ["auto", "kd_detr"]}, "`auto` chooses all methods of a run and can't be combined"),
        ({"method_config": {"temperature": 2}}, "`method` is auto .the default., which chooses the settings too"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
