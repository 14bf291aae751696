"""Run by `test_distributed.py`, on one process or through torchrun: trains, evaluates twice, writes what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import zoo
from accelerate.utils import gather_object
from scenes import Scenes, processor

from hf_detrkd import DistillationConfig, DistillationTrainer
from hf_detrkd.evaluation.streaming import StreamingCocoMetrics


class Counted(StreamingCocoMetrics):
    """COCO metrics, and what shows every detection of every image: an untrained model has an AP of 0 whatever is lost."""

    def __init__(self, class_names):
        super().__init__(class_names)
        self.images, self.scores, self.boxes = [], 0.0, 0.0

    def __call__(self, batch, compute_result):
        real = batch.predictions[..., 0] >= 0
        self.images += batch.label_ids[:, 0, 0].int().tolist()
        self.scores += batch.predictions[..., 1][real].double().sum().item()
        self.boxes += batch.predictions[..., 2:][real].double().mean(0).sum().item() * real.sum().item()
        metrics = super().__call__(batch, compute_result)
        if compute_result:
            metrics |= {"images": sorted(self.images), "scores": self.scores, "boxes": self.boxes}
            self.images, self.scores, self.boxes = [], 0.0, 0.0
        return metrics


class Streamed(torch.utils.data.IterableDataset):
    """Scenes without a length."""

    def __init__(self, number: int):
        self.scenes = Scenes(number)

    def __iter__(self):
        return map(self.scenes.__getitem__, range(len(self.scenes)))


def streamed_labels(trainer: DistillationTrainer, number: int) -> list:
    """Image id, classes and boxes of every image that the processes get of a stream."""
    trainer.train_dataset = Streamed(number)
    labels = [label for batch in trainer.get_train_dataloader() for label in batch["labels"]]
    return gather_object([[label[name].tolist() for name in ("image_id", "class_labels", "boxes")] for label in labels])


def build(folder: str, method: str, student: str, teacher: str, batch: int, every: int = 1) -> DistillationTrainer:
    """The trainer of every process."""
    student, teacher = zoo.build(student), zoo.build(teacher, seed=3)
    return DistillationTrainer(
        model=student,
        teacher_model=None if method == "none" else teacher,
        args=DistillationConfig(
            output_dir=folder,
            method=method,
            kd_every=every,
            method_config={"general_points": 4} if method == "kd_detr" else None,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=2,
            max_steps=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            gradient_share_steps=2,
            sheet_steps=2,
            sheet_images=2,
            optim="sgd",
            learning_rate=1e-3,
            max_grad_norm=10,  # with 0.1 no weight moves by more than the test's tolerance
            seed=7,
        ),
        train_dataset=Scenes(12),
        eval_dataset=Scenes(7, seed=1),
        processing_class=processor(student),
        compute_metrics=Counted(list(Scenes().id2label.values())),
        teacher_processing_class=processor(teacher),
    )


def main(folder: str, method: str, student: str, teacher: str, batch: str, every: str) -> None:
    torch.set_num_threads(1)
    trainer = build(folder, method, student, teacher, int(batch), int(every))
    evaluations = [trainer.evaluate()]
    trainer.train()
    evaluations += [trainer.evaluate(), trainer.evaluate(Scenes(5, seed=2))]
    streamed = streamed_labels(trainer, 12)
    if trainer.is_world_process_zero():
        keys = ["eval_map", "eval_mar_100", "eval_images", "eval_scores", "eval_boxes"]
        result = {"evaluations": [{key: evaluation[key] for key in keys} for evaluation in evaluations]}
        result["streamed"] = sorted(streamed)
        result["logs"] = [log for log in trainer.state.log_history if "loss" in log]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "result.json").write_text(json.dumps(result))
        torch.save({**trainer.student.state_dict(), **trainer.model.methods.state_dict()}, Path(folder) / "weights.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
