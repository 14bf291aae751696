"""inspect_data: the numbers of a set that is known, problems by file and row, and sheets."""

from __future__ import annotations

import json

import pytest
import tiny_datasets
from PIL import Image

from hf_detrkd.commands import inspect_data


def run(folder, output, *flags: str) -> dict:
    return inspect_data.main(["--dataset_name", str(folder), "--output_dir", str(output), *flags])


def test_numbers_and_sheets(tmp_path, capsys):
    output = tmp_path / "out"
    results = run(tiny_datasets.write_coco(tmp_path / "coco"), output, "--sheet_images", "2")
    assert json.loads((output / "data.json").read_text()) == results
    train = next(numbers for name, numbers in results["splits"].items() if name == "train")
    # a1: cat 20x12, bird 30x24; a2: nothing; a3: a crowd of dogs and a dog of 8x4
    assert (train["images"], train["images_without_objects"], train["objects"], train["crowd_regions"]) == (3, 1, 3, 1)
    assert {name: row["objects"] for name, row in train["classes"].items()} == {"cat": 1, "dog": 1, "bird": 1}
    assert train["classes"]["dog"]["images"] == 1 and train["imbalance"] == 1.0
    assert (train["small"], train["medium"], train["large"]) == (3, 0, 0)
    assert train["box_width"]["min"] == 8 and train["box_width"]["max"] == 30 and train["box_width"]["median"] == 20
    assert train["box_share_of_image"]["max"] == pytest.approx(30 * 24 / (40 * 30), abs=1e-4)
    assert train["objects_per_image"]["max"] == 2 or train["objects_per_image"]["max"] == 2.0
    assert train["image_sizes"] == {"40x30": 1, "20x50": 1, "32x32": 1}
    assert results["trainable"]
    for split in results["splits"]:
        with Image.open(output / f"sheet_{split}.png") as sheet:
            assert min(sheet.size) > 200
    printed = capsys.readouterr().out
    assert "box share of image" in printed and "bird" in printed


def test_sizes_are_those_that_ap_goes_by(tmp_path):
    """The annotated areas: of a segment, not of its box."""
    folder = tiny_datasets.write_coco(tmp_path / "coco")
    path = folder / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image.update(width=400, height=300)
        Image.new("RGB", (400, 300)).save(folder / "images" / "train" / image["file_name"])
    content["annotations"][0].update(bbox=[0, 0, 200, 200], area=900.0)
    path.write_text(json.dumps(content))
    numbers = run(folder, tmp_path / "out", "--sheet_images", "0")["splits"]["train"]
    assert (numbers["small"], numbers["medium"], numbers["large"]) == (3, 0, 0) and numbers["box_width"]["max"] == 200


def test_problems_by_file_and_row(tmp_path, capsys):
    folder = tiny_datasets.write_coco(tmp_path / "coco")
    broken = next((folder / "images" / "train").glob("a1*"))
    broken.write_bytes(broken.read_bytes()[:60])  # cut off
    annotations = folder / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    over = next(one for one in content["annotations"] if one["bbox"] == [8.0, 16.0, 8.0, 4.0])
    over["bbox"] = [28.0, 16.0, 8.0, 4.0]  # over the edge: repaired
    annotations.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as ended:
        run(folder, tmp_path / "out")
    assert ended.value.code == 1
    results = json.loads((tmp_path / "out" / "data.json").read_text())
    assert not results["trainable"]
    kinds = {problem["problem"]: problem for problem in results["problems"]}
    first = results["problems"][0]  # what stops a run comes first
    assert first["action"] == "stop" and "a1" in first["file"] and first["row"] == "train row 0"
    assert kinds["box over the edge of the image"]["action"] == "repaired"
    assert (tmp_path / "out" / "sheet_train.png").is_file()  # of the images that can be read
    printed = capsys.readouterr().out
    assert "train row 0" in printed and "can't be trained on" in printed


def test_findings_that_are_repaired_are_problems_only_if_strict(tmp_path):
    folder = tiny_datasets.write_coco(tmp_path / "coco")
    annotations = folder / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    next(one for one in content["annotations"] if one["bbox"] == [8.0, 16.0, 8.0, 4.0])["bbox"] = [28.0, 16.0, 8.0, 4.0]
    annotations.write_text(json.dumps(content))
    assert run(folder, tmp_path / "out", "--sheet_images", "0")["trainable"]
    assert not list((tmp_path / "out").glob("*.png"))
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out", "--sheet_images", "0", "--strict", "true")


def test_annotations_that_cannot_be_read(tmp_path, capsys):
    folder = tiny_datasets.write_coco(tmp_path / "coco")
    annotations = folder / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["category_id"] = 12345
    annotations.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run(folder, tmp_path / "out")
    problems = json.loads((tmp_path / "out" / "data.json").read_text())["problems"]
    assert any("12345" in problem["value"] for problem in problems)
    assert "12345" in capsys.readouterr().out
