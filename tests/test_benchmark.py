"""scripts/benchmark.py: that it measures, not how fast anything is. Its latency mode: test_latency.py."""

import argparse
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_detrkd.commands import benchmark

TINY = ["--student", str(benchmark.MODELS / "rt_detr_tiny_student.json"), "--batch_size", "2", "--image_size", "64"]
TINY += ["--teacher", str(benchmark.MODELS / "rt_detr_tiny_teacher.json"), "--objects", "3", "--rounds", "1"]


def test_paired(monkeypatch):
    """A warm-up of each, then medians of the seconds and of the ratios."""
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    now, slow, fast = [0.0], iter([100.0, 3.0, 8.0, 4.0]), iter([100.0, 1.0, 2.0, 4.0])

    def spend(seconds):
        now[0] += next(seconds)

    assert benchmark.paired(lambda: spend(slow), lambda: spend(fast), rounds=3) == (4, 2, 3)


def flops(function):
    """In the place of seconds, which depend on what else the machine does."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_step(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_seconds", flops)

    def in_this_process(arguments, method):
        return benchmark.memory(argparse.Namespace(**{**vars(arguments), "method": [method]}))[0]["peak_memory_MiB"]

    monkeypatch.setattr(benchmark, "peak_memory", in_this_process)
    path = tmp_path / "cost.json"
    results = benchmark.main(["step", *TINY, "--method", "kd_detr", "logit_kd", "--output", str(path)])
    assert json.loads(path.read_text()) == results
    none, *rows = results["rows"]
    assert none["method"] == "none" and [row["method"] for row in rows] == ["kd_detr", "logit_kd"]
    for row in rows:
        assert row["step_s"] > 0 and row["peak_memory_MiB"] > 0
        assert row["overhead"] == pytest.approx(row["step_s"] / row["parts_s"])  # of one round
        assert row["overhead"] >= 1 and row["cost"] > 1  # the teacher's pass, and the decoder passes of the method
    assert rows[0]["cost"] > rows[1]["cost"]  # kd_detr has decoder passes of its own, logit_kd none
    assert not {"output", "what"} & results["settings"].keys()  # nothing of where it was run


def test_decoder_passes_are_recorded_while_they_run():
    class Adapter:
        def replay(self, view, groups, **keywords):
            return [queries + 1 for queries in groups]

    adapter, queries = Adapter(), torch.ones(2, requires_grad=True)
    with benchmark.recorded_replays(adapter) as kept:
        (answer,) = adapter.replay(None, [queries], attentions=True)
    torch.testing.assert_close(answer, queries + 1)
    assert [[passed.requires_grad for passed in groups] for groups in kept] == [[False]]
    adapter.replay(None, [queries])
    assert len(kept) == 1


def test_task_loss():
    (row,) = benchmark.main(["task-loss", "--families", "detr", "--rounds", "1"])["rows"]
    assert row["speedup"] > 1  # else the two losses of the command would not even be equal
