"""Watching a run: scalars and sheets of detections in the trackers, and sheets as files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from PIL import Image
from scenes import Scenes, processor
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from transformers.integrations import TrackioCallback, WandbCallback

from hf_detrkd import DistillationConfig, DistillationTrainer, sheets
from hf_detrkd.callbacks import StampSeconds
from hf_detrkd.reporting.sheet import find, spread
from hf_detrkd.sheets import DrawSheets, show

VALIDATION = Scenes(7, seed=1)


def trainer(folder, *, eval_dataset=VALIDATION, **settings) -> DistillationTrainer:
    """A run of four steps, logged at every one, with three images on a sheet."""
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 4, "sheet_images": 3}
    method = {"method": "logit_kd", "learning_rate": 1e-2, "seed": 7}
    args = DistillationConfig(output_dir=str(folder), **{**quiet, **sizes, **method, **settings})
    student = zoo.build("rt_detr")
    return DistillationTrainer(
        student,
        None if args.method == ["none"] else zoo.build("conditional_detr", seed=3),
        args,
        train_dataset=Scenes(),
        eval_dataset=eval_dataset,
        processing_class=processor(student),
    )


def events(folder: Path) -> EventAccumulator:
    """All that tensorboard shows of a run."""
    (file,) = folder.glob("runs/*/events.out.tfevents.*")
    return EventAccumulator(str(file), size_guidance={SCALARS: 0, IMAGES: 0}).Reload()


def test_tensorboard_has_every_distillation_term_and_the_sheets(tmp_path):
    run = trainer(tmp_path, report_to="tensorboard", sheet_steps=2, gradient_share_steps=2, eval_strategy="epoch")
    run.train()
    shown = events(tmp_path)
    for term in run.model.methods["logit_kd"].config.weights:
        values = [(event.step, event.value) for event in shown.Scalars(f"train/kd_{term}")]
        logged = [(log["step"], log[f"kd_{term}"]) for log in run.state.log_history if "loss" in log]
        assert values == [(step, pytest.approx(value)) for step, value in logged] and len(values) == 4
        assert shown.Scalars(f"train/gradient_share_{term}")
    names = {"train/detection_loss", "train/kd_scale", "train/gradient_share_kd", "eval/map", "eval/map_50"}
    assert names <= set(shown.Tags()["scalars"])
    images = shown.Images("sheet")
    assert [image.step for image in images] == [2, 4]
    with Image.open(tmp_path / "sheets" / "step_2.png") as picture:
        assert (images[0].width, images[0].height) == picture.size


def test_a_sheet_shows_the_teacher_and_the_average_as_evaluated(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sheets, "draw_sheet", lambda rows, path, class_names: drawn.append((path, rows)))
    monkeypatch.setattr(sheets, "show", lambda *_: None)
    run = trainer(tmp_path, sheet_steps=4)
    run.train()
    ((path, rows),) = drawn
    assert path == tmp_path / "sheets" / "step_4.png"
    assert [list(row.detections) for row in rows] == [["teacher", "student, step 4"]] * 3
    items = spread(run.eval_dataset, 3)
    # After training the student in memory is its average
    for title, model in (("teacher", run.teacher), ("student, step 4", run.student)):
        for row, found in zip(rows, find(items, model, run.processing_class, run.eval_dataset.id2label), strict=True):
            for name, values in found.items():
                torch.testing.assert_close(row.detections[title][name], values)
    assert not run.teacher.training


def test_drawing_changes_nothing_of_the_training(tmp_path):
    states = []
    for steps in (0, 1):
        run = trainer(tmp_path / str(steps), sheet_steps=steps, max_steps=3)
        run.train()
        states.append(run.student.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not (tmp_path / "0" / "sheets").exists()
    assert [file.name for file in sorted((tmp_path / "1" / "sheets").iterdir())] == [f"step_{i}.png" for i in (1, 2, 3)]


@pytest.mark.parametrize("off", [{}, {"sheet_steps": 1, "sheet_images": 0}])
def test_off_there_is_nothing_to_call(tmp_path, off):
    run = trainer(tmp_path, **off)
    assert not any(isinstance(callback, DrawSheets) for callback in run.callback_handler.callbacks)


def test_the_twin_has_a_column_of_its_own(tmp_path):
    trainer(tmp_path, method="none", sheet_steps=4).train()
    with Image.open(tmp_path / "sheets" / "step_4.png") as picture:
        # Two columns, ground truth and student, and a legend that may be wider
        assert 2 * 432 <= picture.width < 2.5 * 432


def test_only_process_zero_draws(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sheets, "draw_sheet", lambda *_, **__: drawn.append(1))
    student = (zoo.build("rt_detr"), processor())
    callback = DrawSheets(Scenes(3), student, {"teacher": student}, every=1, number=2)
    args = SimpleNamespace(output_dir=str(tmp_path))
    for zero in (False, True):
        state = SimpleNamespace(global_step=1, is_world_process_zero=zero)
        callback.on_train_begin(args, state, None)
        callback.on_step_end(args, state, None)
        assert len(drawn) == zero


def test_a_sheet_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheets, "draw_sheet", full)
    warnings = []
    monkeypatch.setattr(sheets.logger, "warning", warnings.append)
    run = trainer(tmp_path, sheet_steps=4)
    run.train()
    assert run.state.global_step == 4
    assert any("step_4.png could not be written: [Errno 28]" in warning for warning in warnings)


@pytest.mark.parametrize(("tracker", "package"), [(TrackioCallback, "trackio"), (WandbCallback, "wandb")])
def test_trackers_that_take_pictures(tmp_path, monkeypatch, tracker, package):
    """Stands in for packages that needn't be installed; trackio itself is in the next test."""
    logged = []
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(log=logged.append, Image=lambda path: ("image", path)))
    show(tmp_path / "step_5.png", 5, [StampSeconds(), object.__new__(tracker)])
    assert logged == [{"sheet": ("image", str(tmp_path / "step_5.png")), "train/global_step": 5}]


