"""Students made from a teacher: architecture, inherited weights, backbones, and the one-liners of distill.py."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import zoo
from safetensors.torch import save_file
from scenes import processor
from transformers import AutoImageProcessor, AutoModelForObjectDetection, DetrImageProcessor, RTDetrImageProcessor

from hf_detrkd.backbones import find_backbone, pixels_of
from hf_detrkd.commands import distill
from hf_detrkd.commands import make_student as command
from hf_detrkd.commands.arguments import DataArguments, ModelArguments
from hf_detrkd.commands.distill import DistillArguments, prepare
from hf_detrkd.config import DistillationConfig
from hf_detrkd.detectors import load_detector
from hf_detrkd.evaluation.cost import flops, latencies, p95
from hf_detrkd.families import FAMILIES
from hf_detrkd.families.architecture import ARCHITECTURES
from hf_detrkd.inheritance import kept_layers
from hf_detrkd.students import make_student


def layer(model, prefix: str, index: int) -> dict:
    place = f"{prefix}.{index}."
    return {name.removeprefix(place): value for name, value in model.state_dict().items() if name.startswith(place)}


def same(one: dict, other: dict) -> bool:
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_family_has_an_architecture():
    assert ARCHITECTURES.keys() == FAMILIES.keys()


def test_kept_layers():
    assert kept_layers(3, 6) == [1, 3, 5]
    assert kept_layers(4, 6) == [0, 2, 3, 5]
    assert kept_layers(2, 3) == [0, 2]
    assert kept_layers(1, 6) == [5]
    assert kept_layers(6, 6) == list(range(6))


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name != "yolos"])
def test_unchanged_student_is_the_teacher_and_a_shallow_one_has_its_last_layer(name):
    teacher = zoo.build(name)
    inputs = zoo.batch(1, labels=False)
    with torch.no_grad():
        expected = teacher(**inputs)
        copied = make_student(teacher)(**inputs)
    assert torch.equal(copied.logits, expected.logits) and torch.equal(copied.pred_boxes, expected.pred_boxes)

    # three layers (0, 1, 2): two take 0 and 2
    student = make_student(teacher, decoder_layers=2, num_queries=4)
    assert same(layer(student, "model.decoder.layers", 1), layer(teacher, "model.decoder.layers", 2))
    with torch.no_grad():
        output = student(**inputs)
    assert output.logits.shape[1] == 4 and output.logits.isfinite().all()
    assert student.config.id2label == teacher.config.id2label


def untied(name: str):
    """A model whose heads differ from layer to layer, as of a checkpoint."""
    model = zoo.build(name)
    for key, parameter in dict(model.named_parameters(remove_duplicate=False)).items():
        found = re.search(r"(?:^|\.)(?:class|bbox)_embed\.(\d+)\.", key)
        if found:
            module, _, attribute = key.rpartition(".")
            value = torch.nn.Parameter(
                parameter.detach() * (1 + 0.1 * int(found[1]))
            )  # equal at the top and in the decoder
            setattr(model.get_submodule(module), attribute, value)
            model.all_tied_weights_keys.pop(key, None)
    return model


@pytest.mark.parametrize("name", ["d_fine", "rt_detr_v2", "deformable_detr_refine"])
def test_heads_that_differ_stay_different(name, tmp_path):
    """A new model's heads are one parameter, a checkpoint's are not."""
    teacher = untied(name)
    inputs = zoo.batch(1, labels=False)
    with torch.no_grad():
        expected = teacher(**inputs)
        student = make_student(teacher)
        assert torch.equal(student(**inputs).logits, expected.logits)
    shallow = make_student(teacher, decoder_layers=2)
    heads = [layer(shallow, "class_embed", index) for index in (0, 1)]
    assert not torch.equal(heads[0]["weight"], heads[1]["weight"])
    assert same(heads[1], layer(teacher, "class_embed", 2))
    shallow.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert same(loaded.state_dict(), shallow.state_dict())


@pytest.mark.parametrize("name", ["rt_detr", "deformable_detr_two_stage"])
def test_heads_come_with_their_layer(name):
    teacher = zoo.build(name)
    student = make_student(teacher, decoder_layers=1)
    for heads in ("class_embed", "bbox_embed"):
        prefix = f"model.decoder.{heads}"
        assert same(layer(student, prefix, 0), layer(teacher, prefix, 2))
    if name == "deformable_detr_two_stage":  # the entry after the last layer is that of the proposals
        assert same(layer(student, "model.decoder.class_embed", 1), layer(teacher, "model.decoder.class_embed", 3))


@pytest.mark.parametrize("name", ["conditional_detr", "dab-detr"])
def test_what_only_the_first_layer_has(name):
    teacher = zoo.build(name)
    student = make_student(teacher, decoder_layers=1)
    source, own = layer(teacher, "model.decoder.layers", 0), layer(student, "model.decoder.layers", 0)
    last = layer(teacher, "model.decoder.layers", 2)
    only_first = source.keys() - last.keys()
    assert only_first
    for tensor, value in own.items():
        assert torch.equal(value, (source if tensor in only_first else last)[tensor]), tensor


def test_queries_of_groups():
    teacher = zoo.build("lw_detr")
    student = make_student(teacher, num_queries=2)
    all_of, some = (model.state_dict()["model.query_feat.weight"] for model in (teacher, student))
    groups = teacher.config.group_detr
    assert torch.equal(some.unflatten(0, (groups, -1)), all_of.unflatten(0, (groups, -1))[:, :2])


@pytest.mark.parametrize("name", ["detr", "dab-detr", "rt_detr", "d_fine"])
def test_narrower(name):
    teacher = zoo.build(name)
    student = make_student(teacher, d_model=8)
    assert student.num_parameters() < teacher.num_parameters()
    with torch.no_grad():
        assert student(**zoo.batch(1, labels=False)).logits.isfinite().all()


def test_encoder_layers():
    teacher = zoo.build("detr", encoder_layers=4)
    student = make_student(teacher, encoder_layers=2)
    for own, source in ((0, 1), (1, 3)):
        assert same(layer(student, "model.encoder.layers", own), layer(teacher, "model.encoder.layers", source))


# ----------------------------------------------------------------------------------------------------------- backbones

PRESET_CHANNELS = {"resnet18vd": (128, 256, 512), "resnet50vd": (512, 1024, 2048)}


@pytest.mark.parametrize("name", PRESET_CHANNELS)
def test_presets_are_rt_detrs(name):
    backbone = find_backbone(name, [8, 16, 32])
    assert backbone.channels == PRESET_CHANNELS[name]
    assert backbone.config.out_indices == [2, 3, 4]


@pytest.mark.parametrize(
    "name", ["rt_detr", "rt_detr_v2", "d_fine", "detr", "conditional_detr", "deformable_detr", "dab-detr"]
)
def test_timm_backbone(name, tmp_path):
    pytest.importorskip("timm")
    teacher = zoo.build(name)
    student = make_student(teacher, backbone="timm/test_byobnet")  # timm's tiny network for tests
    assert same(layer(student, "model.decoder.layers", 2), layer(teacher, "model.decoder.layers", 2))
    inputs = zoo.batch(1, labels=False)
    with torch.no_grad():
        expected = student(**inputs)
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)(**inputs)
    torch.testing.assert_close(loaded.logits, expected.logits)


def test_backbone_of_a_config_with_weights(tmp_path):
    other = zoo.build("detr", seed=5)
    folder = tmp_path / "other"
    other.config.save_pretrained(folder)  # a detector: its backbone is meant
    place = "model.backbone.model."
    weights = {
        name.removeprefix(place): value.contiguous()
        for name, value in other.state_dict().items()
        if name.startswith(place)
    }
    save_file(weights, tmp_path / "weights.safetensors")
    teacher = zoo.build("detr", seed=6)
    settings = {"backbone": str(folder), "backbone_weights": str(tmp_path / "weights.safetensors")}
    student = make_student(teacher, **settings)
    for name, value in student.state_dict().items():
        source = other if name.startswith("model.backbone.") else teacher
        assert torch.equal(value, source.state_dict()[name]), name
    other.save_pretrained(folder)
    of_the_folder = make_student(teacher, backbone=str(folder), backbone_weights="pretrained")
    for name, value in of_the_folder.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name
    without = make_student(teacher, backbone=str(folder))  # nothing of the teacher's backbone, even where shapes fit
    name = next(name for name in weights if name.endswith("convolution.weight"))
    assert not torch.equal(without.state_dict()[place + name], teacher.state_dict()[place + name])


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("yolos", {"decoder_layers": 1}, "`decoder_layers` of yolos can't be changed: a YOLOS is one ViT"),
        ("lw_detr", {"encoder_layers": 1}, "no transformer encoder"),
        ("lw_detr", {"backbone": "resnet18vd"}, "`backbone` of lw_detr can't be changed: .*windowed ViT"),
        ("detr", {"decoder_layers": 4}, "`decoder_layers` is 4, but the teacher has 3"),
        ("detr", {"num_queries": 0}, "`num_queries` is 0, but the teacher has 6"),
        ("detr", {"settings": {"depht": 1}}, r"\['depht'\], which DetrConfig doesn't have"),
        ("detr", {"backbone_weights": "x.safetensors"}, "goes with `backbone`"),
        ("detr", {"backbone": "resnet_18"}, "no backbone 'resnet_18'.*Near: resnet18"),
        ("detr", {"d_model": 10}, r"`d_model` is 10; with \[2, 2\] attention heads it must be a multiple of 4"),
        ("d_fine", {"decoder_layers": 1}, "No d_fine can be built with {'decoder_layers': 1}: .*tie"),
    ],
)
def test_refused(name, wanted, message):
    with pytest.raises(ValueError, match=message):
        make_student(zoo.build(name), **wanted)


# ------------------------------------------------------------------------------------------------------------ commands


def saved(folder, name: str = "rt_detr", **overrides) -> str:
    model = zoo.build(name, **overrides)
    model.save_pretrained(folder)
    processor(model).save_pretrained(folder)
    return str(folder)


def test_command(tmp_path, capsys):
    teacher = saved(tmp_path / "teacher")
    flags = ["--student_decoder_layers", "1", "--rounds", "2"]
    results = command.main(["--teacher_model_name_or_path", teacher, "--output_dir", str(tmp_path / "student"), *flags])
    student = AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
    assert student.config.decoder_layers == 1
    assert (tmp_path / "student" / "preprocessor_config.json").is_file()
    rows = results["cost"]
    assert rows["student"]["parameters"] == student.num_parameters() < rows["teacher"]["parameters"]
    assert rows["student"]["flops"] < rows["teacher"]["flops"]
    assert rows["student"]["latency"]["median"] > 0
    printed = capsys.readouterr().out
    assert "GFLOPs" in printed and "teacher" in printed and "student" in printed


def test_student_and_twin_of_distill(tmp_path, monkeypatch):
    """The student made from the teacher, with the data's classes; the twin again from the same weights."""
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    names = {0: "circle", 1: "square", 2: "triangle", 3: "hexagon", 4: "spiral"}
    teacher = saved(tmp_path / "teacher", id2label=names)
    data = DataArguments(dataset_name=f"shapes:train=4,validation=2,test=2,size={zoo.SIZE}")
    extra = DistillArguments(student_decoder_layers=2)
    args = DistillationConfig(
        output_dir=str(tmp_path / "run"),
        method=["logit_kd"],
        teacher_model_name_or_path=teacher,
        use_cpu=True,
        report_to=[],
    )
    run = prepare(ModelArguments(), data, extra, args, say=lambda *_: None)
    twin = run.build()
    assert list(run.student.config.id2label.values()) == list(run.data.train.id2label.values())
    assert run.student.config.decoder_layers == 2
    assert same(run.student.state_dict(), twin.state_dict())
    assert same(layer(run.student, "model.decoder.layers", 1), layer(run.teacher, "model.decoder.layers", 2))
    assert run.processor.size["height"] == zoo.SIZE  # the teacher's processor

    with pytest.raises(
        ValueError, match="--student_decoder_layers make the student from the teacher, but --model_name"
    ):
        prepare(ModelArguments(model_name_or_path=teacher), data, extra, args, say=lambda *_: None)
    alone = copy.copy(args)
    alone.teacher_model_name_or_path, alone.method = None, ["none"]
    with pytest.raises(ValueError, match="--teacher_model_name_or_path is needed"):
        prepare(ModelArguments(), data, extra, alone, say=lambda *_: None)


