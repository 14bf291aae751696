"""Two processes (gloo) are one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def run(folder, processes: int, method: str, student: str, teacher: str, batch: int) -> tuple[dict, dict]:
    command = [sys.executable]
    if processes > 1:
        # accelerate launch starts several processes on GPUs, and on CPUs only through MPI; torchrun is what it calls
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(WORKER), str(folder), method, student, teacher, str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


# transformers' RT-DETR losses divide by the boxes of their own process, so these families train alike but not equally.
@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [("kd_detr", "conditional_detr", "deformable_detr_refine"), ("logit_kd", "detr", "detr")],
)
def test_two_processes_train_and_evaluate_as_one(tmp_path, method, student, teacher):
    one, one_weights = run(tmp_path / "one", 1, method, student, teacher, batch=4)
    two, two_weights = run(tmp_path / "two", 2, method, student, teacher, batch=2)
    assert one["evaluations"][0] == two["evaluations"][0]
    for first, second in zip(one["evaluations"], two["evaluations"], strict=True):
        assert first == pytest.approx(second, abs=2e-3)
    assert any(value for value in one["evaluations"][0].values()), "nothing was found: the comparison says nothing"
    assert one_weights.keys() == two_weights.keys()
    for name, value in one_weights.items():
        torch.testing.assert_close(value, two_weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
