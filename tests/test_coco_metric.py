"""The COCO metric against pycocotools called directly, hand-computed values, and `evaluate.load`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import hf_detrkd
from hf_detrkd.evaluation.coco_detection.coco_evaluator import CocoEvaluator, best_per_class

METRIC = Path(hf_detrkd.__file__).parent / "evaluation" / "coco_detection"
BACKENDS = ("faster_coco_eval", "pycocotools")
SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")


def random_image(rng, num_classes, *, objects, detections, ties=False, crowds=False, areas=False):
    """A prediction and a reference; about half of the detections are jittered objects."""
    corner = rng.uniform(0, 300, (objects, 2))
    size = np.exp(rng.uniform(np.log(4), np.log(250), (objects, 2)))
    boxes = np.concatenate([corner, corner + size], axis=1)
    labels = rng.integers(0, num_classes, objects)
    reference = {"boxes": boxes, "labels": labels}
    if crowds:
        reference["iscrowd"] = (rng.random(objects) < 0.3).astype(int)
    if areas:
        reference["area"] = size.prod(axis=1) * rng.uniform(0.3, 1, objects)

    found = np.concatenate([rng.uniform(0, 300, (detections, 2)), rng.uniform(310, 500, (detections, 2))], axis=1)
    found_labels = rng.integers(0, num_classes, detections)
    if objects:
        chosen = rng.integers(0, objects, detections)
        near = rng.random(detections) < 0.5
        found[near] = (boxes[chosen] + rng.normal(0, 0.08, (detections, 4)) * np.tile(size[chosen], 2))[near]
        found_labels = np.where(near & (rng.random(detections) < 0.9), labels[chosen], found_labels)
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], axis=1)
    scores = rng.random(detections)
    scores = scores.round(1) if ties else scores
    return {"boxes": found, "scores": scores, "labels": found_labels}, reference


def random_set(seed):
    """Images of every kind: ordinary, without objects, without predictions, without either, over 100 detections."""
    rng = np.random.default_rng(seed)
    kinds = [(8, 30)] * 6 + [(0, 20), (5, 0), (0, 0), (25, 260), (1, 150)]
    classes = 1 + seed % 4
    return [
        random_image(
            rng, classes, objects=n, detections=m, ties=seed % 2 == 1, crowds=seed % 3 != 0, areas=bool(rng.integers(2))
        )
        for n, m in kinds
    ]


def pycocotools_directly(images, num_classes):
    """pycocotools used as its own demo does: one run over everything. Stats, and AP and AR of each class."""
    annotations, results = [], []
    for image_id, (prediction, reference) in enumerate(images):
        for i, (x1, y1, x2, y2) in enumerate(np.asarray(reference["boxes"], dtype=float).reshape(-1, 4).tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(reference["labels"][i]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(reference["area"][i]) if "area" in reference else (x2 - x1) * (y2 - y1),
                    "iscrowd": int(reference["iscrowd"][i]) if "iscrowd" in reference else 0,
                }
            )
        for i, (x1, y1, x2, y2) in enumerate(np.asarray(prediction["boxes"], dtype=float).reshape(-1, 4).tolist()):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": int(prediction["labels"][i]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": float(prediction["scores"][i]),
                }
            )
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": c} for c in range(num_classes)],
        "annotations": annotations,
    }
    truth.createIndex()
    run = COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    precision, recall = run.eval["precision"], run.eval["recall"]
    return (
        run.stats[:9],
        [precision[:, :, k, 0, 2].mean() for k in range(num_classes)],
        [recall[:, k, 0, 2].mean() for k in range(num_classes)],
    )


def evaluate_images(images, class_names=None, backend="auto", order=None):
    evaluator = CocoEvaluator(class_names, backend)
    for image_id in order if order is not None else range(len(images)):
        evaluator.add(image_id, *images[image_id])
    return evaluator.compute()


def one_class(boxes, scores, truth, **reference):
    labels = np.zeros(len(truth), dtype=int)
    prediction = {"boxes": boxes, "scores": scores, "labels": np.zeros(len(boxes), dtype=int)}
    return [(prediction, {"boxes": truth, "labels": labels, **reference})]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_pycocotools(seed, backend):
    images, num_classes = random_set(seed), 6  # the random sets use fewer: the rest are absent from the references
    stats, ap, ar = pycocotools_directly(images, num_classes)
    metrics = evaluate_images(images, [f"class {c}" for c in range(num_classes)], backend)
    minus_one = {key: -1.0 if isinstance(v, float) and math.isnan(v) else v for key, v in metrics.items()}
    assert [minus_one[key] for key in SUMMARY] == pytest.approx(stats, abs=1e-6)
    assert np.nan_to_num(list(metrics["map_per_class"].values()), nan=-1) == pytest.approx(ap, abs=1e-6)
    assert np.nan_to_num(list(metrics["mar_100_per_class"].values()), nan=-1) == pytest.approx(ar, abs=1e-6)
    assert 0.02 < metrics["map"] < 0.9  # the sets are neither trivial nor hopeless
    assert math.isnan(metrics["map_per_class"]["class 5"])


def test_pycocotools_backend_is_equal_to_the_bit():
    images = random_set(5)
    stats, _, _ = pycocotools_directly(images, 2)
    metrics = evaluate_images(images, backend="pycocotools")
    assert [metrics[key] for key in SUMMARY] == list(stats)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_images_does_not_matter(backend):
    images = random_set(1)  # with ties
    shuffled = np.random.default_rng(0).permutation(len(images)).tolist()
    assert evaluate_images(images, None, backend) == evaluate_images(images, None, backend, order=shuffled)


@pytest.mark.parametrize("backend", BACKENDS)
class TestKnownValues:
    truth = [[0, 0, 10, 10], [20, 20, 60, 60]]

    def test_perfect(self, backend):
        metrics = evaluate_images(one_class(self.truth, [0.9, 0.8], self.truth), ["thing"], backend)
        assert metrics["map"] == pytest.approx(1)
        assert metrics["map_small"] == pytest.approx(1) and metrics["map_medium"] == pytest.approx(1)
        assert math.isnan(metrics["map_large"])
        assert metrics["mar_1"] == pytest.approx(0.5) and metrics["mar_10"] == pytest.approx(1)
        assert metrics["map_per_class"] == pytest.approx({"thing": 1})

    def test_nothing_found(self, backend):
        metrics = evaluate_images(one_class([], [], self.truth), None, backend)
        assert metrics["map"] == 0 and metrics["mar_100"] == 0 and metrics["map_per_class"] == {"0": 0}

    def test_nothing_to_find(self, backend):
        metrics = evaluate_images(one_class(self.truth, [0.5, 0.4], []), ["thing"], backend)
        assert all(math.isnan(metrics[key]) for key in SUMMARY) and math.isnan(metrics["map_per_class"]["thing"])

    def test_no_images_at_all(self, backend):
        metrics = CocoEvaluator(None, backend).compute()
        assert all(math.isnan(metrics[key]) for key in SUMMARY) and metrics["map_per_class"] == {}

    def test_false_positive_between_two_hits(self, backend):
        """Precision 1 up to recall 0.5 (51 of COCO's 101 recalls), then 2/3."""
        boxes = [self.truth[0], [200, 200, 240, 240], self.truth[1]]
        metrics = evaluate_images(one_class(boxes, [0.9, 0.8, 0.7], self.truth), None, backend)
        assert metrics["map"] == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_loose_box_counts_up_to_its_iou(self, backend):
        """IoU 0.72: a hit at 5 of the 10 thresholds."""
        metrics = evaluate_images(one_class([[0, 0, 100, 72]], [0.5], [[0, 0, 100, 100]]), None, backend)
        assert metrics["map"] == pytest.approx(0.5)
        assert metrics["map_50"] == pytest.approx(1) and metrics["map_75"] == 0

    def test_second_hit_on_the_same_object_is_false(self, backend):
        """The duplicate comes first in score order after the hit: precision 1 to recall 0.5, then 2/3."""
        boxes = [self.truth[0], self.truth[0], self.truth[1]]
        metrics = evaluate_images(one_class(boxes, [0.9, 0.8, 0.7], self.truth), None, backend)
        assert metrics["map"] == pytest.approx((51 + 50 * 2 / 3) / 101)

    def test_wrong_class(self, backend):
        images = one_class(self.truth, [0.9, 0.8], self.truth)
        images[0][0]["labels"] = np.ones(2, dtype=int)
        assert evaluate_images(images, ["a", "b"], backend)["map"] == 0

    def test_detections_in_a_crowd_are_neither_right_nor_wrong(self, backend):
        crowd = [200, 200, 400, 400]
        inside = [[210, 210, 250, 250], [300, 300, 350, 350]]
        images = one_class([*inside, *self.truth], [0.9, 0.8, 0.7, 0.6], [*self.truth, crowd], iscrowd=[0, 0, 1])
        assert evaluate_images(images, None, backend)["map"] == pytest.approx(1)
        images[0][1]["iscrowd"] = [0, 0, 0]
        assert evaluate_images(images, None, backend)["map"] < 0.5

    def test_area_decides_the_size(self, backend):
        metrics = evaluate_images(one_class(self.truth, [1, 1], self.truth, area=[50, 100**2]), None, backend)
        assert metrics["map_small"] == pytest.approx(1) and metrics["map_large"] == pytest.approx(1)
        assert math.isnan(metrics["map_medium"])


def test_keeps_the_100_best_of_each_class():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [250, 50])
    detections = np.concatenate([labels[:, None], rng.random((300, 5))], axis=1)[rng.permutation(300)]
    kept = best_per_class(detections)
    best = np.sort(detections[detections[:, 0] == 0, 1])[-100:]
    assert np.array_equal(np.sort(kept[kept[:, 0] == 0, 1]), best)
    assert (kept[:, 0] == 1).sum() == 50


