"""The lines a run prints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hf_detrkd.progress import DistillationPrinter, DistillationProgress, log_line

TRAINING = {
    "loss": 12.345678,
    "detection_loss": 8.5,
    "grad_norm": 3.14159,
    "learning_rate": 1e-4,
    "kd_class": 0.123456,
    "kd_l1": 0.5,
    "gradient_share_kd": 0.256,
    "epoch": 0.1,
}


def test_training_line():
    assert log_line(TRAINING, 50, 1000) == (
        "step 50/1000 | loss 12.35 | detection 8.5 | kd: class 0.1235  l1 0.5 | kd share of gradient 26 % | grad 3.14 | "
        "lr 0.0001"
    )


def test_twin_line():
    """Without a teacher there is nothing of distillation in it."""
    line = log_line({"loss": 2.0, "detection_loss": 2.0, "learning_rate": 5e-5}, 1, 2)
    assert line == "step 1/2 | loss 2 | detection 2 | lr 5e-05"


def test_evaluation_line():
    logs = {"eval_map": 0.4567, "eval_map_50": 0.7, "eval_map_75": 0.5, "eval_loss": 1.25}
    assert log_line(logs, 5, 10) == "step 5/10 | evaluation | AP 45.7  AP50 70.0  AP75 50.0 | loss 1.25"
    del logs["eval_loss"], logs["eval_map_75"]  # metrics of one's own need not have them
    assert log_line(logs, 5, 10) == "step 5/10 | evaluation | AP 45.7  AP50 70.0"


@pytest.mark.parametrize("logs", [{}, {"train_runtime": 3.0}, {"test_map": 0.5}])
def test_no_line(logs):
    assert log_line(logs, 1, 2) == ""


def test_printer(capsys):
    """Only the main process, only where there is something to say, and no bar."""
    state = SimpleNamespace(global_step=50, max_steps=1000, is_world_process_zero=True)
    printer = DistillationPrinter()
    printer.on_train_begin(None, state, None)
    printer.on_log(None, state, None, logs=TRAINING)
    printer.on_log(None, state, None, logs={"train_runtime": 3.0})
    state.is_world_process_zero = False
    printer.on_log(None, state, None, logs=TRAINING)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [log_line(TRAINING, 50, 1000)]
    assert printed.err == ""


def test_progress_bar_shows_the_same_line(capsys):
    state = SimpleNamespace(global_step=1, max_steps=3, is_world_process_zero=True)
    bar = DistillationProgress()
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs=TRAINING)
    bar.on_train_end(None, state, None)
    assert log_line(TRAINING, 1, 3) in capsys.readouterr().out
