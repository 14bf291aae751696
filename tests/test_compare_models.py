"""compare_models: the numbers of every picture and table, from COCO's own tables to the command."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from scenes import processor

from hf_detrkd.commands import compare_models, distill, evaluate
from hf_detrkd.commands.compare_models import counted, draw_differences, objects_by_class, scenes_of
from hf_detrkd.commands.places import Place, places
from hf_detrkd.data import DetectionDataset, load_detection_dataset
from hf_detrkd.evaluation.bootstrap import average_precision, interval, resampled_ap
from hf_detrkd.evaluation.coco_detection.coco_evaluator import CocoEvaluator
from hf_detrkd.reporting import comparison
from hf_detrkd.reporting.differences import caption, most_different
from hf_detrkd.reporting.precision_recall import class_curves, mean_curve, plot_class_curves
from hf_detrkd.reporting.sheet import KINDS, Counts

SHAPES = f"shapes:train=4,validation=2,test=4,size={zoo.SIZE}"
NAMES = ["circle", "square", "triangle", "star", "ring", "cross"]
CLASSES = ["cat", "dog", "bird", "never there"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def random_images(number: int, noise: float, seed: int = 0):
    """Predictions and references of three of the `CLASSES`, with crowds; the larger ``noise``, the worse the boxes."""
    truth, rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    images = []
    for _ in range(number):
        objects = int(truth.integers(0, 6))
        corner = truth.uniform(0, 200, (objects, 2))
        boxes = np.concatenate([corner, corner + truth.uniform(10, 120, (objects, 2))], axis=1)
        labels, crowd = truth.integers(0, 3, objects), truth.random(objects) < 0.15
        near = boxes + noise * rng.normal(size=boxes.shape)
        far = rng.uniform(0, 100, (8, 2))
        found = np.concatenate([near, np.concatenate([far, far + rng.uniform(20, 150, (8, 2))], axis=1)])
        found[:, 2:] = np.maximum(found[:, :2] + 1, found[:, 2:])
        images.append(
            (
                {
                    "boxes": found,
                    "scores": rng.random(len(found)),
                    "labels": np.concatenate([labels, rng.integers(0, 3, 8)]),
                },
                {"boxes": boxes, "labels": labels, "iscrowd": crowd.astype(int)},
            )
        )
    return images


def evaluator_of(images, ids=None, classes=CLASSES) -> CocoEvaluator:
    evaluator = CocoEvaluator(classes)
    for image_id, image in zip(range(len(images)) if ids is None else ids, images, strict=True):
        evaluator.add(image_id, *image)
    return evaluator


class TestPrecisionRecall:
    def test_area_is_the_ap_reported(self):
        evaluator = evaluator_of(random_images(20, noise=8))
        metrics, tables = evaluator.compute(), evaluator.tables()
        assert 0 < metrics["map_75"] < metrics["map_50"] < 1
        for iou, name in ((0.5, "map_50"), (0.75, "map_75")):
            assert mean_curve(tables, iou).mean() == pytest.approx(metrics[name], abs=1e-12)
        curves = [class_curves(tables, iou) for iou in np.linspace(0.5, 0.95, 10)]
        for name in CLASSES[:3]:
            of_class = np.mean([at_iou[name] for at_iou in curves])
            assert of_class == pytest.approx(metrics["map_per_class"][name], abs=1e-12)

    def test_by_hand(self):
        """Two objects; the first is found after a false box: precision 1/2 up to the recall 1/2, then nothing."""
        truth = [[0.0, 0, 50, 50], [100.0, 100, 150, 150]]
        prediction = {"boxes": [[200.0, 0, 240, 40], truth[0]], "scores": [0.9, 0.8], "labels": [0, 0]}
        evaluator = evaluator_of([(prediction, {"boxes": truth, "labels": [0, 0]})])
        curve = class_curves(evaluator.tables(), 0.75)["cat"]
        assert np.allclose(curve, [0.5] * 51 + [0] * 50)

    def test_classes_without_an_object_have_no_curve_and_no_panel(self, tmp_path):
        tables = evaluator_of(random_images(10, noise=5)).tables()
        assert list(class_curves(tables, 0.5)) == CLASSES[:3]
        nothing = evaluator_of([({"boxes": [], "scores": [], "labels": []}, {"boxes": [], "labels": []})]).tables()
        assert class_curves(nothing, 0.5) == {} and np.isnan(mean_curve(nothing, 0.5)).all()
        widths = []
        for names in (CLASSES[:1], CLASSES):
            plot_class_curves({"model": tables}, tmp_path / "new" / "curves.png", dict.fromkeys(names, 1))
            with Image.open(tmp_path / "new" / "curves.png") as picture:
                widths.append(picture.width)
        assert widths[1] == 3 * widths[0]


class TestBootstrap:
    def test_every_image_once_is_the_ap(self):
        for noise in (3, 15):
            evaluator = evaluator_of(random_images(20, noise))
            ap = average_precision(evaluator.matches(), np.ones(20, dtype=int))
            assert ap == pytest.approx(evaluator.compute()["map"], abs=1e-12)

    def test_images_drawn_again_count_as_copies(self):
        images = random_images(12, noise=10)
        times = np.array([0, 2, 1, 0, 3, 1, 1, 0, 2, 1, 0, 1])
        drawn = [image for image, number in zip(images, times, strict=True) for _ in range(number)]
        expected = evaluator_of(drawn).compute()["map"]
        assert expected != pytest.approx(evaluator_of(images).compute()["map"], abs=1e-3)
        assert average_precision(evaluator_of(images).matches(), times) == pytest.approx(expected, abs=1e-12)

    def test_paired_and_repeatable(self):
        good, bad = (evaluator_of(random_images(40, noise)) for noise in (4, 12))
        drawn = resampled_ap([good, bad, good], resamples=60, seed=3)
        assert drawn.shape == (60, 3) and np.array_equal(drawn[:, 0], drawn[:, 2])
        assert np.array_equal(drawn, resampled_ap([good, bad, good], resamples=60, seed=3))
        assert not np.array_equal(drawn, resampled_ap([good, bad, good], resamples=60, seed=4))
        low, high = interval(drawn[:, 0] - drawn[:, 1])
        difference = good.compute()["map"] - bad.compute()["map"]
        assert 0 < low < difference < high < 2 * difference
        spread = np.ptp(np.percentile(drawn[:, 0], [2.5, 97.5]))
        assert high - low < spread  # what is hard is hard for both

    def test_interval_by_hand(self):
        assert interval(np.append(np.arange(101.0), math.nan)) == pytest.approx((2.5, 97.5))
        assert interval(np.arange(101.0), confidence=0.8) == pytest.approx((10, 90))

    def test_without_an_object_there_is_no_ap(self):
        empty = evaluator_of([(random_images(1, noise=1)[0][0], {"boxes": [], "labels": []})])
        assert math.isnan(average_precision(empty.matches(), np.array([1])))

    def test_different_images_are_refused(self):
        images = random_images(4, noise=4)
        with pytest.raises(ValueError, match=r"different images \(4 and 3, 2 of them shared\)"):
            resampled_ap([evaluator_of(images), evaluator_of(images[:3], ids=[2, 3, 9])])


def errors(*numbers: int) -> list[Counts]:
    return [Counts(0, number, 0) for number in numbers]


class TestDifferences:
    def test_half_of_each_side_the_largest_first(self):
        baseline, candidate = errors(5, 0, 4, 3, 2, 1), errors(1, 2, 4, 0, 5, 0)  # saved: 4, -2, 0, 3, -3, 1
        assert most_different(baseline, candidate, 4) == [0, 3, 4, 1]
        assert most_different(baseline, candidate, 1) == [0]
        assert most_different(baseline, candidate, 99) == [0, 3, 5, 4, 1]
        assert most_different(candidate, baseline, 2) == [4, 0]

    def test_one_side_fills_up_for_the_other(self):
        assert most_different(errors(1, 2, 3, 1), errors(0, 0, 0, 2), 4) == [2, 1, 0, 3]
        assert most_different(errors(0, 0, 0), errors(1, 2, 3), 2) == [2, 1]
        assert most_different(errors(1, 2), errors(1, 2), 2) == []

    def test_missed_and_false_count_alike(self):
        assert Counts(3, 2, 1).errors == 3 and Counts(1, 2, 3) + Counts(4, 5, 6) == Counts(5, 7, 9)
        assert caption("twin", Counts(0, 2, 1), "student", Counts(0, 0, 2)) == "student: 1 error fewer\nthan twin"
        assert caption("twin", Counts(0, 0, 1), "student", Counts(0, 3, 0)) == "student: 2 errors more\nthan twin"


def test_boxes_of_the_evaluator_lie_on_the_images():
    """A model that finds every object but one, once more with a wrong class and weak: image by image."""
    dataset = DetectionDataset(load_detection_dataset(SHAPES)["test"])
    evaluator = CocoEvaluator(dataset.class_names)
    for index in reversed(range(len(dataset))):
        target = dataset[index]["target"]
        boxes, labels = target["boxes"][index == 0 :], target["labels"][index == 0 :]
        weak = {"boxes": boxes[:1], "labels": (labels[:1] + 1) % 6, "scores": torch.full((len(boxes[:1]),), 0.2)}
        found = {"boxes": boxes, "labels": labels, "scores": torch.full((len(boxes),), 0.9)}
        reference = {"boxes": target["boxes"], "labels": target["labels"], "iscrowd": target["iscrowd"]}
        evaluator.add(
            int(target["image_id"]), {name: torch.cat([found[name], weak[name]]) for name in found}, reference
        )
    scenes = scenes_of({"model": evaluator}, dataset)
    objects = [len(dataset[index]["target"]["boxes"]) for index in range(len(dataset))]
    assert sum(objects_by_class(dataset).values()) == sum(objects)
    assert list(objects_by_class(dataset).values()) == sorted(objects_by_class(dataset).values(), reverse=True)
    best, counts = counted(scenes, "model", None)
    assert best == pytest.approx(0.9)
    assert counts == [Counts(number - (i == 0), int(i == 0), 0) for i, number in enumerate(objects)]
    least, counts = counted(scenes, "model", 0.1)
    assert least == 0.1 and sum(one.false for one in counts) == sum(
        number - (i == 0) > 0 for i, number in enumerate(objects)
    )


def test_differences_are_drawn_and_named(tmp_path):
    """The candidate finds everything, the baseline nothing: the images with most objects, in their numbers and colours."""
    dataset = DetectionDataset(load_detection_dataset(SHAPES)["test"])
    models = {"nothing": CocoEvaluator(dataset.class_names), "everything": CocoEvaluator(dataset.class_names)}
    objects = {}
    for index in range(len(dataset)):
        target = dataset[index]["target"]
        for number, evaluator in zip((0, None), models.values(), strict=True):
            found = {name: target[name][:number] for name in ("boxes", "labels")}
            found["scores"] = torch.full((len(found["labels"]),), 0.4)
            evaluator.add(
                int(target["image_id"]), found, {name: target[name] for name in ("boxes", "labels", "iscrowd")}
            )
        objects[int(target["image_id"])] = len(target["boxes"])
    scenes = scenes_of(models, dataset)
    counts = {name: counted(scenes, name, 0.3)[1] for name in models}
    results = {"baseline": "nothing", "candidate": "everything"}
    results["models"] = {"nothing": {"score_from": 0.5}, "everything": {"score_from": 0.3}}
    path = tmp_path / "new" / "differences.png"
    chosen = draw_differences(results, dataset, scenes, counts, path, 2)
    assert [objects[one["image_id"]] for one in chosen] == sorted(objects.values(), reverse=True)[:2]
    for one in chosen:
        number = objects[one["image_id"]]
        nothing, everything = one["counts"]["nothing"], one["counts"]["everything"]
        assert nothing == {"hits": 0, "missed": number, "false": 0} == {**everything, "hits": 0, "missed": number}
        assert everything["hits"] == number and everything["missed"] == 0
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    third = pixels.shape[1] // 3
    for kind, column in (("object", 0), ("missed", 1), ("hit", 2)):
        color = [int(KINDS[kind].color[i : i + 2], 16) for i in (1, 3, 5)]
        near = np.abs(pixels[: int(0.85 * len(pixels))] - color).max(axis=-1) < 12
        shares = [near[:, i * third : (i + 1) * third].sum() for i in range(3)]
        assert shares[column] > 10 * max(1, *(share for i, share in enumerate(shares) if i != column)), (kind, shares)
    (tmp_path / "none").mkdir()
    same = {name: counts["everything"] for name in models}
    assert draw_differences(results, dataset, scenes, same, tmp_path / "none" / "x.png", 2) == []
    assert not list((tmp_path / "none").iterdir())


def save(folder, names: list[str], **overrides) -> str:
    """A tiny detector of these classes with its image processor."""
    model = zoo.build("rt_detr", classes=len(names), **overrides)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a distillation run with its twin; the teacher has other classes in another order."""
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DETRKD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        teacher = save(folder / "teacher", ["hexagon", *reversed(NAMES)])
        student = save(folder / "start", NAMES, decoder_layers=2)
        flags = ["--teacher_model_name_or_path", teacher, "--model_name_or_path", student, "--with_twin", "true"]
        flags += [
            "--method",
            "logit_kd",
            "--dataset_name",
            SHAPES,
            "--output_dir",
            str(folder / "run"),
            "--max_steps",
            "2",
        ]
        flags += ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--sheet_images", "0"]
        distill.main([*flags, "--max_eval_samples", "3"])
    return folder / "run"


