"""Streaming evaluation: packing, Trainer's padding and gathering, accumulation over batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from transformers import EvalPrediction

from hf_detrkd.evaluation.coco_detection.coco_evaluator import CocoEvaluator
from hf_detrkd.evaluation.streaming import StreamingCocoMetrics, flatten, pack_detections, pack_references

CLASSES = ["disc", "square", "star"]


def random_batch(rng, image_ids):
    """What a post-processor and the collator give for some images; the first has no objects, the second a crowd."""
    results, labels = [], []
    for image_id in image_ids:
        objects = 0 if image_id % 5 == 0 else int(rng.integers(1, 9))
        crowds = 2 if image_id % 5 == 1 else 0
        height, width = rng.integers(100, 700, 2).tolist()
        size = rng.uniform(0.05, 0.5, (objects + crowds, 2))
        boxes = np.concatenate([rng.uniform(size / 2, 1 - size / 2), size], axis=1).astype(np.float32)
        classes = rng.integers(0, 3, objects + crowds)
        scale = np.array([width, height, width, height])
        area = (size * [width, height]).prod(axis=1).astype(np.float32) * 0.7
        detections = 5 if objects == 0 else 40
        chosen = boxes[rng.integers(0, objects + crowds, detections)] if objects else rng.uniform(0.3, 0.4, (5, 4))
        found = chosen + rng.normal(0, 0.02, (detections, 4))
        corners = np.concatenate([found[:, :2] - found[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2], axis=1) * scale
        results.append(
            {
                "scores": torch.tensor(rng.random(detections), dtype=torch.float32),
                "labels": torch.tensor(rng.integers(0, 3, detections)),
                "boxes": torch.tensor(corners, dtype=torch.float32),
            }
        )
        label = {
            "class_labels": torch.tensor(classes[:objects]),
            "boxes": torch.tensor(boxes[:objects]),
            "area": torch.tensor(area[:objects]),
            "orig_size": torch.tensor([height, width]),
            "image_id": torch.tensor([image_id]),
        }
        if crowds:
            label["crowd_boxes"] = torch.tensor(boxes[objects:])
            label["crowd_labels"] = torch.tensor(classes[objects:])
            label["crowd_area"] = torch.tensor(area[objects:])
        labels.append(label)
    return results, labels


def pixel_corners(boxes, orig_size):
    """Box by box, in plain Python."""
    height, width = orig_size.tolist()
    return [
        [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        for cx, cy, w, h in boxes.tolist()
    ]


def evaluated_at_once(batches):
    """The metrics of all images added to the evaluator directly."""
    evaluator = CocoEvaluator(CLASSES)
    for results, labels in batches:
        for result, label in zip(results, labels, strict=True):
            crowds = len(label.get("crowd_labels", []))
            reference = {
                "boxes": pixel_corners(label["boxes"], label["orig_size"]),
                "labels": label["class_labels"].tolist(),
                "area": label["area"].tolist(),
                "iscrowd": [0] * len(label["boxes"]) + [1] * crowds,
            }
            if crowds:
                reference["boxes"] += pixel_corners(label["crowd_boxes"], label["orig_size"])
                reference["labels"] += label["crowd_labels"].tolist()
                reference["area"] += label["crowd_area"].tolist()
            evaluator.add(int(label["image_id"]), {key: value.tolist() for key, value in result.items()}, reference)
    return flatten(evaluator.compute())


def test_pack_detections():
    results = [
        {
            "scores": torch.tensor([0.5, 0.9, 0.5]),
            "labels": torch.tensor([0, 1, 2]),
            "boxes": torch.arange(12.0).reshape(3, 4),
        },
        {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    packed = pack_detections(results)
    assert packed.dtype == torch.float32
    assert packed[0].tolist() == [[0, 0.5, 0, 1, 2, 3], [1, pytest.approx(0.9), 4, 5, 6, 7], [2, 0.5, 8, 9, 10, 11]]
    assert packed[1].tolist() == [[-100] * 6] * 3
    best = pack_detections(results, limit=2)
    assert best[0, :, 0].tolist() == [1, 0]  # of the tie, the first
    assert pack_detections([results[1]]).tolist() == [[[-100] * 6]]


def test_pack_detections_takes_half_precision():
    half = {"scores": torch.tensor([0.5]), "labels": torch.tensor([3]), "boxes": torch.ones(1, 4)}
    packed = pack_detections([{key: v.bfloat16() if v.is_floating_point() else v for key, v in half.items()}])
    assert packed.tolist() == [[[3, 0.5, 1, 1, 1, 1]]]


def test_pack_references():
    size = torch.tensor([100, 200])  # height, width
    empty = torch.zeros(0)
    labels = [
        {
            "image_id": torch.tensor([2**40 + 1]),
            "orig_size": size,
            "class_labels": torch.tensor([2]),
            "boxes": torch.tensor([[0.5, 0.5, 0.25, 0.5]]),
            "area": torch.tensor([1234.0]),
            "crowd_labels": torch.tensor([1]),
            "crowd_boxes": torch.tensor([[0.25, 0.25, 0.5, 0.5]]),
            "crowd_area": torch.tensor([99.0]),
        },
        {
            "image_id": torch.tensor(8),
            "orig_size": size,
            "class_labels": empty.long(),
            "boxes": empty.reshape(0, 4),
            "area": empty,
        },
    ]
    packed = pack_references(labels)
    assert packed[0].tolist() == [
        [2**40 + 1, 2, 75, 25, 125, 75, 1234, 0],
        [2**40 + 1, 1, 0, 0, 100, 50, 99, 1],
    ]
    assert packed[1].tolist() == [[8, -1, 0, 0, 0, 0, 0, 0], [-100] * 8]


def test_batches_equal_everything_at_once():
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, ids) for ids in ([10, 21, 3], [14, 5, 6], [7])]
    metrics = StreamingCocoMetrics(CLASSES)
    for step, (results, labels) in enumerate(batches):
        batch = EvalPrediction(pack_detections(results), pack_references(labels))
        streamed = metrics(batch, compute_result=step == 2)
        assert (streamed == {}) == (step < 2)
    expected = evaluated_at_once(batches)
    assert streamed == expected
    assert {"map", "map_50", "mar_100", "map_disc", "mar_100_star"} <= streamed.keys()
    assert 0 < streamed["map"] < 1


def test_forgets_between_evaluations():
    rng = np.random.default_rng(1)
    metrics = StreamingCocoMetrics(CLASSES)
    first, second = random_batch(rng, range(6)), random_batch(rng, range(6))
    values = [
        metrics(EvalPrediction(pack_detections(results), pack_references(labels)), compute_result=True)
        for results, labels in (first, second, first)
    ]
    assert values[0] == values[2] != values[1]
    assert values[1] == evaluated_at_once([second])


def test_a_broken_off_evaluation_can_be_forgotten():
    results, labels = random_batch(np.random.default_rng(2), range(3))
    batch = EvalPrediction(pack_detections(results), pack_references(labels))
    metrics = StreamingCocoMetrics(CLASSES)
    metrics(batch, compute_result=False)
    with pytest.raises(ValueError, match="Image 0 was added twice"):
        metrics(batch, compute_result=True)
    metrics.reset()
    assert metrics(batch, compute_result=True) == evaluated_at_once([(results, labels)])


def test_padded_and_gathered_as_trainer_does():
    """Two processes with ragged batches: pad to the longest (Accelerator.pad_across_processes), concatenate, and
    drop the images that the sampler repeated to fill the last batch (Accelerator.gather_for_metrics)."""
    rng = np.random.default_rng(3)
    batches = [random_batch(rng, ids) for ids in ([1, 2], [3, 4], [5, 6], [7])]
    last = batches[3]
    per_process = [[batches[0], batches[2]], [batches[1], (last[0] * 2, last[1] * 2)]]
    metrics = StreamingCocoMetrics(CLASSES)
    for step in range(2):
        packed = [(pack_detections(r), pack_references(lab)) for r, lab in (process[step] for process in per_process)]
        gathered = []
        for tensors in zip(*packed, strict=True):
            longest = max(tensor.shape[1] for tensor in tensors)
            padded = [pad(t, (0, 0, 0, longest - t.shape[1]), value=-100) for t in tensors]
            gathered.append(torch.cat(padded)[: 3 if step == 1 else None])
        streamed = metrics(EvalPrediction(*gathered), compute_result=step == 1)
    assert streamed == evaluated_at_once(batches)


def test_padding_by_accelerate_itself():
    from accelerate import Accelerator
    from accelerate.state import GradientState

    GradientState._reset_state()  # one per process: a loop that an earlier test broke off would shorten what is gathered
    accelerator = Accelerator(cpu=True)
    results, labels = random_batch(np.random.default_rng(4), range(4))
    tensors = [
        accelerator.gather_for_metrics(accelerator.pad_across_processes(tensor, dim=1, pad_index=-100))
        for tensor in (pack_detections(results), pack_references(labels))
    ]
    metrics = StreamingCocoMetrics(CLASSES)
    assert metrics(EvalPrediction(*tensors), compute_result=True) == evaluated_at_once([(results, labels)])


def test_numpy_predictions_are_taken():
    results, labels = random_batch(np.random.default_rng(5), range(4))
    arrays = EvalPrediction(pack_detections(results).numpy(), pack_references(labels).numpy())
    assert StreamingCocoMetrics(CLASSES)(arrays, compute_result=True) == evaluated_at_once([(results, labels)])


def test_undefined_is_left_out_and_summary_wins():
    nan = math.nan
    metrics = {"map": 0.123456, "map_small": nan, "map_per_class": {"small": 0.5, "cat": 0.25, "dog": nan}}
    flat = flatten(metrics | {"mar_100_per_class": {}})
    assert flat == {"map": 0.1235, "map_cat": 0.25}
    assert list(flat) == ["map", "map_cat"]


def test_a_model_that_diverged_is_reported():
    results, labels = random_batch(np.random.default_rng(6), [1])
    results[0]["scores"][0] = math.nan
    with pytest.raises(ValueError, match="prediction of image 1 has 1 values in `scores` that are NaN"):
        StreamingCocoMetrics(CLASSES)(EvalPrediction(pack_detections(results), pack_references(labels)), True)
