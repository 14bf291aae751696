"""Evaluating any detector on a split, outside of training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalPrediction

from ..data.collator import DetectionCollator
from ..labels import LabelMap
from .streaming import StreamingCocoMetrics, pack_detections, pack_references


def evaluate_detector(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    backend: str = "auto",
) -> dict[str, float]:
    """COCO metrics of a detector on a data set, streamed, on any number of processes.

    The model's classes are mapped to the data set's by name; detections of other classes are dropped.

    Args:
        model: any `AutoModelForObjectDetection`.
        image_processor: its own.
        dataset: a `DetectionDataset`.

    Returns:
        ``map``, ``map_50``, ... and ``map_<class>``, in [0, 1].
    """
    accelerator = Accelerator()
    labels = LabelMap.between(model.config.id2label, dataset.id2label)
    lookup = torch.full((model.config.num_labels,), -1, dtype=torch.long, device=accelerator.device)
    lookup[list(labels.teacher_classes)] = torch.tensor(labels.student_classes, device=accelerator.device)
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=DetectionCollator(image_processor)
    )
    loader = accelerator.prepare(loader)
    was_training = model.training
    model = model.to(accelerator.device).eval()
    metrics = StreamingCocoMetrics([dataset.id2label[i] for i in range(len(dataset.id2label))], backend=backend)
    result: dict[str, float] = {}
    with torch.no_grad():
        for batch in loader:
            targets = batch.pop("labels")
            references = pack_references(targets)
            sizes = torch.stack([target["orig_size"] for target in targets])
            output = model(**batch)
            detections = image_processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
            tensors = pack_detections([_translated(detection, lookup) for detection in detections]), references
            tensors = accelerator.pad_across_processes(tensors, dim=1, pad_index=-100)
            predictions, references = accelerator.gather_for_metrics(tensors)
            last = accelerator.gradient_state.end_of_dataloader
            result = metrics(EvalPrediction(predictions=predictions, label_ids=references), compute_result=last)
    model.train(was_training)
    return result


def _translated(detection: Mapping[str, torch.Tensor], lookup: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = lookup[detection["labels"]]
    return {name: (labels if name == "labels" else value)[labels >= 0] for name, value in detection.items()}
