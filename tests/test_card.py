"""The model card: what `results.json` has is in it, and nothing else."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files

import pytest
import zoo
from huggingface_hub import ModelCard
from PIL import Image
from scenes import Scenes, processor

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.methods import METHODS
from hf_detrkd.reporting.card import main, write_card
from hf_detrkd.reporting.recorded import class_names, dataset_of


def metrics(ap: float) -> dict[str, float]:
    names = {"map": ap, "map_50": ap + 0.2, "map_75": ap - 0.05, "map_small": math.nan, "mar_100": ap + 0.3}
    return {**names, "map_cat": ap, "mar_100_cat": ap + 0.1, "map_a|b": ap / 2, "mar_100_a|b": ap, "loss": 3.0}


def results(**changes) -> dict:
    """As `distill` writes them."""
    row = {"model_type": "rt_detr", "parameters": 2_250_000, "steps": 520, "train_seconds": 61.2, "resumed_from": None}
    config = {
        "num_train_epochs": 20.0,
        "max_steps": -1,
        "learning_rate": 4e-4,
        "seed": 3,
        "kd_weight": 3.0,
        "bf16": False,
    }
    config |= {"method": ["kd_detr"], "method_config": {"class_loss": "bernoulli"}, "hub_model_id": None}
    teacher = {"name_or_path": "runs/teacher", "parameters": 6_900_000, "validation": metrics(0.31)}
    return {
        "student": {**row, "method": "kd_detr", "validation": metrics(0.16), "test": metrics(0.17)},
        "twin": {**row, "method": "none", "validation": metrics(0.13), "test": metrics(0.12)},
        "teacher": {**teacher, "revision": None, "test": metrics(0.28)},
        "start": {"name_or_path": "runs/small", "revision": None},
        "dataset_on_hub": False,
        "data": {
            "images": {"train": 205, "validation": 87, "test": 72},
            "test_split": "test",
            "augmentation": {"flip": 0.5, "size": [160, 160]},
        },
        "settings": {
            "DataArguments": {"dataset_name": "../data/cells"},
            "ModelArguments": {"config_name": None, "image_size": 160},
            "DistillArguments": {"license": "mit"},
            "DistillationConfig": config,
        },
        "versions": {"torch": "2.15.0", "machine": "x86_64"},
        **changes,
    }


def card(folder, **changes) -> ModelCard:
    return ModelCard.load(write_card(folder, results(**changes), "anna/student"))


def test_model_index_has_the_numbers_of_the_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()))
    loaded = ModelCard.load(main([str(tmp_path), "--repo_id", "anna/student"]))
    written = json.loads((tmp_path / "results.json").read_text())["student"]["test"]
    index = {its.metric_type: its.metric_value for its in loaded.data.eval_results}
    assert index == {name: written[name] for name in ("map", "map_50", "map_75")}
    its = loaded.data.eval_results[0]
    assert (its.task_type, its.dataset_name, its.dataset_split) == ("object-detection", "cells", "test")


def test_metadata(tmp_path):
    data = card(tmp_path).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "object-detection", "mit")
    assert {"knowledge-distillation", "kd_detr", "rt_detr", "hf_detrkd", "generated_from_trainer"} <= set(data.tags)
    assert data.metrics == ["map"] and data.model_name == "student"
    # Local folders are no ids: the Hub would refuse them or, worse, link to a stranger's
    assert data.base_model is None and data.datasets is None


def test_hub_ids_are_linked_with_their_revision(tmp_path):
    hub = {"name_or_path": "org/big", "revision": "c0ffee", "parameters": 10, "test": metrics(0.4)}
    settings = results()["settings"] | {"DataArguments": {"dataset_name": "org/cells"}}
    start = {"name_or_path": "org/small", "revision": "0ddba11"}
    loaded = card(tmp_path, teacher=hub, start=start, dataset_on_hub=True, settings=settings)
    assert loaded.data.base_model == "org/small" and loaded.data.datasets == ["org/cells"]
    assert "[org/big](https://huggingface.co/org/big) at revision `c0ffee` (AP 40.0)" in loaded.text
    assert "[org/cells](https://huggingface.co/datasets/org/cells)" in loaded.text
    assert "[org/small](https://huggingface.co/org/small) at revision `0ddba11`" in loaded.text


def test_teacher_twin_and_student_side_by_side(tmp_path):
    text = re.sub(" +", " ", card(tmp_path).text)
    for row in ("| teacher | 28.0 |", "| twin | 12.0 |", "| student | 17.0 |", "| student - twin | +5.0 |"):
        assert row in text
    assert "| class | teacher | twin | student | AR100 |" in text and "| cat | 28.0 | 12.0 | 17.0 | 27.0 |" in text
    assert r"| a\|b | 14.0 | 6.0 | 8.5 | 17.0 |" in text
    assert "| parameters (M) | 6.90 | 2.25 |" in text and "of seed 3" in text
    assert "520 steps in 61 s on x86_64" in text and "| learning_rate | 0.0004 |" in text
    assert "max_steps" not in text and "nan" not in text and "None" not in text.replace("None:", "")


def test_a_missing_twin_is_said(tmp_path):
    text = card(tmp_path, twin=None).text
    assert "**No twin was trained**" in text and "student - twin" not in text


def test_cost_is_shown_where_it_was_measured_only(tmp_path):
    assert "FLOPs" not in card(tmp_path).text and "latency" not in card(tmp_path).text
    student = results()["student"] | {"flops": 3.5e9, "latency_ms": 12.25}
    text = re.sub(" +", " ", card(tmp_path, student=student).text)
    assert "| FLOPs (G) | - | 3.50 |" in text and "| latency (ms) | - | 12.25 |" in text
    assert "a median" not in text  # nothing is known of where
    teacher = results()["teacher"] | {"flops": 9e9, "latency_ms": 40.0}
    where = {"device": "Some CPU", "threads": 4, "load": 0.3}
    text = re.sub(" +", " ", card(tmp_path, student=student, teacher=teacher, environment=where).text)
    assert "| FLOPs (G) | 9.00 | 3.50 |" in text and "| latency (ms) | 40.00 | 12.25 |" in text
    assert "is a median, measured in turn before the training (device Some CPU, threads 4, load 0.3)" in text


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_cited(tmp_path, name):
    text = card(tmp_path, student=results()["student"] | {"method": f"{name}+mine"}).text
    paper = METHODS[name].paper
    assert "`mine`." in text and (paper is None or (paper.bibtex in text and f"arxiv.org/abs/{paper.arxiv}" in text))


def test_a_run_without_a_teacher(tmp_path):
    changes = results(teacher=None, twin=None)
    changes["model"] = changes.pop("student") | {"method": "none"}
    changes["settings"]["FinetuneConfig"] = changes["settings"].pop("DistillationConfig")
    loaded = ModelCard.load(write_card(tmp_path, changes, "anna/teacher"))
    assert "knowledge-distillation" not in loaded.data.tags and "without a teacher" in loaded.text
    assert "twin" not in loaded.text and "num_train_epochs" in loaded.text


def test_a_teacher_without_a_name(tmp_path):
    text = card(tmp_path, teacher=results()["teacher"] | {"name_or_path": ""}).text
    assert "by `kd_detr` from a teacher (AP 28.0)" in text and "``" not in text.replace("```", "")


def test_keywords_of_trainers_own_card(tmp_path):
    """Trainer's examples pass them; those that are no metadata of a model have no place in it."""
    arguments = DistillationConfig(str(tmp_path), method="none", use_cpu=True, ema_decay=0)
    trainer = DistillationTrainer(zoo.build("rt_detr"), args=arguments, processing_class=processor())
    words = {"finetuned_from": "org/small", "dataset_tags": "cppe-5", "tags": ["vision", "mine"], "language": "en"}
    trainer.create_model_card(**words, dataset="CPPE-5", dataset_args="a", tasks="object-detection", model_name="a/b")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["base_model"], data["datasets"], data["language"]) == ("org/small", ["cppe-5"], "en")
    assert "mine" in data["tags"]
    assert not {"finetuned_from", "dataset_tags", "dataset", "dataset_args", "tasks"} & data.keys()
    trainer.create_model_card(finetuned_from="org/small", base_model="org/other")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/other"