def test_says_nothing(capsys):
    for backend in BACKENDS:
        evaluate_images(random_set(2), None, backend)
    assert capsys.readouterr() == ("", "")


def test_class_names_by_sparse_label():
    images = one_class([[0, 0, 9, 9]], [1.0], [[0, 0, 9, 9]])
    for values in images[0]:
        values["labels"] = [90]
    assert evaluate_images(images, {1: "person", 90: "toothbrush"})["map_per_class"]["toothbrush"] == pytest.approx(1)


def test_adds_after_computing_and_forgets_on_reset():
    hit, miss = one_class([[0, 0, 9, 9]], [1.0], [[0, 0, 9, 9]])[0], one_class([], [], [[0, 0, 9, 9]])[0]
    evaluator = CocoEvaluator()
    evaluator.add(0, *hit)
    assert evaluator.compute()["mar_100"] == 1
    evaluator.add(1, *miss)
    assert evaluator.compute()["mar_100"] == 0.5
    evaluator.reset()
    assert len(evaluator) == 0
    evaluator.add(0, *miss)
    assert evaluator.compute()["mar_100"] == 0


BOX = [[0, 0, 9, 9]]
REFERENCE = {"boxes": BOX, "labels": [0]}
PREDICTION = REFERENCE | {"scores": [0.5]}


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"scores": [0.5, 0.5]}, {}, r"`scores` of shape \(2,\); \(1,\) is needed"),
        ({"boxes": [[0, 0, 9]]}, {}, r"`boxes` of shape \(1, 3\); \(1, 4\) is needed"),
        ({"scores": [float("nan")]}, {}, "1 values in `scores` that are NaN or infinite"),
        ({"labels": [2]}, {}, r"the prediction of image 7 has the label 2; known are labels \[0, 1\]"),
        ({"labels": ["cat"]}, {}, "`labels` that are not an array of numbers"),
        ({}, {"labels": [0.5]}, "the reference of image 7 has the label 0.5"),
        ({}, {"boxes": [[30, 40, 10, 10]]}, "ends before it begins. Boxes are x1, y1, x2, y2"),
        ({}, {"iscrowd": [2]}, "each must be 0 or 1"),
        ({}, {"area": []}, r"`area` of shape \(0,\); \(1,\) is needed"),
    ],
)
def test_bad_values_are_refused(prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        CocoEvaluator(["a", "b"]).add(7, PREDICTION | prediction, REFERENCE | reference)


def test_a_missing_value_is_named():
    with pytest.raises(ValueError, match=r"prediction of image 7 has no `scores`, only \['boxes', 'labels'\]"):
        CocoEvaluator().add(7, REFERENCE, REFERENCE)


def test_an_image_counts_once():
    evaluator = CocoEvaluator()
    evaluator.add(3, *one_class(BOX, [0.5], BOX)[0])
    with pytest.raises(ValueError, match="Image 3 was added twice"):
        evaluator.add(3, *one_class(BOX, [0.5], BOX)[0])


def test_backend_is_chosen(monkeypatch):
    assert CocoEvaluator().backend == "faster_coco_eval"
    with pytest.raises(ValueError, match="`backend` is 'coco'; it must be one of 'auto', 'faster_coco_eval'"):
        CocoEvaluator(backend="coco")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert CocoEvaluator().backend == "pycocotools"
    with pytest.raises(ImportError, match="`backend` is 'faster_coco_eval'"):
        CocoEvaluator(backend="faster_coco_eval")
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ImportError, match="pip install faster-coco-eval"):
        CocoEvaluator()


