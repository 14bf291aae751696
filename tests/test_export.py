"""ONNX: the same detections as PyTorch, compared as sets, and the same AP; what can't be exported is refused in words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zoo
from scenes import Scenes, processor
from transformers import DetrImageProcessor

from hf_detrkd import export
from hf_detrkd.commands import export as command
from hf_detrkd.evaluation.agreement import compare_sets, measure, torch_detector
from hf_detrkd.export import OnnxDetector, export_onnx, fixed_size, select


def detections(*rows) -> dict:
    """Rows of score, label, x1, y1, x2, y2."""
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"scores": values[:, 0], "labels": values[:, 1].long(), "boxes": values[:, 2:]}


SIZES = torch.tensor([[100, 50]])


def test_sets_are_equal_in_any_order():
    one = detections((0.9, 0, 0, 0, 10, 10), (0.5, 1, 5, 5, 20, 20), (0.01, 0, 0, 0, 1, 1))
    other = detections((0.5002, 1, 5, 5, 20.1, 20), (0.9, 0, 0, 0, 10, 10))
    difference = compare_sets([one], [other], SIZES)
    assert (difference.detections, difference.unmatched) == (4, 0)  # 0.01 is below the threshold
    assert difference.score == pytest.approx(2e-4, rel=1e-2)
    assert difference.box == pytest.approx(0.1 / 100, rel=1e-3)  # of the longer side


@pytest.mark.parametrize(
    ("other", "unmatched"),
    [
        (detections((0.9, 1, 0, 0, 10, 10)), 2),  # another class
        (detections((0.9, 0, 0, 0, 10, 11)), 2),  # a corner off by 1 % of the side
        (detections((0.8, 0, 0, 0, 10, 10)), 2),  # another score
        (detections(), 1),
        (detections((0.9, 0, 0, 0, 10, 10), (0.9, 0, 0, 0, 10, 10)), 1),  # each has one partner at most
    ],
)
def test_sets_that_differ(other, unmatched):
    assert compare_sets([detections((0.9, 0, 0, 0, 10, 10))], [other], SIZES).unmatched == unmatched


def test_a_partner_may_lie_below_the_threshold():
    difference = compare_sets([detections((0.0503, 0, 0, 0, 1, 1))], [detections((0.0498, 0, 0, 0, 1, 1))], SIZES)
    assert (difference.detections, difference.unmatched) == (1, 0)


@pytest.mark.parametrize("name", ["rt_detr", "detr", "conditional_detr"])
def test_selection_equals_the_image_processors(name):
    tools = processor(zoo.build(name))
    generator = torch.Generator().manual_seed(0)
    classes = 6 if name == "detr" else 5
    logits, boxes = torch.randn(2, 7, classes, generator=generator), torch.rand(2, 7, 4, generator=generator)
    classification = "softmax" if name == "detr" else "sigmoid"
    scores, labels, corners = select(logits, boxes, classification, export._limit(tools, 7))
    output = type("Output", (), {"logits": logits, "pred_boxes": boxes})
    expected = tools.post_process_object_detection(output, threshold=0.0, target_sizes=torch.tensor([[1, 1], [1, 1]]))
    for image in range(2):
        torch.testing.assert_close(scores[image], expected[image]["scores"])
        assert torch.equal(labels[image], expected[image]["labels"])
        torch.testing.assert_close(corners[image], expected[image]["boxes"])


def test_measured_ap_of_detectors_that_are_known():
    """One finds every object, the other only those of the first images: AP tells, and so do the sets."""
    model, data = zoo.build("rt_detr"), Scenes(6)
    targets = [data[index]["target"] for index in range(6)]

    def finds(images: int):
        left = iter(range(6))

        def detector(pixel_values, sizes):
            found = [targets[next(left)] for _ in pixel_values]
            return [
                {"scores": torch.ones(n), "labels": one["labels"][:n], "boxes": one["boxes"][:n]}
                for one in found
                for n in [len(one["labels"]) if int(one["image_id"]) < images else 0]
            ]

        return detector

    detectors = {"pytorch": finds(6), "onnx": finds(3)}
    metrics, difference = measure(detectors, model, processor(model), data, 4)
    assert metrics["pytorch"]["map"] == pytest.approx(1.0) and metrics["onnx"]["map"] < 0.9
    objects = [len(target["labels"]) for target in targets]
    assert (difference.detections, difference.unmatched) == (sum(objects) + sum(objects[:3]), sum(objects[3:]))


def test_size_of_the_input():
    tools, size = fixed_size(processor(zoo.build("rt_detr")))
    assert size == (zoo.SIZE, zoo.SIZE) == (tools.size["height"], tools.size["width"])
    with pytest.raises(ValueError, match=r"keeps the aspect ratio.*Pass --image_size"):
        fixed_size(DetrImageProcessor())
    assert fixed_size(DetrImageProcessor(), (32, 48))[1] == (32, 48)


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnx" else object())
    with pytest.raises(ModuleNotFoundError, match=r"onnx is not installed: pip install hf_detrkd\[export\]"):
        export_onnx(zoo.build("detr"), processor(), "unused")


def test_a_family_that_fails_is_named(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")

    def fails(*args, **kwargs):
        raise torch.onnx.errors.OnnxExporterError("no such operator\nand a long story")

    monkeypatch.setattr(torch.onnx, "export", fails)
    message = r"detr could not be exported to ONNX, by torch .*: OnnxExporterError: no such operator\.$"
    with pytest.raises(RuntimeError, match=message):
        export_onnx(zoo.build("detr"), processor(), tmp_path)


def test_differences_in_words():
    metrics = {"pytorch": {"map": 0.5}, "onnx": {"map": 0.4985}}
    assert command.differences(metrics, {"unmatched": 1, "detections": 100}, 0.2) == []
    problems = command.differences(metrics, {"unmatched": 2, "detections": 100}, 0.1)
    assert problems == ["AP differs by -0.15 points, more than 0.1", "2 of 100 detections have no partner"]


@pytest.mark.timeout(1200)  # an export takes 10 seconds and more of an idle core
def test_exported_model_detects_the_same(tmp_path):
    """RT-DETR, post-processing in the graph; `test_command` has DETR without."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = zoo.build("rt_detr", decoder_layers=1)
    path = export_onnx(model, processor(model), tmp_path, batch_size=2, postprocess=True)
    assert path.stat().st_size > 0
    onnx = OnnxDetector(tmp_path, ["CPUExecutionProvider"], threads=1)
    data = Scenes(3)  # in one call of PyTorch; in two of the graph, the second of one image
    metrics, difference = measure(
        {"pytorch": torch_detector(model, onnx.processor), "onnx": onnx}, model, onnx.processor, data, 3
    )
    assert difference.detections > 0 and difference.unmatched == 0
    assert metrics["onnx"] == pytest.approx(metrics["pytorch"], abs=1e-3)
    outputs = onnx.run(np.zeros((2, 3, zoo.SIZE, zoo.SIZE), np.float32))
    assert len(outputs) == len(json.loads((tmp_path / "onnx.json").read_text())["outputs"])