def test_the_card_has_the_numbers_of_the_checkpoint_that_was_loaded(tmp_path):
    """In training the last evaluation is of other weights where the best ones are loaded at the end."""
    trainer = DistillationTrainer(
        zoo.build("rt_detr"),
        args=DistillationConfig(
            str(tmp_path),
            method="none",
            use_cpu=True,
            load_best_model_at_end=True,
            save_strategy="steps",
            eval_strategy="steps",
        ),
        eval_dataset=Scenes(2),
        processing_class=processor(),
    )
    state = trainer.state
    state.log_history = [{"step": step, "eval_map": step / 10} for step in (2, 4, 6)]
    assert trainer._results()["student"]["validation"]["map"] == 0.6  # in training
    state.best_global_step, state.best_model_checkpoint = 2, "checkpoint-2"
    state.log_history.append({"step": 6, "train_runtime": 1.0})
    assert trainer._results()["student"]["validation"]["map"] == 0.2
    state.log_history.append({"step": 6, "eval_map": 0.25})  # evaluated again, after training
    assert trainer._results()["student"]["validation"]["map"] == 0.25


def test_epochs_that_do_not_count_are_left_out(tmp_path):
    changes = results()
    changes["settings"]["DistillationConfig"] |= {"max_steps": 500}
    text = card(tmp_path, **changes).text
    assert "max_steps" in text and "num_train_epochs" not in text


