"""benchmark.py latency: the rows of a small comparison, and backends that fail."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from scenes import processor

from hf_detrkd.commands import benchmark, latency
from hf_detrkd.evaluation.cost import environment


def saved(folder, **overrides) -> str:
    model = zoo.build("rt_detr", **overrides)
    model.save_pretrained(folder)
    processor(model).save_pretrained(folder)
    return str(folder)


def test_teacher_beside_student(tmp_path, capsys):
    places = {name: saved(tmp_path / name, decoder_layers=layers) for name, layers in (("t", 3), ("s", 1))}
    flags = ["--model_name_or_path", places["s"], "--teacher_model_name_or_path", places["t"], "--device", "cpu"]
    flags += ["--backends", "torch", "--batch_sizes", "1", "2", "--warmup", "1", "--rounds", "3", "--side", "80"]
    results = benchmark.main(["latency", *flags, "--output", str(tmp_path / "latency.json")])
    assert json.loads((tmp_path / "latency.json").read_text())["rows"] == results["rows"]
    keys = [(row["batch_size"], row["model"], row["backend"], row["scope"]) for row in results["rows"]]
    scopes = ("model", "end to end")
    assert keys == [(n, role, "torch", scope) for n in (1, 2) for role in ("teacher", "student") for scope in scopes]
    for row in results["rows"]:
        assert 0 < row["median"] <= row["p95"] and row["rounds"] == 3
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / row["median"])
    assert results["models"]["student"]["input"] == [zoo.SIZE, zoo.SIZE]
    assert results["environment"]["threads"] == torch.get_num_threads() and results["environment"]["device"]
    printed = capsys.readouterr().out
    assert "p95 (ms)" in printed and "end to end" in printed and "load" in printed


def test_a_backend_that_fails_is_a_row(monkeypatch):
    model = zoo.build("rt_detr")
    timed = latency.Timed(model, processor(model), (zoo.SIZE, zoo.SIZE))
    calls = latency._calls

    def some(timed, backend, images, folder):
        if backend == "onnx":
            raise RuntimeError("rt_detr could not be exported\nlong story")
        return calls(timed, backend, images, folder)

    monkeypatch.setattr(latency, "_calls", some)
    images = [torch.zeros(3, 40, 40, dtype=torch.uint8)]
    rows = latency.latency_rows({"student": timed}, images, ["onnx", "torch"], warmup=0, rounds=1)
    assert rows[0]["failed"] == "RuntimeError: rt_detr could not be exported"
    assert [row["backend"] for row in rows[1:]] == ["torch", "torch"]
    assert "student with onnx, batch 1: RuntimeError: rt_detr could not be exported" in latency.latency_table(rows)


def test_onnx_beside_a_gpu_runs_on_the_gpu(monkeypatch):
    """onnxruntime without CUDA would take the CPU in silence, in a row under the GPU's name."""
    pytest.importorskip("onnxruntime")
    with pytest.raises(RuntimeError, match=r"onnxruntime has no CUDAExecutionProvider .*onnxruntime-gpu"):
        latency.onnx_providers(torch.device("cuda"))
    assert latency.onnx_providers(torch.device("cpu")) == ["CPUExecutionProvider"]


def test_images_of_a_data_set_start_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path))
    arguments = latency.LatencyArguments(dataset_name=f"shapes:train=2,validation=2,test=2,size={zoo.SIZE}")
    images = latency.read_images(arguments, 3)
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


def test_refused():
    with pytest.raises(ValueError, match=r"--backends has \['tensorrt'\]; allowed are torch, compiled, onnx"):
        latency.main(["--model_name_or_path", "x", "--backends", "tensorrt"])
    with pytest.raises(ValueError, match="--model_name_or_path is missing"):
        latency.main([])


def test_environment(monkeypatch):
    monkeypatch.delattr("os.getloadavg")  # as on Windows
    here = environment()
    assert here["torch"] == torch.__version__.split("+")[0] or here["torch"] == torch.__version__
    assert here["cores"] >= 1 and here["load"] >= 0


def test_default_configs_are_not_installed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"student\.json: there is no such file.*with --student and --teacher"):
        benchmark.build(str(tmp_path / "student.json"))
