"""The settings of a run: defaults, parsing, schedule, refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_detrkd import DistillationConfig


def config(**settings) -> DistillationConfig:
    return DistillationConfig(output_dir="unused", use_cpu=True, **settings)


def parse(*flags: str) -> DistillationConfig:
    (parsed,) = HfArgumentParser(DistillationConfig).parse_args_into_dataclasses(
        ["--output_dir", "unused", "--use_cpu", *flags]
    )
    return parsed


def test_defaults():
    args = config()
    assert isinstance(args, TrainingArguments)
    expected = {
        "method": ["auto"],
        "method_config": None,
        "detection_weight": 1.0,
        "kd_weight": 1.0,
        "kd_warmup_steps": 0,
        "kd_stop": 0,
        "kd_decay": "none",
        "kd_every": 1,
        "layer_supervision": True,
        "backbone_lr_factor": 0.1,
        "ema_decay": 0.9999,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "max_grad_norm": 0.1,
        "logging_steps": 10,
        "remove_unused_columns": False,
        "batch_eval_metrics": True,
        "metric_for_best_model": "eval_map",
        "greater_is_better": True,
        "compile_models": False,
        "bf16": False,
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_defaults_are_not_shared():
    first = config()
    first.method.append("other")
    assert config().method == ["auto"]


def test_bf16_where_the_device_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    # Its own would look for the device
    monkeypatch.setattr(
        TrainingArguments, "__post_init__", lambda self: setattr(self, "accelerator_config", AcceleratorConfig())
    )
    monkeypatch.setattr(DistillationConfig, "gradient_checkpointing_kwargs", None, raising=False)
    assert DistillationConfig(output_dir="unused").bf16 is True
    assert DistillationConfig(output_dir="unused", bf16=False).bf16 is False
    assert DistillationConfig(output_dir="unused", fp16=True).bf16 is False
    assert DistillationConfig(output_dir="unused", use_cpu=True).bf16 is False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert DistillationConfig(output_dir="unused").bf16 is False


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("logit_kd", ["logit_kd"]),
        ("logit_kd,kd_detr", ["logit_kd", "kd_detr"]),
        (" logit_kd , kd_detr ", ["logit_kd", "kd_detr"]),
        (["logit_kd", "kd_detr"], ["logit_kd", "kd_detr"]),
        (("logit_kd",), ["logit_kd"]),
        ("none", ["none"]),
    ],
)
def test_method(given, expected):
    assert config(method=given).method == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none", "kd_detr"], r"`method` is \['none', 'kd_detr'\]: `none` means no distillation and can't be combined"),
        ("kd_detr,kd_detr", r"`method` names kd_detr more than once"),
        ([], r"`method` is \[\]; name a method, or `none`"),
        ("", r"`method` is ''; name a method, or `none`"),
        ("kd_detr,", r"`method` is 'kd_detr,'; name a method, or `none`"),
    ],
)
def test_methods_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        config(method=given)


def test_json():
    given = '{"temperature": 2, "weights": {"class": 1}}'
    assert config(method="kd_detr", method_config=given).method_config == {"temperature": 2, "weights": {"class": 1}}
    assert config(method="kd_detr", method_config={"temperature": 2}).method_config == {"temperature": 2}
    assert config(teacher_model_init_kwargs='{"dtype": "bfloat16"}').teacher_model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize("name", ["method_config", "teacher_model_init_kwargs"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{temperature: 2}", r"is not JSON \(Expecting property name.*\): {temperature: 2}"),
        ("[1]", r"must be a dict or a JSON object such as {\"temperature\": 2}, got: \[1\]"),
        ("null", r"must be a dict or a JSON object|^$"),
        (5, r"must be a dict or a JSON object.* got: 5"),
    ],
)
def test_json_that_is_refused(name, given, message):
    if given == "null":
        assert getattr(config(**{name: given}), name) is None
        return
    with pytest.raises(ValueError, match=f"`{name}` {message}"):
        config(**{name: given})


def test_tokens_are_not_written_down(tmp_path):
    """What `to_dict` gives goes to trackers, and the files of tensorboard to the Hub."""
    args = config(hub_token="hf_secret", teacher_model_init_kwargs={"token": "hf_secret", "revision": "v1"})
    assert "hf_secret" not in args.to_json_string()
    assert args.to_dict()["teacher_model_init_kwargs"] == {"token": "<TOKEN>", "revision": "v1"}
    assert args.teacher_model_init_kwargs["token"] == args.hub_token == "hf_secret"
    assert config(teacher_model_init_kwargs={"token": True}).to_dict()["teacher_model_init_kwargs"] == {"token": True}


def schedule(args: DistillationConfig, steps, of: int) -> list[float]:
    return [args.kd_scale(step, of) for step in steps]


def test_kd_scale_is_constant_by_default():
    assert schedule(config(), range(5), 5) == [1] * 5
    assert schedule(config(kd_weight=0.5), range(5), 5) == [0.5] * 5
    assert schedule(config(kd_weight=0), range(5), 5) == [0] * 5


def test_kd_scale_warms_up():
    expected = [0.25, 0.5, 0.75, 1, 1, 1]
    assert schedule(config(kd_warmup_steps=4), range(6), 100) == pytest.approx(expected)
    assert schedule(config(kd_warmup_steps=0.04), range(6), 100) == pytest.approx(expected)
    assert schedule(config(kd_warmup_steps=4, kd_weight=2), range(6), 100) == pytest.approx([2 * x for x in expected])
    assert config(kd_warmup_steps=0.01).kd_scale(0, 10) == 1  # a tenth of a step
    assert config(kd_warmup_steps=1).kd_scale(0, 10) == 1


def test_kd_scale_decays():
    """TADF (methods.md 9.6): r is 1, .75, .5, .25 over four steps; and it ends with the stop."""
    assert schedule(config(kd_decay="linear"), range(4), 4) == [1, 0.75, 0.5, 0.25]
    assert schedule(config(kd_decay="linear", kd_stop=2, kd_weight=3.0), range(4), 4) == [3, 1.5, 0, 0]
    assert schedule(config(kd_decay="cosine"), range(3), 4) == pytest.approx([1, 0.853553, 0.5], abs=1e-6)
    assert schedule(config(kd_decay="linear", kd_warmup_steps=2), range(2), 4) == [0.5, 0.75]


def test_kd_scale_stops():
    expected = [1, 1, 1, 0, 0]
    assert schedule(config(kd_stop=3), range(5), 5) == expected
    assert schedule(config(kd_stop=0.6), range(5), 5) == expected
    assert schedule(config(kd_stop=1), range(3), 5) == [1, 0, 0]
    assert schedule(config(kd_stop=3, kd_warmup_steps=2), range(5), 5) == [0.5, 1, 1, 0, 0]


def test_kd_scale_of_every_second_step_is_twice_as_large():
    assert schedule(config(kd_every=2), range(5), 5) == [2, 0, 2, 0, 2]
    assert schedule(config(kd_every=3, kd_weight=0.5), range(5), 5) == [1.5, 0, 0, 1.5, 0]
    assert schedule(config(kd_every=2, kd_decay="linear", kd_stop=4), range(6), 6) == [2, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detection_weight": -1}, "`detection_weight` is -1; it must be 0 or more"),
        ({"kd_weight": -0.5}, "`kd_weight` is -0.5; it must be 0 or more"),
        ({"kd_weight": float("nan")}, "`kd_weight` is nan; it must be 0 or more"),
        ({"kd_warmup_steps": -1}, "`kd_warmup_steps` is -1"),
        ({"kd_stop": -1}, "`kd_stop` is -1"),
        ({"kd_every": 0}, "`kd_every` is 0; it must be 1"),
        ({"kd_decay": "exp"}, "`kd_decay` is 'exp'; allowed are 'none', 'linear', 'cosine'"),
        ({"backbone_lr_factor": -1}, "`backbone_lr_factor` is -1"),
        ({"gradient_share_steps": -1}, "`gradient_share_steps` is -1"),
        ({"ema_decay": 1.0}, r"`ema_decay` is 1.0; it must be in \[0, 1\), and 0 means no moving average"),
        ({"ema_decay": -0.1}, r"`ema_decay` is -0.1"),
        (
            {"remove_unused_columns": True},
            "would drop the images and labels of a detection data set. Leave it at False",
        ),
        ({"batch_eval_metrics": False}, "would keep every output of the evaluation in memory. Leave it at True"),
        ({"torch_compile": True}, "compiles the whole training step.*Use `compile_models=True`"),
        ({"torch_compile_backend": "inductor"}, "compiles the whole training step"),
        (
            {"bf16_full_eval": True},
            "`bf16_full_eval=True` would cast the student.*`bf16=True` evaluates in bf16 already",
        ),
        (
            {"fp16_full_eval": True},
            "`fp16_full_eval=True` would cast the student.*`fp16=True` evaluates in fp16 already",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "cuts every tensor of a batch.*the tensors inside the labels.*Leave it out",
        ),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "silently lose their gradient. Use `use_reentrant=F",
        ),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("given", [None, {}, {"even_batches": False}, AcceleratorConfig()])
def test_every_process_makes_its_own_batches(given):
    assert config(accelerator_config=given).accelerator_config.dispatch_batches is False


def test_reentrant_checkpointing_under_its_new_name():
    if not hasattr(TrainingArguments, "activation_checkpointing_kwargs"):
        pytest.skip("this transformers has the old name only")
    with pytest.raises(ValueError, match="silently lose their gradient"):
        config(activation_checkpointing_kwargs={"use_reentrant": True})
    config(activation_checkpointing_kwargs={"use_reentrant": False})


# ---------------------------------------------------------------------------------------------------- HfArgumentParser


def test_flags_default_to_the_defaults():
    parsed, expected = parse().to_dict(), config().to_dict()
    assert {name: (value, expected[name]) for name, value in parsed.items() if value != expected[name]} == {}


@pytest.mark.parametrize(
    ("flags", "name", "expected"),
    [
        (["--method", "logit_kd"], "method", ["logit_kd"]),
        (["--method", "logit_kd", "kd_detr"], "method", ["logit_kd", "kd_detr"]),
        (["--method", "logit_kd,kd_detr"], "method", ["logit_kd", "kd_detr"]),
        (["--method", "qskd", "--method_config", '{"temperature": 2}'], "method_config", {"temperature": 2}),
        (["--teacher_model_init_kwargs", '{"dtype": "auto"}'], "teacher_model_init_kwargs", {"dtype": "auto"}),
        (["--kd_warmup_steps", "0.1"], "kd_warmup_steps", 0.1),
        (["--kd_stop", "500"], "kd_stop", 500.0),
        (["--layer_supervision", "false"], "layer_supervision", False),
        (["--no_layer_supervision"], "layer_supervision", False),
        (["--compile_models"], "compile_models", True),
        (["--greater_is_better", "false"], "greater_is_better", False),
        (["--learning_rate", "2e-4"], "learning_rate", 2e-4),
        (["--bf16"], "bf16", True),
        (["--bf16", "true"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--ema-decay", "0"], "ema_decay", 0.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags(flags, name, expected):
    assert getattr(parse(*flags), name) == expected


def test_round_trip():
    """What a run writes down gives the run's settings again."""
    args = config(
        method=["logit_kd", "kd_detr"],
        method_config={"kd_detr": {"temperature": 2, "weights": {"specific_l1": 1}}},
        kd_stop=0.9,
        layer_supervision=False,
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        ema_decay=0,
    )
    (again,) = HfArgumentParser(DistillationConfig).parse_dict(args.to_dict())
    assert again.to_dict() == args.to_dict()
    assert again.method_config["kd_detr"]["weights"] == {"specific_l1": 1}
