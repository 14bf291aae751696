"""Every message in docs/troubleshooting.md is one that is really raised: each is provoked here, and compared word by word."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_datasets
import torch
import yaml
import zoo
from documents import ROOT, blocks
from huggingface_hub import constants
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors.torch import save_file
from scenes import processor
from transformers import (
    DetrImageProcessor,
    DetrModel,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

import hf_detrkd.export
from hf_detrkd import (
    DetectionDataset,
    DistillationConfig,
    DistillationModel,
    DistillationTrainer,
    adapter_for,
    load_detection_dataset,
)
from hf_detrkd.backbones import load_backbone_weights
from hf_detrkd.commands import predict, setup
from hf_detrkd.commands.arguments import DataArguments, ModelArguments, parse
from hf_detrkd.commands.distill import DistillArguments, prepare
from hf_detrkd.commands.grid_file import read_grid
from hf_detrkd.commands.resuming import checkpoint_to_resume, same_settings
from hf_detrkd.commands.setup import write_json
from hf_detrkd.data import check_dataset, keep_classes
from hf_detrkd.evaluation.coco_detection import coco_evaluator
from hf_detrkd.labels import LabelMap
from hf_detrkd.methods import build_methods
from hf_detrkd.publishing import PushError, explain, open_repository
from hf_detrkd.reporting.writing import saving_weights
from hf_detrkd.students import make_student

PAGE = ROOT / "docs" / "troubleshooting.md"
CLASSES = {0: "cat", 1: "dog", 2: "bird"}
LEAST = 30
"""Letters that a quoted message must have besides its `...`."""

Trouble = Callable[[pytest.MonkeyPatch], Any]
"""Runs in an empty folder; raises the message or returns what is printed."""


# ---------------------------------------------------------------------------------------------------------------- data


def one_image(box=(8, 8, 20, 16), suffix: str = ".jpg", **line) -> datasets.DatasetDict:
    """An imagefolder of one image of 64 x 48 pixels with one object."""
    folder = Path("data") / "train"
    folder.mkdir(parents=True)
    tiny_datasets.picture((64, 48)).save(folder / f"street{suffix}")
    line = {"file_name": f"street{suffix}", "objects": {"bbox": [list(box)], "category": ["car"]}, **line}
    (folder / "metadata.jsonl").write_text(json.dumps(line))
    return load_detection_dataset("data")


def no_objects() -> datasets.DatasetDict:
    Path("data").mkdir()
    Path("data/categories.json").write_text('["car"]')
    return one_image(objects={"bbox": [], "category": []})


def missing_image() -> datasets.DatasetDict:
    data = one_image(width=64, height=48)
    Path("data/train/street.jpg").unlink()
    return data


def class_from_one() -> None:
    for name in ("images", "labels"):
        Path("yolo", name).mkdir(parents=True)
    tiny_datasets.picture((64, 48)).save("yolo/images/street.jpg")
    Path("yolo/labels/street.txt").write_text("2 0.5 0.5 0.2 0.2\n")
    Path("yolo/data.yaml").write_text("train: images\nnames: [car, dog]\n")
    load_detection_dataset("yolo")


def other_columns() -> None:
    row = {"image": tiny_datasets.picture((8, 8)), "label": 0}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_list([row], features=features).save_to_disk("saved")
    load_detection_dataset("saved")


def two_pictures() -> None:
    objects = {"bbox": [[1.0, 1.0, 4.0, 4.0]], "category": ["car"]}
    row = {"depth": tiny_datasets.picture((8, 8)), "photo": tiny_datasets.picture((8, 8)), "objects": objects}
    datasets.Dataset.from_list([row]).save_to_disk("saved")
    load_detection_dataset("saved")


def empty_folder() -> None:
    Path("empty").mkdir()
    load_detection_dataset("empty")


def broken_inside() -> None:
    split = one_image(suffix=".png")["train"]
    file = Path("data/train/street.png")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    file.write_bytes(content)
    DetectionDataset(split)[0]


def tiny_data() -> str:
    return str(tiny_datasets.write_coco(Path("path") / "to" / "data"))


DATA: list[Trouble] = [
    lambda patch: check_dataset(one_image((8, 8, 60, 44))),
    lambda patch: check_dataset(one_image((0.3, 0.3, 0.2, 0.2))),
    lambda patch: class_from_one(),
    lambda patch: check_dataset(no_objects()),
    lambda patch: check_dataset(missing_image()),
    lambda patch: check_dataset(one_image(width=48, height=64)),
    lambda patch: load_detection_dataset("./nowhere"),
    lambda patch: empty_folder(),
    lambda patch: other_columns(),
    lambda patch: two_pictures(),
    lambda patch: setup.load_data(DataArguments(dataset_name=tiny_data(), dataset_train_split="labelled"), seed=0),
    lambda patch: keep_classes(load_detection_dataset(tiny_data()), ["cow"]),
    lambda patch: broken_inside(),
]


# -------------------------------------------------------------------------------------------------- classes and models


def image_classifier() -> ResNetForImageClassification:
    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))


def half_a_backbone() -> None:
    model = zoo.build("rt_detr")
    name = next(name for name in model.state_dict() if name.startswith("model.backbone.model.embedder"))
    save_file({name.removeprefix("model.backbone.model."): model.state_dict()[name]}, "backbone.safetensors")
    load_backbone_weights(model, "backbone.safetensors")


def unknown_backbone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    make_student(zoo.build("rt_detr"), backbone="resnet19vd")


def other_classes() -> None:
    data = DetectionDataset(load_detection_dataset(tiny_data())["train"])
    DistillationTrainer(zoo.build("detr", classes=2), args=config(method="none"), train_dataset=data)


def no_teacher() -> None:
    prepare(ModelArguments(), DataArguments(dataset_name=tiny_data()), DistillArguments(), config())


MODELS: list[Trouble] = [
    lambda patch: LabelMap.between({0: "person", 1: "truck"}, CLASSES),
    lambda patch: LabelMap.between({0: "Cat", 1: "dog"}, {0: "cat", 1: "dogs"}).table(),
    lambda patch: other_classes(),
    lambda patch: setup.build_detector(ModelArguments(), None),
    lambda patch: no_teacher(),
    lambda patch: adapter_for(image_classifier()),
    lambda patch: adapter_for(DetrModel(zoo.config("detr"))),
    lambda patch: DistillationTrainer(zoo.build("detr").to(torch.bfloat16), args=config(method="none")),
    lambda patch: make_student(zoo.build("detr"), d_model=10),
    lambda patch: make_student(zoo.build("detr"), decoder_layers=9),
    lambda patch: make_student(zoo.build("yolos"), decoder_layers=1),
    unknown_backbone,
    lambda patch: half_a_backbone(),
    lambda patch: adapter_for(zoo.build("rt_detr", num_queries=300)).forward(zoo.batch(labels=False)),
]


# ------------------------------------------------------------------------------------------------ methods and settings


def methods(names: str, settings: dict | None = None, student: str = "rt_detr", teacher: str = "rt_detr", **of_student):
    build_methods(
        names.split(), settings, adapter_for(zoo.build(student, **of_student)), adapter_for(zoo.build(teacher))
    )


def config(**settings) -> DistillationConfig:
    return DistillationConfig(output_dir="run", use_cpu=True, **settings)


def unknown_setting() -> None:
    Path("recipe.yaml").write_text("learning_rat: 0.1\n")
    parse((DataArguments, DistillationConfig), ["--config", "recipe.yaml"])


def two_gpus(patch: pytest.MonkeyPatch) -> None:
    args = config()
    patch.setattr(DistillationConfig, "n_gpu", 2)
    DistillationTrainer(zoo.build("rt_detr"), zoo.build("rt_detr"), args)


def maps_under_checkpointing() -> None:
    model = zoo.build("detr").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter_for(model).forward(zoo.batch(), attentions=True)


def without_labels() -> None:
    model = zoo.build("rt_detr")
    DistillationModel(model, adapter_for(model)).train()(zoo.batch()["pixel_values"])


def diverged() -> None:
    model = zoo.build("rt_detr")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    DistillationModel(model, adapter_for(model)).train()(**zoo.batch())


SETTINGS: list[Trouble] = [
    lambda patch: methods("kd_dert"),
    lambda patch: methods("kd_detr", {"temprature": 2}),
    lambda patch: methods("kd_detr", {"weights": {"class": 1}}),
    lambda patch: methods("logit_kd kd_detr", {"temperature": 2}),
    lambda patch: config(method_config="{temperature: 2}"),
    lambda patch: methods("proposals", teacher="detr"),
    lambda patch: methods("ld", student="d_fine", teacher="d_fine", reg_scale=8.0),
    lambda patch: methods("kd_detr", classes=1),
    lambda patch: unknown_setting(),
    lambda patch: DistillationTrainer(zoo.build("rt_detr"), args=TrainingArguments(output_dir="run", use_cpu=True)),
    lambda patch: DistillationTrainer(zoo.build("rt_detr"), args=config(method="none")),
    lambda patch: config(remove_unused_columns=True),
    lambda patch: config(batch_eval_metrics=False),
    lambda patch: config(torch_compile=True),
    lambda patch: config(gradient_checkpointing_kwargs={"use_reentrant": True}),
    lambda patch: maps_under_checkpointing(),
    two_gpus,
    lambda patch: without_labels(),
    lambda patch: diverged(),
]


# ----------------------------------------------------------------------------------------------------------- afterwards


def trainer(teacher_seed: int = 0, **settings) -> DistillationTrainer:
    models = zoo.build("rt_detr", seed=5), zoo.build("rt_detr", seed=teacher_seed)
    return DistillationTrainer(*models, config(method="logit_kd", **settings), processing_class=processor())


def resumed(**settings) -> None:
    trainer()._save("checkpoint")
    trainer(**settings)._load_from_checkpoint("checkpoint")


def earlier_run() -> None:
    checkpoint = Path("runs/student/checkpoint-2")
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    checkpoint_to_resume(None, Path("runs/student"))


def finished_run() -> None:
    write_json({"student": {"steps": 2}}, "runs/student/results.json")
    checkpoint_to_resume(None, Path("runs/student"))


def other_settings() -> None:
    begun, now = {"kd_weight": 1.0, "learning_rate": 1e-3}, {"kd_weight": 7.0, "learning_rate": 1e-5}
    write_json({"settings": {"DistillationConfig": begun}}, "runs/student/unfinished.json")
    same_settings("runs/student/checkpoint-2", {"DistillationConfig": now})


def unfinished_checkpoint() -> None:
    Path("checkpoint").mkdir()
    trainer()._load_from_checkpoint("checkpoint")


def full_disk() -> None:
    with saving_weights("runs/student", lambda: "runs/student/checkpoint-2"):
        raise OSError(errno.ENOSPC, "No space left on device")


def no_export_extra(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hf_detrkd.export, "find_spec", lambda name: None)
    hf_detrkd.export.needed("onnx", "onnxscript")


def no_video_reader(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(predict, "find_spec", lambda name: None)
    Path("clip.mp4").touch()
    predict.read_pictures(Path("clip.mp4"), 1)


def no_backend(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(coco_evaluator, "_BACKENDS", {"pycocotools": ("no_such_module", "COCOeval")})
    coco_evaluator.CocoEvaluator()


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_repository("USER/NAME")


def no_token() -> None:
    raise PushError(explain(LocalTokenNotFoundError("no token"), "USER/NAME"))


def unfair_grid() -> None:
    grid = {
        "data": {"d": {}},
        "pairs": {"p": {"teacher": "t"}},
        "methods": {"mine": {"learning_rate": 1}},
        "seeds": [0],
    }
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    read_grid("grid.yaml")


AFTERWARDS: list[Trouble] = [
    lambda patch: earlier_run(),
    lambda patch: finished_run(),
    lambda patch: other_settings(),
    lambda patch: resumed(teacher_seed=1),
    lambda patch: resumed(ema_decay=0),
    lambda patch: unfinished_checkpoint(),
    lambda patch: full_disk(),
    lambda patch: hf_detrkd.export.fixed_size(DetrImageProcessor()),
    no_export_extra,
    lambda patch: predict.read_pictures(Path("nowhere.jpg"), 1),
    no_video_reader,
    no_backend,
    lambda patch: no_token(),
    offline,
    lambda patch: unfair_grid(),
]

TROUBLES = [*DATA, *MODELS, *SETTINGS, *AFTERWARDS]
"""In the order of the page."""


def said(trouble: Trouble, patch: pytest.MonkeyPatch) -> str:
    """What the user reads."""
    try:
        return str(trouble(patch))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def pattern(quoted: str) -> str:
    """Of a message whose `...` may be anything and whose lines may be broken elsewhere."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in " ".join(quoted.split()).split("...")]
    return r".*?".join(parts)


QUOTED = blocks(PAGE, "text")


def test_as_many_messages_as_troubles():
    assert len(QUOTED) == len(TROUBLES)


@pytest.mark.parametrize("number", range(len(QUOTED)), ids=lambda number: f"line {QUOTED[number].line}")
def test_message(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quoted = QUOTED[number].text
    assert len(quoted.replace("...", "").strip()) > LEAST
    message = said(TROUBLES[number], monkeypatch)
    assert re.fullmatch(pattern(quoted), message.strip(), re.DOTALL), (
        f"{QUOTED[number]} quotes\n{quoted}\nbut it is\n{message}"
    )
