"""The configurations in scripts/recipes/accelerate/, started by accelerate launch as docs/scaling.md says, on CPU."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launching import finish, free_port
from test_commands import NAMES, QUICK, save
from transformers import AutoModelForObjectDetection

from hf_detrkd import DistillationConfig

ROOT = Path(__file__).parents[1]
CONFIGURATIONS = ROOT / "scripts" / "recipes" / "accelerate"


@pytest.fixture
def distilling(tmp_path) -> list[str]:
    """Flags of a run of tiny models, with checkpoints and the best model at the end."""
    teacher, student = save(tmp_path / "teacher", NAMES), save(tmp_path / "student", NAMES, decoder_layers=2)
    flags = ["--teacher_model_name_or_path", teacher, "--model_name_or_path", student, "--method", "kd_detr"]
    flags += ["--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "true"]
    return [*flags, "--logging_steps", "1", "--sheet_images", "0"]


def launch(configuration: str, *more: str) -> list[str]:
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGURATIONS / configuration),
    ]
    script = str(ROOT / "scripts" / "distill.py")
    options = [option for option in more if option.startswith("--machine") or option.startswith("--main")]
    return [*launcher, *options, script, *QUICK, *(option for option in more if option not in options)]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_one_machine(tmp_path, distilling):
    port = f"--main_process_port={free_port()}"
    finish(launch("ddp.yaml", port, *distilling, "--max_steps", "2", "--output_dir", str(tmp_path / "run")))
    settings = results(tmp_path / "run")["settings"]["DistillationConfig"]
    # 8 images in batches of 2 on two processes
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] == 1.0 and settings["bf16"] is False


@pytest.mark.slow
def test_bf16_and_a_sharded_teacher(tmp_path, distilling):
    """The teacher is measured before, in the precision of the run: accelerate has one for all."""
    port = f"--main_process_port={free_port()}"
    flags = ["--shard_teacher", "true", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    [printed] = finish(launch("bf16.yaml", port, *distilling, *flags))
    assert "The teacher is sharded over 2 processes" in printed
    result = results(tmp_path / "run")
    assert result["settings"]["DistillationConfig"]["bf16"] is True
    assert result["teacher"]["test"] and result["student"]["steps"] == 2


@pytest.mark.slow
def test_two_machines(tmp_path, distilling):
    """That share no disk; the second call resumes."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for _ in range(2):
        address = [f"--main_process_port={free_port()}", "--main_process_ip=127.0.0.1"]
        flags = [*distilling, "--max_steps", "3", "--save_on_each_node", "true", "--resume_from_checkpoint", "true"]
        for folder in folders:  # as where the first call was stopped
            shutil.rmtree(folder / "checkpoint-3", ignore_errors=True)
        finish(
            *(
                launch("multi_node.yaml", f"--machine_rank={rank}", *address, *flags, "--output_dir", str(folder))
                for rank, folder in enumerate(folders)
            )
        )
    first, second = (AutoModelForObjectDetection.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert results(folders[1])["student"]["resumed_from"] == str(folders[1] / "checkpoint-2")


@pytest.mark.parametrize("launched", ["bf16", "fp16", "no"])
def test_what_the_launcher_says_where_no_flag_does(monkeypatch, launched):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    args = DistillationConfig(output_dir="unused", use_cpu=True)
    assert (args.bf16, args.fp16, args.mixed_precision) == (launched == "bf16", launched == "fp16", launched)
    off = DistillationConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert (off.bf16, off.fp16, off.mixed_precision) == (False, False, "no")
    other = DistillationConfig(output_dir="unused", use_cpu=True, bf16=True)
    assert (other.bf16, other.fp16, other.mixed_precision) == (True, False, "bf16")
