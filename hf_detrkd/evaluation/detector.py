"""Evaluating any detector on a split, outside of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import EvalPrediction

from ..data.collator import DetectionCollator
from ..families.checks import enough_places
from ..labels import LabelMap
from .coco_detection.coco_evaluator import CocoEvaluator
from .streaming import StreamingCocoMetrics, flatten, pack_detections, pack_references


def evaluate_detector(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    backend: str = "auto",
    mixed_precision: str = "no",
) -> dict[str, float]:
    """COCO metrics of a detector on a data set, streamed, on any number of processes.

    The model's classes are mapped to the data set's by name; detections of other classes are dropped.

    Args:
        model: any `AutoModelForObjectDetection`.
        image_processor: its own.
        dataset: a `DetectionDataset`.
        mixed_precision: of the training that shares this process, if any: accelerate refuses to change it. The detector
            itself is measured in the precision of its weights.

    Returns:
        ``map``, ``map_50``, ... and ``map_<class>``, in [0, 1].
    """
    evaluator = evaluated(
        model,
        image_processor,
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        backend=backend,
        mixed_precision=mixed_precision,
    )
    return flatten(evaluator.compute())


def evaluated(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset,
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    backend: str = "auto",
    mixed_precision: str = "no",
) -> CocoEvaluator:
    """A detector's detections on a data set beside its objects; arguments as in `evaluate_detector`."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    lookup = label_lookup(model, dataset.id2label).to(accelerator.device)
    loader = DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=DetectionCollator(image_processor)
    )
    loader = accelerator.prepare(loader)
    was_training = model.training
    model = model.to(accelerator.device).eval()
    metrics = StreamingCocoMetrics([dataset.id2label[i] for i in range(len(dataset.id2label))], backend=backend)
    with torch.no_grad():
        for batch in loader:
            targets = batch.pop("labels")
            detections = detect(model, image_processor, batch, targets, lookup)
            tensors = pack_detections(detections), pack_references(targets)
            tensors = accelerator.pad_across_processes(tensors, dim=1, pad_index=-100)
            predictions, references = accelerator.gather_for_metrics(tensors)
            metrics(EvalPrediction(predictions=predictions, label_ids=references), compute_result=False)
    model.train(was_training)
    return metrics.evaluator


def label_lookup(model: PreTrainedModel, id2label: Mapping[int, str]) -> torch.Tensor:
    """(number of the model's classes,) the data set's label of each of them, by name; -1 where it has none."""
    labels = LabelMap.between(model.config.id2label, id2label)
    lookup = torch.full((model.config.num_labels,), -1, dtype=torch.long)
    lookup[list(labels.teacher_classes)] = torch.tensor(labels.student_classes)
    return lookup


def detect(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    pixels: Mapping[str, torch.Tensor],
    targets: Sequence[Mapping[str, torch.Tensor]],
    lookup: torch.Tensor,
) -> list[dict[str, torch.Tensor]]:
    """All detections of a batch, whatever their score.

    Args:
        pixels: what the model takes besides labels.
        targets: the batch's labels, for the size of each original image.
        lookup: from `label_lookup`.

    Returns:
        per image ``scores`` (n,), ``labels`` (n,) of the data set, ``boxes`` (n, 4) xyxy in pixels of the original.
    """
    sizes = torch.stack([target["orig_size"] for target in targets])
    with enough_places(model):
        output = model(**pixels)
    detections = image_processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    return [translated(detection, lookup) for detection in detections]


def translated(detection: Mapping[str, torch.Tensor], lookup: torch.Tensor) -> dict[str, torch.Tensor]:
    """An image's detections with the labels of `label_lookup`; without those of classes that the data set doesn't have."""
    labels = lookup[detection["labels"]]
    return {name: (labels if name == "labels" else value)[labels >= 0] for name, value in detection.items()}