def test_class_names_are_distinct():
    with pytest.raises(ValueError, match="`class_names` has 'cat' more than once"):
        CocoEvaluator(["cat", "dog", "cat"])


LOAD = """
import json, sys
import evaluate, numpy as np, torch

box = [10.0, 10, 50, 50]
full = {"boxes": [box], "labels": [0], "iscrowd": [0], "area": [1600.0]}
results = {}
metric = evaluate.load(sys.argv[1])
metric.add_batch(  # fields given for some images only, lists and tensors, an image without anything
    predictions=[
        {"boxes": torch.tensor([box]), "scores": torch.tensor([0.9]), "labels": torch.tensor([0])},
        {"boxes": [], "scores": [], "labels": []},
    ],
    references=[full, {"boxes": [], "labels": []}],
)
metric.add_batch(
    predictions=[{"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, dtype=int)}],
    references=[{"boxes": [box], "labels": [1]}],
)
metric.add(
    prediction={"boxes": [box], "scores": [0.5], "labels": [0]},
    reference={"boxes": [box], "labels": [0], "iscrowd": [1]},
)
results["batches"] = metric.compute(class_names=["cat", "dog"])
one = dict(predictions=[{"boxes": [box], "scores": [0.5], "labels": [7]}], references=[{"boxes": [box], "labels": [7]}])
results["again"] = metric.compute(**one, backend="pycocotools")
for name, call in {
    "lengths": lambda: metric.add_batch(predictions=one["predictions"], references=[]),
    "missing": lambda: metric.add_batch(predictions=[{"boxes": [box]}], references=one["references"]),
}.items():
    try:
        call()
    except ValueError as error:
        results[name] = str(error)
print(json.dumps(results))
"""


