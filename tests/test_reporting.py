"""Tables, curves and image sheets."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scenes
import torch
import zoo
from PIL import Image

from hf_detrkd.reporting.curves import PANELS, plot_curves, series_of
from hf_detrkd.reporting.sheet import (
    KINDS,
    Counts,
    SheetRow,
    best_threshold,
    classify,
    count,
    draw_comparison,
    draw_sheet,
)
from hf_detrkd.reporting.table import class_table, comparison_table, difference, text_table

RESULTS = {
    "teacher": {"map": 0.4, "map_50": 0.6, "map_small": math.nan, "mar_100": 0.5},
    "twin": {"map": 0.151, "map_50": 0.3, "mar_100": 0.2},
    "student": {"map": 0.25, "map_50": 0.28, "map_75": 0.1, "mar_100": 0.2},
}


class TestTables:
    def test_comparison(self):
        assert comparison_table(RESULTS).splitlines() == [
            "                  AP  AP50  AP75  APs  APm  APl  AR100",
            "--------------  ----  ----  ----  ---  ---  ---  -----",
            "teacher         40.0  60.0     -    -    -    -   50.0",
            "twin            15.1  30.0     -    -    -    -   20.0",
            "student         25.0  28.0  10.0    -    -    -   20.0",
            "student - twin  +9.9  -2.0     -    -    -    -   +0.0",
        ]

    def test_no_gain_has_no_minus(self):
        assert difference(0.1, 0.1001) == difference(0.1001, 0.1) == "+0.0"
        assert difference(0.1, 0.101) == "-0.1"

    def test_without_a_twin_there_is_no_gain(self):
        assert len(comparison_table({"model": {"map": 0.5}}).splitlines()) == 3

    def test_markdown(self):
        table = text_table(["a|b", "AP"], [["x", "1.0"], ["longer", "20.0"]], markdown=True)
        assert table.splitlines() == [
            "| a\\|b   |   AP |",
            "| ------ | ---: |",
            "| x      |  1.0 |",
            "| longer | 20.0 |",
        ]

    def test_class_table(self):
        metrics = {"map": 0.3, "mar_100": 0.4, "map_small": 0.9, "map_cat": 0.2, "mar_100_cat": 0.5}
        rows = class_table(metrics | {"mar_100_small": 0.1}).splitlines()[2:]
        assert [row.split() for row in rows] == [["cat", "20.0", "50.0"], ["small", "-", "10.0"]]

    def test_ragged_rows_are_refused(self):
        with pytest.raises(ValueError, match=r"`header` has 2 columns, and `rows` have \[1, 2\]"):
            text_table(["a", "b"], [["1", "2"], ["1"]])


HISTORY = [
    {"step": 1, "loss": 5.0, "detection_loss": 4.0, "kd_specific_class": 0.5, "kd_scale": 1.0, "learning_rate": 0.1},
    {"step": 2, "loss": 4.0, "detection_loss": 3.5, "kd_specific_class": 0.25, "kd_scale": 1.0},
    {"step": 2, "eval_loss": 6.0, "eval_map": 0.25, "eval_map_50": math.nan},
    {"step": 2, "train_runtime": 3.0},
]
TWIN = [{"step": 1, "loss": 6.0, "detection_loss": 6.0}, {"step": 2, "eval_map": 0.125}]


class TestCurves:
    def test_what_each_panel_shows(self):
        histories = {"student": HISTORY, "twin": TWIN}
        loss, terms, share, precision = (series_of(histories, panel) for panel in PANELS)
        assert loss == {
            ("student", "loss"): ([1, 2], [5, 4]),
            ("student", "detection_loss"): ([1, 2], [4, 3.5]),
            ("student", "eval_loss"): ([2], [6]),
            ("twin", "loss"): ([1], [6]),
        }
        assert terms == {("student", "kd_specific_class"): ([1, 2], [0.5, 0.25])}
        assert share == {}
        assert precision == {("student", "eval_map"): ([2], [25]), ("twin", "eval_map"): ([2], [12.5])}

    def test_draws_one_picture_with_the_panels_that_have_values(self, tmp_path):
        plot_curves({"student": HISTORY, "twin": TWIN}, tmp_path / "new" / "three.png")
        plot_curves({"twin": TWIN[:1]}, tmp_path / "one.png")
        with Image.open(tmp_path / "new" / "three.png") as three, Image.open(tmp_path / "one.png") as one:
            assert three.width == 3 * one.width and three.height == one.height

    def test_nothing_to_draw_draws_nothing(self, tmp_path):
        assert not plot_curves({"run": [{"step": 1, "train_runtime": 2.0}]}, tmp_path / "x.png")
        assert not (tmp_path / "x.png").exists()


def row(detections, crowd=(False, False)):
    """An image of 100 x 100 with two objects of class 0 and these detections of "model": box, score, label."""
    boxes, scores, labels = zip(*detections, strict=True) if detections else ((), (), ())
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "scores": torch.tensor(scores),
        "labels": torch.tensor(labels, dtype=torch.long),
    }
    return SheetRow(
        image=torch.full((3, 100, 100), 128, dtype=torch.uint8),
        boxes=torch.tensor([[10.0, 10, 40, 40], [50, 50, 90, 90]]),
        labels=torch.tensor([0, 0]),
        crowd=torch.tensor(crowd),
        detections={"model": found},
    )


class TestOutcomes:
    first, second = [10.0, 10, 40, 40], [50.0, 50, 90, 90]

    @pytest.mark.parametrize(
        ("detections", "kinds", "objects"),
        [
            ([(first, 0.9, 0), (second, 0.8, 0)], ("hit", "hit"), (0, 1)),
            ([(first, 0.9, 1)], ("false",), (-1,)),  # class
            ([([10.0, 10, 40, 24], 0.9, 0)], ("false",), (-1,)),  # IoU 0.47
            ([([10.0, 10, 40, 26], 0.9, 0)], ("hit",), (0,)),  # IoU 0.53
            ([(first, 0.5, 0), (first, 0.9, 0)], ("false", "hit"), (-1, 0)),  # the better score takes it
            ([], (), ()),
        ],
    )
    def test_hits_and_false_detections(self, detections, kinds, objects):
        example = row(detections)
        outcome = classify(example, example.detections["model"])
        assert (outcome.kinds, outcome.objects) == (kinds, objects)

    def test_in_a_crowd_nothing_is_right_or_wrong(self):
        example = row([(self.second, 0.9, 0), ([60.0, 60, 70, 70], 0.8, 0), (self.second, 0.7, 1)], (False, True))
        assert classify(example, example.detections["model"]).kinds == ("crowd", "crowd", "false")

    def test_counts_from_a_score_on(self):
        detections = [(self.first, 0.9, 0), ([0.0, 80, 9, 99], 0.7, 0), ([60.0, 60, 70, 70], 0.6, 0)]
        example = row(detections, crowd=(False, True))
        outcome = classify(example, example.detections["model"])
        counts = [count(example, "model", outcome, least) for least in (0.95, 0.9, 0.7, 0.1)]
        assert counts == [Counts(0, 1, 0), Counts(1, 0, 0), Counts(1, 0, 1), Counts(1, 0, 1)]
        assert str(counts[-1]) == "1 hit, 0 missed, 1 false" and counts[-1].errors == 1

    def test_best_threshold(self):
        """F1 of the best 1, 2, 3 of these: 2/3, 1/2, 4/5 with two objects."""
        example = row([(self.first, 0.9, 0), ([0.0, 80, 9, 99], 0.7, 0), (self.second, 0.5, 0), (self.second, 0.2, 0)])
        outcomes = [classify(example, example.detections["model"])]
        assert best_threshold([example], "model", outcomes) == pytest.approx(0.5)

    def test_best_threshold_without_a_hit(self):
        for example in (row([]), row([(self.first, 0.9, 3)])):
            assert best_threshold([example], "model", [classify(example, example.detections["model"])]) == 0.5


def shows(path, kind, region=(0, 1)):
    """Whether the part of a picture between two shares of its width has pixels of a kind's colour, legend aside."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    pixels = pixels[: int(0.85 * len(pixels)), int(region[0] * pixels.shape[1]) : int(region[1] * pixels.shape[1])]
    color = [int(KINDS[kind].color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels - color).max(axis=-1) < 12).sum() > 30)