QUICK = ["--rounds", "1", "--resamples", "20", "--num_workers", "0", "--sheet_images", "2"]


def test_run(tmp_path, capsys, run):
    """Teacher, twin and student of a run on its own data: the metrics are those of the run and of `evaluate`."""
    output = tmp_path / "out"
    results = compare_models.main(["--run", str(run), "--output_dir", str(output), *QUICK])
    assert json.loads((output / "comparison.json").read_text()) == json.loads(json.dumps(results))
    recorded = json.loads((run / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "twin", "student"]
    assert (results["dataset"], results["split"], results["images"]) == (SHAPES, "test", 3)  # as the run had them
    assert (results["baseline"], results["candidate"]) == ("twin", "student")
    for name, model in results["models"].items():
        assert {key: recorded[name]["test"][key] for key in model["metrics"]} == model["metrics"], name
        assert model["parameters"] == recorded[name]["parameters"] and model["flops"] > 0
        assert 0 < model["latency"]["median"] <= model["latency"]["p95"] and model["input"] == [zoo.SIZE, zoo.SIZE]
        assert model["counts"]["hits"] + model["counts"]["missed"] == sum(results["objects"].values())
    assert list(results["gains"]) == ["teacher", "student"]
    gain = results["gains"]["student"]
    metrics = [results["models"][name]["metrics"]["map"] for name in ("student", "twin")]
    assert gain["map"] == metrics[0] - metrics[1] and gain["low"] <= gain["high"]
    page, printed = (output / "comparison.md").read_text(), capsys.readouterr().out
    for words in ("student - twin", "95 % interval", "GFLOPs", "median (ms)", "score from", "threads 1", *NAMES[:2]):
        assert words in page and words in printed, words
    assert f"--run {run}" in page
    for name in comparison.PICTURES:
        drawn = name != "differences.png" or bool(results["differences"])
        assert (output / name).is_file() == drawn == (f"({name})" in page), name
        if drawn:
            with Image.open(output / name) as picture:
                assert min(picture.size) > 300

    alone = evaluate.main(
        [
            "--model_name_or_path",
            str(run / "twin"),
            "--dataset_name",
            SHAPES,
            "--max_eval_samples",
            "3",
            "--num_workers",
            "0",
        ]
    )
    assert results["models"]["twin"]["metrics"] == alone["metrics"]


def test_flags_and_recipe_override_the_run(tmp_path, run):
    """The run says 3 images, the recipe 2; the flag another split. Other models may stand beside those of the run."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_eval_samples: 2\nsplit: test\nresamples: 0\n")
    flags = ["--config", str(recipe), "--run", str(run), "--split", "validation", "--output_dir", str(tmp_path / "out")]
    flags += [
        "--models",
        f"other={run / 'twin'}",
        "--baseline",
        "teacher",
        "--threshold",
        "0.02",
        "--sheet_images",
        "0",
    ]
    results = compare_models.main([*flags, "--rounds", "1", "--num_workers", "0"])
    assert (results["images"], results["split"], results["baseline"]) == (2, "validation", "teacher")
    assert list(results["models"]) == ["teacher", "twin", "student", "other"] and results["candidate"] == "student"
    assert results["models"]["other"]["metrics"] == results["models"]["twin"]["metrics"]
    assert {model["score_from"] for model in results["models"].values()} == {0.02}
    assert all(gain["low"] is None for gain in results["gains"].values()) and results["differences"] == []
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "No intervals: --resamples 0" in page and "the given score" in page


def test_places_of_a_run_that_was_moved(tmp_path, run):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
    content = json.loads((moved / "results.json").read_text())
    content["teacher"]["name_or_path"] = "runs/gone"
    (moved / "results.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"its teacher was the folder runs/gone.*--models teacher=PLACE"):
        places(moved, [])
    found = places(str(moved), [f"teacher={run.parent / 'teacher'}"])
    assert {name: place.model for name, place in found.items()} == {
        "twin": str(moved / "twin"),
        "student": str(moved),
        "teacher": str(run.parent / "teacher"),
    }
    content["teacher"] |= {"name_or_path": "org/teacher", "revision": "abc"}
    content["settings"]["DistillArguments"]["teacher_image_processor_name"] = "org/processor"
    content["twin"] = None
    (moved / "results.json").write_text(json.dumps(content))
    assert places(moved, [])["teacher"] == Place("org/teacher", "org/processor", "abc") and "twin" not in places(
        moved, []
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "a=x"], r"needs two models or more, and there are \['a'\]"),
        (["--models", "runs/student", "b=x"], r"--models has 'runs/student'; NAME=PLACE is needed"),
        (["--models", "a=x", "a=y"], r"the name 'a' twice: x and y"),
        (["--models", "a=x", "b=y", "--baseline", "twin"], r"--baseline is 'twin'; the models are a, b"),
        (["--models", "a=x", "b=y", "--candidate", "c"], r"--candidate is 'c'; the models are a, b"),
        (["--models", "a=x", "b=y", "--candidate", "a"], r"--baseline and --candidate are both 'a'"),
        (["--models", "a=x", "b=y", "--split", "val"], r"--split is 'val'; allowed are train, validation, test"),
        (["--models", "a=x", "b=y", "--threshold", "50"], r"--threshold is 50.0; a score is between 0 and 1"),
        (["--models", "a=x", "b=y", "--rounds", "0"], r"--rounds is 0; it must be 1 or more"),
        (["--models", "a=x", "b=y", "--resamples", "-1"], r"--resamples is -1; it must be 0 or more"),
        (["--run", "nowhere"], r"--run nowhere: there is no results.json in it"),
    ],
)
def test_refused(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare_models.main(flags)


def test_other_folders_and_empty_splits_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"model": {}, "settings": {}}')
    with pytest.raises(ValueError, match=r"its results.json has \['model', 'settings'\] and no student"):
        compare_models.main(["--run", str(tmp_path)])
    folder = tmp_path / "data"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(folder / split / "a.png")
        objects = {"bbox": [[2, 2, 8, 8]], "category": ["cat"]} if split == "train" else {"bbox": [], "category": []}
        (folder / split / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "objects": objects}) + "\n")
    flags = ["--models", "a=x", "b=y", "--dataset_name", str(folder), "--dataset_validation_split", "test"]
    with pytest.raises(ValueError, match=r"The split test of .* has no object: there is no AP"):
        compare_models.main(flags)