def test_evaluate_loads_it_offline(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(METRIC)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["batches"]["map"] == pytest.approx(0.5)
    assert results["batches"]["map_per_class"] == pytest.approx({"cat": 1, "dog": 0})
    assert results["again"]["map_per_class"] == pytest.approx({"7": 1})
    assert "1 `predictions` and 0 `references`" in results["lengths"]
    assert "no `scores`, only ['boxes']" in results["missing"]


def test_images_can_be_read_back():
    """As they were added, in the order of the ids, with the 100 best detections of each class alone."""
    rng = np.random.default_rng(0)
    added = {
        9: random_image(rng, 2, objects=4, detections=260, crowds=True, areas=True),
        2: one_class(BOX, [0.5], BOX)[0],
    }
    evaluator = CocoEvaluator(["a", "b"])
    for image_id, image in added.items():
        evaluator.add(image_id, *image)
    assert evaluator.image_ids == [2, 9]
    prediction, reference = evaluator[9]
    for name, values in added[9][1].items():
        assert np.array_equal(reference[name], values), name
    scores, labels = added[9][0]["scores"], added[9][0]["labels"]
    best = [np.sort(scores[labels == label])[-100:] for label in (0, 1)]
    assert np.array_equal(np.sort(prediction["scores"]), np.sort(np.concatenate(best)))
    assert len(prediction["boxes"]) == len(prediction["labels"]) == len(prediction["scores"]) == 200
    assert evaluator[2][1]["area"].tolist() == [(BOX[0][2] - BOX[0][0]) * (BOX[0][3] - BOX[0][1])]