def test_the_teachers_processor_comes_from_where_the_teacher_does(tmp_path, monkeypatch):
    """The same commit, by the same token: a private teacher's couldn't be read, another commit's may be another size."""
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    teacher = saved(tmp_path / "teacher")
    asked = []

    def recorded(load):
        def ask(place, **options):
            asked.append((place, {name: value for name, value in options.items() if name != "dtype"}))
            return load(teacher if place == "org/teacher" else place)

        return ask

    monkeypatch.setattr(distill, "load_detector", recorded(load_detector))
    monkeypatch.setattr(distill.AutoImageProcessor, "from_pretrained", recorded(AutoImageProcessor.from_pretrained))
    args = DistillationConfig(
        output_dir=str(tmp_path / "run"),
        teacher_model_name_or_path="org/teacher",
        teacher_model_revision="v2",
        teacher_model_init_kwargs={"attn_implementation": "eager"},
        use_cpu=True,
        report_to=[],
    )
    private = ModelArguments(token="hf_read", cache_dir=str(tmp_path / "models"), image_size=2 * zoo.SIZE)
    data = DataArguments(dataset_name=f"shapes:train=4,validation=2,test=2,size={zoo.SIZE}")
    run = prepare(private, data, DistillArguments(student_decoder_layers=2), args, say=lambda *_: None)
    place = {"token": "hf_read", "cache_dir": str(tmp_path / "models")}
    assert asked == [
        ("org/teacher", {**place, "revision": "v2", "attn_implementation": "eager"}),
        ("org/teacher", {**place, "revision": "v2"}),
    ]
    assert run.processor.size["height"] == 2 * zoo.SIZE and run.teacher_processor.size["height"] == zoo.SIZE

    asked.clear()
    elsewhere = DistillArguments(student_decoder_layers=2, teacher_image_processor_name=teacher)
    prepare(private, data, elsewhere, args, say=lambda *_: None)
    assert asked[1] == (teacher, place)