def test_nothing_is_claimed_where_nothing_was_measured(tmp_path):
    student = {"method": "logit_kd", "parameters": 10, "test": {}, "validation": {}}
    loaded = ModelCard.load(write_card(tmp_path, {"student": student}, "anna/student"))
    assert not loaded.data.eval_results and "Nothing was measured." in loaded.text


def test_pictures_that_are_there(tmp_path):
    assert "curves.png" not in card(tmp_path).text
    (tmp_path / "curves.png").write_bytes(b"")
    text = card(tmp_path).text
    assert "![Training curves](curves.png)" in text and "sheet.png" not in text


def test_classes_that_are_named_like_a_size():
    assert class_names({"map_small": 0.1, "mar_100_small": 0.2, "mar_100_cat": 0.3}) == ["cat"]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no results\.json"):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="no training"):
        write_card(tmp_path, {"teacher": {}})


def test_template_is_in_the_package():
    assert files("hf_detrkd.reporting").joinpath("card_template.md").is_file()


def test_quick_start_runs(tmp_path, monkeypatch, capsys):
    zoo.build("rt_detr").save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "image.jpg")
    text = ModelCard.load(write_card(tmp_path, results())).text  # the folder is the id until it is pushed
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    assert f'model="{tmp_path.as_posix()}"' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("threshold=0.5", "threshold=0.0"), {})
    assert "xmin" in capsys.readouterr().out


def test_how_the_training_began(tmp_path):
    def began(start=None, model=None, **distill) -> str:
        groups = {"ModelArguments": model or {}, "DistillArguments": {"inherit_from_teacher": False} | distill}
        return card(tmp_path, start=start, settings=results()["settings"] | groups).text

    place, drawn = {"name_or_path": "runs/small", "revision": None}, {"config_name": "s.json"}
    fits = "and the teacher's weights wherever name and shape agree."
    assert "Started from `runs/small`." in began(place)
    assert f"Started from `runs/small` {fits}" in began(place, inherit_from_teacher=True)
    assert "Started from random weights." in began(None, drawn)
    assert f"Started from random weights {fits}" in began(None, drawn, inherit_from_teacher=True)
    text = began(None, student_backbone="resnet18", student_backbone_weights="pretrained", student_decoder_layers=3)
    assert "Made from the teacher, with its weights wherever they fit." in text
    text = re.sub(" +", " ", text)
    for row in ("student_backbone | resnet18", "student_backbone_weights | pretrained", "student_decoder_layers | 3"):
        assert f"| {row} |" in text


@pytest.mark.parametrize(("best", "said"), [(True, "87 to choose the best step."), (False, "87 to validate.")])
def test_what_the_validation_split_was_for(tmp_path, best, said):
    settings = results()["settings"]
    settings["DistillationConfig"]["load_best_model_at_end"] = best
    assert f"205 images to train, {said}" in card(tmp_path, settings=settings).text


def test_the_number_of_images_measured(tmp_path):
    """Where the folder's validation split is the test, a share of train was held out for validation."""
    data = results()["data"] | {"test_split": "validation"}
    assert "the validation split of `cells` (72 images)" in card(tmp_path, data=data).text


def test_a_test_split_without_labels(tmp_path):
    changes = results()
    changes["student"]["test"], changes["teacher"]["test"], changes["twin"]["test"] = {"loss": 1.0}, {}, {"loss": 1.0}
    loaded = card(tmp_path, **changes)
    text = re.sub(" +", " ", loaded.text)
    assert "the validation split of `cells` (87 images)" in text and "| student | 16.0 |" in text
    assert loaded.data.eval_results[0].dataset_split == "validation"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("shapes:train=8", "shapes"),
        ("data/2024:05", "2024:05"),
        (r"C:\data\cells", "cells"),
        ("C:/data/cells/", "cells"),
    ],
)
def test_names_of_data_sets(place, name):
    assert dataset_of({"settings": {"DataArguments": {"dataset_name": place}}}) == (name, None)
