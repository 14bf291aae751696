"""Run by `test_sharding.py` on two processes: a teacher that is sharded, beside one that isn't; losses of a batch in two parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import zoo
from scenes import Scenes, processor
from torch import distributed

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.families import adapter_for
from hf_detrkd.losses.detection import task_loss
from hf_detrkd.sharding import held

TEACHER = "deformable_detr_refine"


def train(folder: Path, shard: bool, resume: str | None = None, seed: int = 3) -> dict:
    """Three steps with a checkpoint after each; what they came to."""
    student, teacher = zoo.build("conditional_detr"), zoo.build(TEACHER, seed=seed)
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=DistillationConfig(
            output_dir=str(folder),
            method="kd_detr",
            method_config={"general_points": 4},
            shard_teacher=shard,
            per_device_train_batch_size=2,
            max_steps=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="steps",
            save_steps=1,
            logging_steps=1,
            gradient_share_steps=0,
            sheet_steps=3,
            sheet_images=2,
            seed=7,
        ),
        train_dataset=Scenes(12),
        eval_dataset=Scenes(2, seed=1),
        processing_class=processor(student),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "weights": trainer.student.state_dict(),
        "held": held(trainer.teacher),
        "given": held(teacher),
        "results": trainer._results()["teacher"]["parameters"],
    }


def task_losses(images: slice) -> dict[str, float]:
    """By name of the model, the task loss of some of four images."""
    inputs = {name: value[images] for name, value in zoo.batch(size=4, targets=(3, 0, 1, 1)).items()}
    losses = {}
    for name in zoo.NAMES:
        adapter = adapter_for(zoo.build(name).eval())
        with torch.no_grad(), task_loss(adapter, per_layer=True):
            losses[name] = adapter.forward(inputs)[0].loss.item()
    return losses


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    whole, sharded = train(folder / "whole", False), train(folder / "sharded", True)
    resumed = train(folder / "resumed", True, resume=str(folder / "sharded" / "checkpoint-2"))
    try:
        train(folder / "other", True, resume=str(folder / "sharded" / "checkpoint-2"), seed=4)
        refusal = ""
    except ValueError as error:
        refusal = str(error)

    def unlike(run: dict) -> list[str]:
        return [name for name, value in run["weights"].items() if not torch.equal(value, whole["weights"][name])]

    result = {
        "logs": [whole["logs"], sharded["logs"]],
        "unlike": [unlike(sharded), unlike(resumed)],
        "whole": whole["held"],
        "given": sharded["given"],
        "counted": sharded["results"],
        "sheets": [file.name for file in (folder / "sharded" / "sheets").iterdir()],
        "held": [None] * distributed.get_world_size(),
        "refusal": refusal,
        "losses": [None] * distributed.get_world_size(),
    }
    distributed.all_gather_object(result["held"], sharded["held"])
    rank = distributed.get_rank()
    distributed.all_gather_object(result["losses"], task_losses(slice(2 * rank, 2 * rank + 2)))
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
