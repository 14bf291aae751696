"""The command line: what a user types, and what lies in the output folder afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from scenes import processor
from transformers import AutoModelForObjectDetection

from hf_detrkd import DetectionDataset
from hf_detrkd.commands import distill, evaluate, finetune, resuming, summarize
from hf_detrkd.commands.gate import finds_nothing, no_better
from hf_detrkd.commands.resuming import checkpoint_to_resume, found_by_all, last_complete_checkpoint, same_settings

SHAPES = f"shapes:train=8,validation=3,test=3,size={zoo.SIZE}"
NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
QUICK = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", "2"]
QUICK += ["--per_device_eval_batch_size", "2", "--dataset_name", SHAPES, "--save_strategy", "steps"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def save(folder: Path, names: list[str], **overrides) -> str:
    """A tiny detector of these classes with its image processor."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = zoo.build("rt_detr", classes=len(names), **overrides)
    model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def test_finetune_distill_evaluate(tmp_path, capsys):
    config = tmp_path / "config.json"
    zoo.config("rt_detr", classes=2).to_json_file(config)
    teacher = str(tmp_path / "teacher")
    finetune.main(
        [
            "--config_name",
            str(config),
            "--image_size",
            str(zoo.SIZE),
            "--output_dir",
            teacher,
            "--max_steps",
            "2",
            *QUICK,
        ]
    )
    for name in ("sheet.png", "report.html"):
        assert Path(teacher, name).stat().st_size > 0
    trained = AutoModelForObjectDetection.from_pretrained(teacher)
    assert list(trained.config.id2label.values()) == NAMES  # the data set's classes, not the config's

    # another class list: two classes the data set doesn't have, the rest in another order
    student = save(tmp_path / "student", NAMES, decoder_layers=2)
    other = save(tmp_path / "other_teacher", ["hexagon", *reversed(NAMES), "spiral"])
    output = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: kd_detr\nmethod_config: {general_points: 4}\nwith_twin: true\nmax_steps: 100\n")
    arguments = ["--config", str(recipe), "--teacher_model_name_or_path", other, "--model_name_or_path", student]
    capsys.readouterr()
    results = distill.main(
        [*arguments, "--output_dir", str(output), "--max_steps", "2", "--logging_steps", "1", *QUICK]
    )
    printed = capsys.readouterr().out
    assert "twin" in printed and "student" in printed and "specific_l1" in printed
    assert f"written to {output}: model, results.json, report.html, curves.png, sheet.png, README.md\n" in printed
    assert "WARNING: the teacher has AP 0." in printed  # it is not trained

    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(results, default=str))
    assert results["student"]["method"] == "kd_detr" and results["twin"]["method"] == "none"
    assert results["student"]["steps"] == results["twin"]["steps"] == 2  # the flag overrides the recipe
    assert set(results["teacher"]["test"]) >= {"map", "map_50"}
    assert results["label_map"][0] == ("0 circle", "6 circle", "") and len(results["label_map"]) == 8
    assert not (output / "unfinished.json").exists()
    for name in (
        "curves.png",
        "sheet.png",
        "report.html",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ):
        assert (output / name).stat().st_size > 0
    assert (output / "twin" / "model.safetensors").exists()
    saved = AutoModelForObjectDetection.from_pretrained(output)
    assert list(saved.config.id2label.values()) == NAMES

    measured = evaluate.main(
        ["--model_name_or_path", str(output), "--dataset_name", SHAPES, "--num_workers", "0", "--batch_size", "2"]
    )
    for name, value in measured["metrics"].items():
        assert value == pytest.approx(results["student"]["test"][name], abs=1e-4)

    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        distill.main([*arguments, "--output_dir", str(output), *QUICK])


def test_only_files_that_are_there_are_announced(tmp_path, capsys):
    """A run shorter than `logging_steps` has logged no curve."""
    student = save(tmp_path / "student", NAMES, decoder_layers=2)
    flags = [
        "--model_name_or_path",
        student,
        "--output_dir",
        str(tmp_path / "run"),
        "--max_steps",
        "1",
        "--sheet_images",
        "0",
    ]
    finetune.main([*flags, *QUICK])
    assert not (tmp_path / "run" / "curves.png").exists()
    assert capsys.readouterr().out.rstrip().endswith(": model, results.json, report.html, README.md")