# ---------------------------------------------------------------------------------------------------------------- cost


def test_flops_of_a_convolution_and_a_linear_layer():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear = torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Linear(4, 5, bias=False)

        def forward(self, pixel_values):
            return self.linear(self.convolution(pixel_values).mean((2, 3)))

    # 2 * 8 * 8 pixels * 3 * 4, and 2 * 4 * 5
    assert flops(Small(), {"pixel_values": torch.zeros(1, 3, 8, 8)}) == 1536 + 40


@pytest.mark.parametrize("name", zoo.NAMES)
def test_flops_of_every_family(name):
    model = zoo.build(name).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert flops(model, {"pixel_values": zoo.batch(1)["pixel_values"]}) > 0
    assert model.training  # and everything is as it was
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_latencies_run_in_turn():
    calls = []
    result = latencies({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=1, rounds=3)
    assert calls == ["a", "b"] + ["a", "b"] * 3
    assert result["a"].rounds == 3 and 0 <= result["a"].median <= result["a"].p95
    assert p95([float(i) for i in range(21)]) == pytest.approx(19.0)


def test_pretrained_backbones_see_the_pixels_that_they_learned_from(tmp_path, monkeypatch):
    """RT-DETR's images aren't normalised, timm's are; the statistics of a pretrained backbone's batch norms are frozen."""
    pytest.importorskip("timm")
    monkeypatch.setattr("hf_detrkd.students.load_backbone_weights", lambda *_: 0)  # from the Hub
    teacher = zoo.build("rt_detr")
    teacher.save_pretrained(tmp_path / "teacher")
    processor(teacher).save_pretrained(tmp_path / "teacher")
    made = {}
    for weights in ("pretrained", "weights.safetensors"):
        flags = ["--student_backbone", "resnet18", "--student_backbone_weights", weights, "--rounds", "0"]
        place = tmp_path / weights.partition(".")[0]
        command.main(["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--output_dir", str(place), *flags])
        made[weights] = AutoImageProcessor.from_pretrained(place)
    assert made["pretrained"].do_normalize and not made["weights.safetensors"].do_normalize
    assert list(made["pretrained"].image_mean) == pytest.approx([0.485, 0.456, 0.406])  # ImageNet's


def test_what_a_pretrained_backbone_saw(tmp_path):
    assert pixels_of("resnet18vd") == {}  # a preset, without weights
    assert pixels_of(str(tmp_path)) == {}  # no image processor there
    DetrImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    assert pixels_of(str(tmp_path))["do_normalize"] is True
    assert list(pixels_of(str(tmp_path))["image_mean"]) == [0.1, 0.2, 0.3]
    RTDetrImageProcessor().save_pretrained(tmp_path)
    assert pixels_of(str(tmp_path)) == {"do_normalize": False}


def test_the_teacher_is_not_overwritten(tmp_path):
    flags = ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--student_decoder_layers", "1"]
    with pytest.raises(ValueError, match="is the teacher's own folder, which the student would overwrite"):
        command.main([*flags, "--output_dir", f"{tmp_path}/teacher/"])