def test_trackio_has_the_terms_and_the_sheets(tmp_path):
    """In a process of its own: trackio reads where to write when it is imported."""
    pytest.importorskip("trackio", reason="pip install hf_detrkd[trackers]")
    code = f"""
from test_watching import trainer
trainer({str(tmp_path / "run")!r}, report_to="trackio", project="watching", run_name="run", sheet_steps=2).train()
from trackio.sqlite_storage import SQLiteStorage
logs = SQLiteStorage.get_logs("watching", "run")
assert {{"train/kd_class", "train/kd_giou", "train/kd_l1", "train/detection_loss"}} <= set().union(*logs), logs
assert [log["train/global_step"] for log in logs if "sheet" in log] == [2, 4]
"""
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **place}, timeout=280)
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2


def test_seconds_go_on_after_a_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path, **settings)
    assert "seconds" not in first.evaluate()
    assert "seconds" not in first.state.log_history[-1]
    first.train()
    seconds = [log["seconds"] for log in first.state.log_history]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    stamp = StampSeconds()
    state = SimpleNamespace(log_history=[{"step": 1, "seconds": 1000.0}, {"step": 2}])
    stamp.on_train_begin(None, state, None)
    stamp.on_log(None, state, None)
    assert 1000 <= state.log_history[-1]["seconds"] < 1001


def test_sheets_without_a_data_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`sheet_steps` is 5, but sheets are drawn on a DetectionDataset.*NoneType"):
        trainer(tmp_path, eval_dataset=None, sheet_steps=5)
    for name in ("sheet_steps", "sheet_images"):
        with pytest.raises(ValueError, match=f"`{name}` is -1; it must be 0 or more"):
            trainer(tmp_path, **{name: -1})