def test_a_run_can_be_watched_while_it_trains(tmp_path, monkeypatch):
    """From the first step on its folder says what it is; the twin has a name of its own in the trackers."""
    seen = []
    train = distill.train

    def spy(model, args, *rest):
        seen.append((args.run_name, json.loads((tmp_path / "run" / "unfinished.json").read_text())))
        assert not (tmp_path / "run" / "trainer_state.json").exists() or len(seen) == 2  # an earlier run's is gone
        return train(model, args, *rest)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trainer_state.json").write_text('{"global_step": 9, "max_steps": 9, "log_history": []}')
    monkeypatch.setattr(distill, "train", spy)
    flags = ["--teacher_model_name_or_path", save(tmp_path / "teacher", NAMES), "--method", "auto"]
    flags += ["--model_name_or_path", save(tmp_path / "student", NAMES, decoder_layers=2), "--with_twin", "true"]
    flags += ["--max_steps", "1", "--sheet_images", "0", "--run_name", "mine", "--output_dir", str(tmp_path / "run")]
    distill.main([*flags, *QUICK])
    (name, first), (twin_name, second) = seen
    assert (name, twin_name) == ("mine", "mine-twin")
    assert first["student"] is None and first["teacher"]["test"] and first["versions"] and first["label_map"]
    assert first["settings"]["DistillationConfig"]["method"] == ["features", "kd_detr"]  # what auto chose
    assert second["student"]["test"] and second["twin"] is None


def test_twin_and_student_start_alike_and_see_the_same_data(tmp_path, monkeypatch):
    student = save(tmp_path / "student", NAMES, decoder_layers=2)
    started, seen = [], []
    train, read = distill.train, DetectionDataset.__getitem__

    def recorded(self, index):
        if self.augmentation is not None:  # the training split
            seen[-1].append((index, self.epoch))
        return read(self, index)

    def spy(model, *rest):
        started.append({name: value.clone() for name, value in model.state_dict().items()})
        seen.append([])
        return train(model, *rest)

    monkeypatch.setattr(DetectionDataset, "__getitem__", recorded)
    monkeypatch.setattr(distill, "train", spy)
    flags = ["--teacher_model_name_or_path", save(tmp_path / "teacher", NAMES), "--model_name_or_path", student]
    flags += ["--method", "logit_kd", "--with_twin", "true", "--max_steps", "6", "--sheet_images", "0"]
    distill.main([*flags, "--output_dir", str(tmp_path / "run"), *QUICK])
    assert started[0].keys() == started[1].keys()
    assert all(torch.equal(started[0][name], started[1][name]) for name in started[0])
    assert seen[0] == seen[1]
    assert {epoch for _, epoch in seen[0]} == {0, 1}  # 4 steps an epoch: the augmentation moves on


def test_the_teachers_gate():
    assert finds_nothing({"map": 0.01}) is None and no_better(0.2, 0.1) is None
    assert "AP 0.4 on the validation split: there is nothing to learn from it" in finds_nothing({"map": 0.004})
    assert "no better than the twin, AP 10.0 and 10.0" in no_better(0.1, 0.1)


