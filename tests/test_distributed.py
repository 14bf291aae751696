"""Two processes (gloo) are one process with twice the batch."""

from __future__ import annotations

import json
import os
import signal
import socket
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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(WORKER), str(folder), method, student, teacher, str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent)}
    worker = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = worker.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        raise
    assert worker.returncode == 0, printed[-3000:]
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


# transformers' RT-DETR losses divide by the boxes of their own process, so these families train alike but not equally.
@pytest.mark.parametrize(
    ("method", "student", "teacher"),
    [("kd_detr", "conditional_detr", "deformable_detr_refine"), ("logit_kd", "detr", "detr")],
)
def test_two_processes_train_and_evaluate_as_one(tmp_path, method, student, teacher):
    one, one_weights = run(tmp_path / "one", 1, method, student, teacher, batch=4)
    two, two_weights = run(tmp_path / "two", 2, method, student, teacher, batch=2)
    for folder in ("one", "two"):  # drawn by process zero alone, of models that all processes hold
        assert [file.name for file in (tmp_path / folder / "sheets").iterdir()] == ["step_2.png"]
    numbers = [7, 7, 5]  # of images, on the first evaluation and on later ones; none of them even
    for first, second, number in zip(one["evaluations"], two["evaluations"], numbers, strict=True):
        assert first["eval_images"] == second["eval_images"] == list(range(number))
        assert first["eval_scores"] > 0
        for key in ("eval_map", "eval_mar_100", "eval_scores", "eval_boxes"):
            assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-4)
    assert one_weights.keys() == two_weights.keys()
    for name, value in one_weights.items():
        torch.testing.assert_close(value, two_weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