def test_other_classes_show_before_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "export_onnx", lambda *_, **__: pytest.fail("exported"))
    model = zoo.build("detr")
    model.config.id2label = dict(enumerate(["cat", "dog", "cow", "pig", "hen"]))
    model.save_pretrained(tmp_path / "model")
    processor(model).save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx")]
    with pytest.raises(ValueError, match="share no class name"):
        command.main([*flags, "--dataset_name", f"shapes:train=2,validation=2,test=2,size={zoo.SIZE}"])


def test_without_images_nothing_is_compared(tmp_path, monkeypatch, capsys):
    """The built-in set has other classes than a user's model."""

    def written(model, processor, output, **_):
        output.mkdir()
        (output / "model.onnx").write_bytes(b"onnx")
        return output / "model.onnx"

    monkeypatch.setattr(command, "export_onnx", written)
    monkeypatch.setattr(command, "OnnxDetector", lambda _: SimpleNamespace(signature={}, processor=None))
    model = zoo.build("detr")
    model.save_pretrained(tmp_path / "model")
    processor(model).save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx")]
    assert "metrics" not in command.main(flags)
    assert (tmp_path / "onnx" / "export.json").is_file()
    assert "name images with --dataset_name" in capsys.readouterr().out


@pytest.mark.timeout(1200)
def test_command(tmp_path, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    model = zoo.build("detr", decoder_layers=1)
    model.config.id2label = {0: "circle", 1: "square", 2: "star", 3: "ring", 4: "hexagon"}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "model")
    processor(model).save_pretrained(tmp_path / "model")
    flags = ["--dataset_name", f"shapes:train=2,validation=2,test=2,size={zoo.SIZE}"]
    results = command.main(
        ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx"), *flags]
    )
    assert results["problems"] == [] and results["difference"]["unmatched"] == 0
    assert json.loads((tmp_path / "onnx" / "export.json").read_text())["model_type"] == "detr"
    assert "without a partner" in capsys.readouterr().out