def test_resume_choices(tmp_path):
    assert checkpoint_to_resume(None, tmp_path) is None
    assert checkpoint_to_resume("true", tmp_path) is None
    for step, complete in ((2, True), (10, True), (12, False)):  # 12 was cut off while it was written
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume("true", tmp_path) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume("somewhere/checkpoint-1", tmp_path) == "somewhere/checkpoint-1"
    assert checkpoint_to_resume("false", tmp_path) is None
    with pytest.raises(ValueError, match="earlier run"):
        checkpoint_to_resume(None, tmp_path)
    (tmp_path / "checkpoint-best").mkdir()  # somebody's own
    (tmp_path / "checkpoint-best" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def pair(tmp_path) -> list[str]:
    """The flags of a short run of one step."""
    flags = ["--teacher_model_name_or_path", save(tmp_path / "teacher", NAMES), "--method", "logit_kd"]
    flags += ["--model_name_or_path", save(tmp_path / "student", NAMES, decoder_layers=2), "--max_steps", "1"]
    return [*flags, "--sheet_images", "0", "--evaluate_teacher", "false", "--output_dir", str(tmp_path / "run"), *QUICK]


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    """A twin of other settings would be none; what changes no result may differ, and the twin may come later."""
    flags = [*pair(tmp_path), "--resume_from_checkpoint", "true"]
    distill.main(flags)
    others = ["--learning_rate", "1e-5", "--kd_weight", "7", "--flip", "0", "--with_twin", "true"]
    with pytest.raises(
        ValueError,
        match=r"run was begun with other settings: flip 0\.5 -> 0\.0; kd_weight 1\.0 -> 7\.0; learning_rate 0\.0001 -> 1e-05\. "
        r"Pass those of the first run, or choose another --output_dir",
    ):
        distill.main([*flags, *others])
    assert not (tmp_path / "run" / "twin").exists()
    assert distill.main([*flags, "--with_twin", "true", "--logging_steps", "1"])["twin"]["test"]


def test_which_settings_may_change_before_a_resume(tmp_path):
    def now(**changed) -> dict:
        return {"ModelArguments": {"token": None, "image_size": None}, "FinetuneConfig": {"seed": 1} | changed}

    checkpoint = str(tmp_path / "checkpoint-2")
    same_settings(None, now())
    same_settings(checkpoint, now())  # a run of an older version recorded nothing before its end
    (tmp_path / "results.json").write_text(json.dumps({"settings": now(older=1, run_name="a", method=("none",))}))
    same_settings(checkpoint, now(newer=2, run_name="b", method=["none"]) | {"DistillArguments": {"with_twin": True}})
    (tmp_path / "results.json").write_text(json.dumps({"settings": now(accelerator_config={"dispatch_batches": None})}))
    same_settings(checkpoint, now(accelerator_config={"dispatch_batches": False}))  # the same for data with a length
    with pytest.raises(ValueError, match=r"other settings: seed 1 -> 2\. Pass"):
        same_settings(checkpoint, now(seed=2))
    for begun, later, named in (
        (None, {"weights": {"l1": 3}}, r"method_config\.weights\.l1 None -> 3"),
        ({"weights": {"l1": 3}}, None, r"method_config\.weights\.l1 3 -> None"),
        ({"weights": {"l1": 3}}, {"weights": {"l1": 3, "giou": 2}}, r"method_config\.weights\.giou None -> 2"),
    ):
        (tmp_path / "results.json").write_text(json.dumps({"settings": now(method_config=begun)}))
        with pytest.raises(ValueError, match=rf"other settings: {named}\. Pass"):
            same_settings(checkpoint, now(method_config=later))
    (tmp_path / "results.json").write_text(json.dumps({"settings": now(lr_scheduler_kwargs={"min_lr": 1})}))
    with pytest.raises(
        ValueError, match=r"lr_scheduler_kwargs\.min_lr 1 -> None; lr_scheduler_kwargs\.min_lr_rate None -> 1"
    ):
        same_settings(checkpoint, now(lr_scheduler_kwargs={"min_lr_rate": 1}))
    (tmp_path / "unfinished.json").write_text(json.dumps({"settings": now(seed=2)}))  # which is newer
    same_settings(checkpoint, now(seed=2))


def test_a_run_begun_anew_leaves_nothing_of_the_one_before(tmp_path):
    """A later `true` would go on from the older run's checkpoint, which has more steps; the twin's curve would be drawn."""
    output, flags = tmp_path / "run", pair(tmp_path)
    for folder in (output, output / "twin"):
        (folder / "checkpoint-9").mkdir(parents=True)
        for place in (folder, folder / "checkpoint-9"):
            (place / "trainer_state.json").write_text('{"global_step": 9, "max_steps": 9, "log_history": []}')
    (output / "checkpoint-12").mkdir()  # incomplete
    (output / "sheets").mkdir()
    (output / "sheets" / "step_9.png").touch()
    (output / "results.json").write_text("{}")
    results = distill.main([*flags, "--resume_from_checkpoint", "false"])
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-1"]
    assert results["student"]["steps"] == 1 and not (output / "twin").exists() and not (output / "sheets").exists()


def test_a_finished_run_is_not_overwritten(tmp_path, monkeypatch):
    flags = pair(tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    (output / "results.json").write_text('{"student": {"steps": 3}}')
    for wish in ([], ["--resume_from_checkpoint", "true"]):
        with pytest.raises(ValueError, match=r"run has a finished run and no checkpoint to go on from.*--output_dir"):
            distill.main([*flags, *wish])
    with pytest.raises(ValueError, match=r"of the teacher alone would replace.*--output_dir"):
        distill.main([*flags, "--only_teacher", "true", "--resume_from_checkpoint", "false"])
    (output / "unfinished.json").write_text("{}")  # begun anew, and stopped before its first checkpoint
    assert checkpoint_to_resume(None, output) is None
    (output / "unfinished.json").unlink()
    (output / "results.json").write_text('{"teacher": {}}')  # of --only_teacher
    assert checkpoint_to_resume(None, output) is None


def test_flags_that_a_student_made_from_the_teacher_would_ignore(tmp_path):
    flags = ["--teacher_model_name_or_path", save(tmp_path / "teacher", NAMES), "--student_decoder_layers", "2"]
    flags += ["--output_dir", str(tmp_path / "run"), *QUICK]
    for more in (["--backbone_weights", "nowhere.safetensors"], ["--inherit_from_teacher", "true"]):
        with pytest.raises(ValueError, match=rf"{more[0]} .*--student_backbone_weights"):
            distill.main([*flags, *more])


def test_a_method_s_typo_is_found_before_the_teacher_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "evaluate_detector", None)
    flags = [*pair(tmp_path), "--evaluate_teacher", "true"]
    for more, message in (
        (["--method", "logit_dk"], "Did you mean 'logit_kd'"),
        (["--method_config", '{"temprature": 2}'], "temprature"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.main([*flags, *more])


def test_only_one_process_says_and_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(evaluate, "evaluate_detector", lambda *_, **__: {"map": 0.5})
    flags = ["--model_name_or_path", save(tmp_path / "model", NAMES), "--dataset_name", SHAPES]
    capsys.readouterr()
    results = evaluate.main([*flags, "--output", str(tmp_path / "results.json")])
    assert results["metrics"] == {"map": 0.5} and not (tmp_path / "results.json").exists()
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"--config_name .*trained detector"):
        evaluate.main([*flags, "--config_name", "s.json"])


@pytest.mark.parametrize(
    "flags",
    [["--teacher_model_name_or_path", "t"], ["--kd_weight", "3"], ["--method_config", '{"temperature": 2}']],
)
def test_finetune_takes_no_flags_of_distillation(tmp_path, flags):
    with pytest.raises(ValueError, match=rf"`{flags[0][2:]}` .*finetune has no teacher.*distill\.py"):
        finetune.main(["--model_name_or_path", "m", "--output_dir", str(tmp_path), *QUICK, *flags])


def test_processes_resume_from_the_same_step(monkeypatch):
    assert found_by_all("a/checkpoint-2") == "a/checkpoint-2" and found_by_all(None) is None
    monkeypatch.setattr(resuming, "gather_object", lambda own: [*own, "b/checkpoint-2"])
    assert found_by_all("a/checkpoint-2") == "a/checkpoint-2"
    for own in (None, "a/checkpoint-4"):
        with pytest.raises(ValueError, match=f"different checkpoints.*{own}, b/checkpoint-2.*--save_on_each_node"):
            found_by_all(own)


def test_killed_run_resumes_to_the_same_parameters(tmp_path):
    """kill -9 in mid-epoch (4 steps an epoch, checkpoint at 2), through accelerate launch."""
    teacher, student = save(tmp_path / "teacher", NAMES), save(tmp_path / "student", NAMES, decoder_layers=2)
    script = Path(__file__).parents[1] / "scripts" / "distill.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(script), *QUICK]
    command += ["--teacher_model_name_or_path", teacher, "--model_name_or_path", student, "--method", "logit_kd"]
    command += ["--max_steps", "7", "--save_steps", "2", "--sheet_images", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder: Path, *more: str) -> subprocess.Popen:
        arguments = [*command, "--output_dir", str(folder), *more]
        return subprocess.Popen(
            arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=280) == 0, whole.stderr.read().decode()[-2000:]
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 200
    while last_complete_checkpoint(tmp_path / "killed") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert last_complete_checkpoint(tmp_path / "killed") is not None
    resumed = start(tmp_path / "killed", "--resume_from_checkpoint", "true")
    assert resumed.wait(timeout=280) == 0, resumed.stderr.read().decode()[-2000:]
    states = [AutoModelForObjectDetection.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed")]
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different


def test_summary_of_seeds(tmp_path):
    def run(seed: int, student: float, twin: float, resumed: str | None) -> str:
        def row(points: float, seconds: float) -> dict:
            test = dict.fromkeys(summarize.METRICS, points / 100)
            return {
                "method": "kd_detr",
                "parameters": 10,
                "steps": 5,
                "train_seconds": seconds,
                "resumed_from": resumed,
                "test": test,
            }

        result = {
            "student": row(student, 30.0),
            "twin": row(twin, 20.0),
            "teacher": {"parameters": 40, "test": {"map": 0.5}},
            "data": {"test_split": "validation"},
            "settings": {
                "DistillationConfig": {"seed": seed, "output_dir": str(seed)},
                "DataArguments": {"dataset_name": "set"},
            },
            "versions": {},
        }
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps(result))
        return str(path)

    paths = [run(0, 20.0, 15.0, "checkpoint-5"), run(1, 22.0, 18.0, None)]
    summary = summarize.main([*paths, "--output", str(tmp_path / "summary")])
    assert summary["gain"]["map"] == pytest.approx([5.0, 4.0])
    assert summary["time_ratio"] == pytest.approx(1.5)  # of the run that wasn't resumed
    text = (tmp_path / "summary.md").read_text()
    assert "21.0 ± 1.4" in text and "+4.5 (+4.0 to +5.0)" in text and "seeds 0, 1" in text
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 5
    assert "5 steps, set, validation split" in " ".join(text.split())


def test_a_summary_is_of_one_recipe(tmp_path):
    row = {"method": "kd_detr", "parameters": 10, "steps": 5, "resumed_from": None, "test": {"map": 0.5}}
    config = {"seed": 0, "learning_rate": 0.1}
    good = {"student": row, "twin": row, "teacher": {"parameters": 40, "test": {"map": 0.5}}, "versions": {}}
    good["settings"] = {"DistillationConfig": config, "DataArguments": {"dataset_name": "set"}}

    def refused(**changes) -> str:
        paths = [tmp_path / name for name in ("first.json", "second.json")]
        for path, run in zip(paths, (good, good | changes), strict=True):
            path.write_text(json.dumps(run))
        with pytest.raises(ValueError) as error:
            summarize.main([str(path) for path in paths])
        return str(error.value)

    assert "have the seeds [0, 0]: a run that counts twice" in refused()
    seed = {"settings": {**good["settings"], "DistillationConfig": config | {"seed": 1}}}
    assert "student.method ('kd_detr', 'drkd')" in refused(student=row | {"method": "drkd"}, **seed)
    other = {**good["settings"], "DistillationConfig": {"seed": 1, "learning_rate": 0.2}}
    assert "settings.DistillationConfig.learning_rate (0.1, 0.2)" in refused(settings=other)
    tuned = tmp_path / "finetune.json"
    tuned.write_text(json.dumps({"model": row}))
    with pytest.raises(ValueError, match=r"no student, no twin or no teacher: run distill.py with --with_twin true"):
        summarize.main([str(tuned)])
