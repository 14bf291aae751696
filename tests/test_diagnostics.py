"""What explains a gain: measures of a student's and its teacher's views."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
import zoo
from grid_lab import Lab
from PIL import Image
from test_commands import NAMES, SHAPES, save

from hf_detrkd.commands.diagnose import diagnose_cells
from hf_detrkd.diagnostics import agreeing_targets, diagnose, without_partner
from hf_detrkd.families import adapter_for


def view_of(model="rt_detr", seed=0, **overrides):
    batch = zoo.batch()
    adapter = adapter_for(zoo.build(model, seed=seed, **overrides))
    with torch.no_grad():
        _, view = adapter.forward({"pixel_values": batch["pixel_values"]})
    return view, batch["labels"]


def along(view, *places: float):
    """One layer, one image: boxes of side 0.1 at these places, all with the same classes."""
    boxes = torch.tensor([[place, 0.5, 0.1, 0.1] for place in places])
    return replace(view, boxes=boxes[None, None], logits=torch.zeros(1, 1, len(places), zoo.CLASSES))


class TestAgreement:
    def test_an_identical_student_agrees_about_every_target(self):
        view, targets = view_of()
        assert agreeing_targets(view, view, targets).tolist() == [5] * zoo.LAYERS

    @pytest.mark.parametrize("family", ["detr", "deformable_detr", "rt_detr"])
    def test_the_order_of_the_queries_does_not_matter(self, family):
        view, targets = view_of(family)
        order = torch.randperm(zoo.QUERIES, generator=torch.Generator().manual_seed(1))
        other = replace(view, logits=view.logits[:, :, order], boxes=view.boxes[:, :, order])
        assert agreeing_targets(other, view, targets).tolist() == [5] * zoo.LAYERS

    def test_by_hand(self):
        view, _ = view_of()
        target = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.46, 0.5, 0.1, 0.1]])}]
        teacher = along(view, 0.50, 0.40)  # its first query owns the target
        # The first query owns the target in both; its partner is the teacher's second one here, 0.05 + 0.10 < 0.05 + 0.20
        assert agreeing_targets(along(view, 0.45, 0.60), teacher, target).tolist() == [0]
        assert agreeing_targets(along(view, 0.48, 0.30), teacher, target).tolist() == [1]

    def test_other_depths_and_numbers_of_queries(self):
        view, targets = view_of()
        other, _ = view_of(decoder_layers=2, num_queries=9, seed=2)
        counts = agreeing_targets(other, view, targets)
        assert counts.shape == (2,) and (counts >= 0).all() and (counts <= 5).all()

    def test_without_targets(self):
        view, targets = view_of()
        empty = [{name: value[:0] for name, value in target.items()} for target in targets]
        assert agreeing_targets(view, view, empty).tolist() == [0] * zoo.LAYERS


def test_detections_without_an_object():
    view, _ = view_of()
    box = [0.5, 0.5, 0.2, 0.2]
    # found; of another class; elsewhere; IoU 0.13 / 0.27 = 0.48; below the score
    boxes = torch.tensor([box, box, [0.2, 0.2, 0.2, 0.2], [0.57, 0.5, 0.2, 0.2], box])
    logits = torch.full((1, 1, 5, zoo.CLASSES), -9.0)
    for query, (label, logit) in enumerate([(0, 2.0), (1, 2.0), (0, 2.0), (0, 2.0), (0, -2.0)]):
        logits[0, 0, query, label] = logit
    teacher = replace(view, boxes=boxes[None, None], logits=logits)
    target = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([box])}
    assert without_partner(teacher, [target], 0.3) == (4, 3)
    assert without_partner(teacher, [{name: value[:0] for name, value in target.items()}], 0.3) == (4, 4)
    assert without_partner(teacher, [target], 0.99) == (0, 0)


def test_over_batches_with_classes_that_only_one_has():
    batch = zoo.batch()
    teacher = adapter_for(zoo.build("rt_detr", seed=3, classes=3), (0, 1, 2))
    students = {
        name: adapter_for(zoo.build("rt_detr", seed=seed), (0, 1, 2)) for name, seed in (("student", 0), ("twin", 1))
    }
    found = diagnose(students, teacher, [batch, batch], score=0.0)
    assert found["images"] == 4 and found["teacher_detections"] == 4 * zoo.QUERIES
    assert 0 <= found["without_partner"] <= 1
    for shares in found["matching_agreement"].values():
        assert len(shares) == zoo.LAYERS and all(0 <= share <= 1 for share in shares)


def test_cells_of_a_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    lab = Lab(tmp_path, monkeypatch)
    teacher, student = save(tmp_path / "teacher", NAMES), save(tmp_path / "student", NAMES, decoder_layers=2)
    common = {"learning_rate": 0.001, "max_steps": 2, "use_cpu": True, "per_device_eval_batch_size": 2}
    grid = lab.grid(
        common=common,
        data={"shapes": {"dataset_name": SHAPES}},
        pairs={"rt": {"teacher": teacher, "model_name_or_path": student}},
    )
    lab.run(grid, "shapes/rt/logit_kd/seed3")
    for method in ("none", "logit_kd"):
        save(tmp_path / "runs/grid/shapes/rt" / method / "seed3", NAMES, decoder_layers=2)
    found = diagnose_cells(grid, grid.cells, tmp_path / "docs", say=lambda *_: None)
    assert list(found) == ["shapes/rt/logit_kd/seed3"]
    (cell,) = found.values()
    assert cell["images"] == 3 and len(cell["matching_agreement"]["twin"]) == 2
    assert cell["gains"] == {"map": 10.0, "50": 20.0, "small": 10.0, "cell": 10.0}
    assert cell["gradient_shares"] == {"kd": 0.5, "l1": 0.25}
    file = tmp_path / "docs" / "grid_diagnostics.json"
    assert json.loads(file.read_text())["cells"] == found
    with Image.open(tmp_path / "docs" / "grid_diagnostics.png") as picture:
        assert picture.width > 800
    assert yaml.safe_load((tmp_path / "runs/grid/shapes/rt/logit_kd/seed3/recipe.yaml").read_text())["seed"] == 3

    # What was measured elsewhere stays, if it is of this grid
    elsewhere = {"shapes/rt/heavy/seed5": {**cell, "images": 7}, "shapes/rt/gone/seed3": cell}
    file.write_text(json.dumps({"cells": elsewhere}))
    assert diagnose_cells(grid, grid.cells, tmp_path / "docs", say=lambda *_: None) == {
        **found,
        "shapes/rt/heavy/seed5": elsewhere["shapes/rt/heavy/seed5"],
    }