class TestSheet:
    def test_kinds_are_drawn_in_their_columns(self, tmp_path):
        hit_and_false = [(TestOutcomes.first, 0.9, 0), ([60.0, 5, 95, 30], 0.8, 1)]
        draw_sheet(
            [row(hit_and_false)], tmp_path / "new" / "sheet.png", class_names={0: "cat", 1: "dog"}, threshold=0.5
        )
        path, left, right = tmp_path / "new" / "sheet.png", (0, 0.5), (0.5, 1)
        assert shows(path, "object", left) and not shows(path, "object", right)
        assert all(shows(path, kind, right) and not shows(path, kind, left) for kind in ("hit", "false", "missed"))

    def test_threshold_hides_weak_detections(self, tmp_path):
        weak = [(TestOutcomes.first, 0.4, 0), (TestOutcomes.second, 0.9, 0)]
        for threshold, missed in ((0.3, False), (0.5, True)):
            draw_sheet([row(weak)], tmp_path / "sheet.png", class_names={0: "cat"}, threshold=threshold)
            assert shows(tmp_path / "sheet.png", "missed", (0.5, 1)) == missed

    def test_each_model_has_its_own_threshold(self, tmp_path):
        example = row([(TestOutcomes.first, 0.4, 0), (TestOutcomes.second, 0.9, 0)])
        both = replace(example, detections={"a": example.detections["model"], "b": example.detections["model"]})
        thresholds = {"a": 0.3, "b": 0.5}
        draw_sheet([both], tmp_path / "sheet.png", class_names={0: "cat"}, threshold=thresholds)
        assert not shows(tmp_path / "sheet.png", "missed", (1 / 3, 2 / 3))
        assert shows(tmp_path / "sheet.png", "missed", (2 / 3, 1))

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_nothing_is_cut_at_the_edges(self, tmp_path, number):
        """Titles of sheets with few images were."""
        example = row([(TestOutcomes.first, 0.9, 0)])
        draw_sheet([example] * number, tmp_path / "sheet.png", class_names={0: "cat"})
        with Image.open(tmp_path / "sheet.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        assert all((edge > 250).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))

    def test_nothing_to_draw_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="A sheet needs images and models; it got 0 images"):
            draw_sheet([], tmp_path / "sheet.png", class_names={})

    def test_models_on_a_data_set(self, tmp_path):
        """Two families, one with fewer classes than the data set; both are left in the mode they were in."""
        student = zoo.build("detr", classes=3).train()
        models = {
            "teacher": (zoo.build("rt_detr"), scenes.processor()),
            "student": (student, scenes.processor(student)),
        }
        draw_comparison(models, scenes.Scenes(5), tmp_path / "sheet.png", number=3)
        assert student.training and not models["teacher"][0].training
        with Image.open(tmp_path / "sheet.png") as picture:
            assert picture.width > picture.height * 0.9
        assert shows(tmp_path / "sheet.png", "object", (0, 1 / 3))


def test_a_sheet_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    (tmp_path / "sheet.png").write_bytes(b"the one before")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space"):
        draw_sheet([row([([10.0, 10, 40, 40], 0.9, 0)])], tmp_path / "sheet.png", class_names={0: "a", 1: "b"})
    assert (tmp_path / "sheet.png").read_bytes() == b"the one before"
