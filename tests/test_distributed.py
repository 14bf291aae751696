"""Two processes (gloo) are one process with twice the batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
import zoo
from launching import finish, torchrun

WORKER = Path(__file__).with_name("distributed_worker.py")


def run(
    folder, processes: int, method: str, student: str, teacher: str, batch: int, every: int = 1
) -> tuple[dict, dict]:
    arguments = [str(WORKER), str(folder), method, student, teacher, str(batch), str(every)]
    finish(torchrun(processes, *arguments) if processes > 1 else [sys.executable, *arguments])
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


# Families whose own loss is that of one large batch; docs/scaling.md has the others
@pytest.mark.parametrize(
    ("method", "student", "teacher", "every"),
    [
        ("kd_detr", "conditional_detr", "deformable_detr_refine", 1),
        ("logit_kd", "dab-detr", "detr", 1),
        (
            "features",
            "conditional_detr",
            "deformable_detr_refine",
            2,
        ),  # projectors that a step in two leaves without a gradient
    ],
)
def test_two_processes_train_and_evaluate_as_one(tmp_path, method, student, teacher, every):
    one, one_weights = run(tmp_path / "one", 1, method, student, teacher, batch=4, every=every)
    two, two_weights = run(tmp_path / "two", 2, method, student, teacher, batch=2, every=every)
    taught = [step % every == 0 for step in range(3)]
    for logs in (one["logs"], two["logs"]):
        assert [any(name.startswith("kd_") and name != "kd_scale" for name in log) for log in logs] == taught
    for folder in ("one", "two"):  # drawn by process zero alone, of models that all processes hold
        assert [file.name for file in (tmp_path / folder / "sheets").iterdir()] == ["step_2.png"]
    numbers = [7, 7, 5]  # of images, on the first evaluation and on later ones; none of them even
    for first, second, number in zip(one["evaluations"], two["evaluations"], numbers, strict=True):
        assert first["eval_images"] == second["eval_images"] == list(range(number))
        assert first["eval_scores"] > 0
        for key in ("eval_map", "eval_mar_100", "eval_scores", "eval_boxes"):
            assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-4)
    assert one["streamed"] == two["streamed"]  # every image once, with its own labels
    assert [image_id for (image_id,), *_ in one["streamed"]] == list(range(12))
    assert one_weights.keys() == two_weights.keys()
    start = zoo.build(student).state_dict()
    assert (one_weights.keys() > start.keys()) == (method != "logit_kd")  # the others have projectors
    moved = max((one_weights[name] - value).abs().max() for name, value in start.items())
    assert moved > 1e-3  # a hundred times what may differ
    for name, value in one_weights.items():
        torch.testing.assert_close(value, two_weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_processes_evaluate_the_student_that_is_saved(tmp_path):
    """Each has the running statistics of its own last batches in its batch norms, and process 0's are saved."""
    two, weights = run(tmp_path, 2, "none", "rt_detr", "rt_detr", batch=2)
    alone = distributed_worker.build(str(tmp_path / "alone"), "none", "rt_detr", "rt_detr", batch=2)
    alone.student.load_state_dict(weights)
    alone.ema.copy_from_model()
    for key in ("eval_scores", "eval_boxes"):
        assert two["evaluations"][1][key] == pytest.approx(alone.evaluate()[key], rel=1e-6)
