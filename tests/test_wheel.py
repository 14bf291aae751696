"""The wheel: the whole package and nothing else, and it works where there is no repository."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_entry_points import ROOT

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
"""What pip calls, without pip and its network: a build environment would be downloaded."""

USE = """
import evaluate, json, sys
from importlib.resources import files
from pathlib import Path
import hf_detrkd
from hf_detrkd.__main__ import main
place = Path(hf_detrkd.__file__).parent
assert str(place) == sys.argv[1], place

config = {"model_type": "rt_detr", "backbone_config": {"model_type": "rt_detr_resnet", "embedding_size": 4,
    "hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"]},
    "encoder_in_channels": [8, 8, 8], "encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "encoder_attention_heads": 2,
    "d_model": 16, "decoder_in_channels": [16, 16, 16], "decoder_layers": 2, "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2, "num_queries": 12, "num_denoising": 0}
Path("config.json").write_text(json.dumps(config))
data = ["--dataset_name", "shapes:train=4,validation=2,test=2,size=64", "--image_size", "64"]
train = [*data, "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu", "true", "--report_to", "none",
    "--disable_tqdm", "true", "--save_strategy", "no"]
main(["finetune", "--config_name", "config.json", "--output_dir", "teacher", *train])
assert json.loads(Path("teacher/results.json").read_text())["model"]["latency_ms"] > 0
main(["distill", "--teacher_model_name_or_path", "teacher", "--student_num_queries", "8", "--output_dir", "student",
    "--method", "kd_detr", *train])
written = {path.name for path in Path("student").iterdir()}
assert {"model.safetensors", "results.json", "sheet.png", "report.html", "README.md"} <= written, written

metric = evaluate.load(str(files("hf_detrkd.evaluation") / "coco_detection"))
box = {"boxes": [[10, 10, 50, 50]], "labels": [0]}
metric.add_batch(predictions=[box | {"scores": [0.9]}], references=[box])
print(metric.compute(class_names=["cat"])["map"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built as a user's pip builds it, from the files alone: no earlier build has left anything in them."""
    pytest.importorskip("setuptools", minversion="77")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in package_files(ROOT):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("tests", "scripts"):  # which must not get into it
        (source / folder).mkdir()
        (source / folder / "conftest.py").touch()
    done = subprocess.run([sys.executable, "-c", BUILD, str(output)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(output.glob("*.whl")))


def package_files(root: Path) -> list[str]:
    """Everything in the package's folder that belongs to it."""
    paths = (path for path in (root / "hf_detrkd").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(path.relative_to(root).as_posix() for path in paths)


def test_has_every_file_of_the_package_and_no_other(wheel):
    """A file that isn't Python (a template, the metric's README) gets in by `package-data` of pyproject.toml only."""
    assert sorted(name for name in wheel.namelist() if ".dist-info/" not in name) == package_files(ROOT)


def test_metadata(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["Name"] == "hf_detrkd" and metadata["License-Expression"] == "Apache-2.0"
    assert {"export", "timm", "video", "trackers", "fast"} <= set(metadata.get_all("Provides-Extra"))
    required = {line.split(";")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert not any(name.startswith(("pytest", "onnx", "tensorboard")) for name in required)
    assert b"hf-detrkd = hf_detrkd.__main__:main" in wheel.read(f"{folder}/entry_points.txt")


def test_works_without_the_repository(wheel, tmp_path):
    """Trains, distils and evaluates from an unpacked wheel, which stands before the repository on the path."""
    site, here = tmp_path / "site", tmp_path / "here"
    wheel.extractall(site)
    here.mkdir()
    environment = {
        "PYTHONPATH": str(site),
        "HF_DETRKD_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hub"),
    }
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", USE, str(site / "hf_detrkd")]
    done = subprocess.run(command, cwd=here, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == 1
