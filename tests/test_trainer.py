"""`DistillationTrainer`: what a run trains, logs, saves, resumes and measures."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from scenes import Scenes, processor
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from hf_detrkd import DistillationConfig, DistillationModel, DistillationTrainer
from hf_detrkd.checkpoints import STATE_NAME
from hf_detrkd.data import DetectionCollator
from hf_detrkd.detectors import digest
from hf_detrkd.families import adapter_for
from hf_detrkd.gradient_shares import NoticeIdleTerms, measured_in
from hf_detrkd.methods import build_methods

KD_DETR = {"general_points": 4}


def config(folder, **settings) -> DistillationConfig:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 3, "seed": 7}
    settings.setdefault("method", "kd_detr")
    if settings["method"] == "kd_detr":
        settings.setdefault("method_config", KD_DETR)
    return DistillationConfig(output_dir=str(folder), **{**quiet, **sizes, **settings})


def trainer(folder, student="rt_detr", teacher="rt_detr", classes=zoo.CLASSES, **settings) -> DistillationTrainer:
    student = zoo.build(student, seed=0) if isinstance(student, str) and student in zoo.NAMES else student
    if settings.get("method") == "none":
        teacher = None
    elif isinstance(teacher, str):
        teacher = zoo.build(teacher, seed=3, classes=classes)
    return DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config(folder, **settings),
        train_dataset=Scenes(),
        eval_dataset=Scenes(7, seed=1),
        processing_class=processor(None if isinstance(student, str) else student),
        teacher_processing_class=None if teacher is None else processor(teacher),
    )


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{len(different)} of {len(one)} tensors differ, the first are {different[:3]}"


# -- the twin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["detr", "conditional_detr", "deformable_detr_refine", "rt_detr", "d_fine", "lw_detr"]
)
def test_none_is_plain_trainer_step_for_step(tmp_path, family):
    student = zoo.build(family)
    plain_model = copy.deepcopy(student)
    plain_args = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        per_device_train_batch_size=2,
        max_steps=3,
        seed=7,
        learning_rate=1e-4,
        weight_decay=1e-4,
        max_grad_norm=0.1,
        remove_unused_columns=False,
    )
    collator = DetectionCollator(processor(student))
    # Trainer would pass the labels' extra keys through as they are
    plain = Trainer(plain_model, plain_args, train_dataset=Scenes(), data_collator=collator)
    plain.train()
    ours = trainer(tmp_path, student, method="none", ema_decay=0, backbone_lr_factor=1, layer_supervision=False)
    ours.train()
    assert_equal(state_of(student), state_of(plain_model))
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, ours)]
    assert losses[0] == losses[1] and len(losses[0]) == 3


# -- training --------------------------------------------------------------------------------------------------------


def test_trains_every_part_of_the_student_and_nothing_of_the_teacher(tmp_path):
    run = trainer(tmp_path, ema_decay=0, learning_rate=1e-3)
    before, teacher = state_of(run.student), state_of(run.teacher)
    run.train()
    after = state_of(run.student)
    trainable = {name for name, p in run.student.named_parameters() if p.requires_grad}
    still = [name for name in trainable if torch.equal(before[name], after[name])]
    assert not still
    assert_equal(teacher, state_of(run.teacher))
    assert not run.teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in run.teacher.parameters())
    inside = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not inside & {id(p) for p in run.teacher.parameters()}
    assert inside >= {id(p) for p in run.model.methods.parameters()}


def test_logs_every_part_and_its_share_of_the_gradient(tmp_path):
    run = trainer(tmp_path, gradient_share_steps=2)
    run.train()
    first = run.state.log_history[0]
    terms = run.model.methods["kd_detr"].config.weights
    assert {f"kd_{term}" for term in terms} <= first.keys()
    weighted = sum(weight * first[f"kd_{term}"] for term, weight in terms.items())
    assert first["loss"] == pytest.approx(first["detection_loss"] + weighted, rel=1e-3)
    assert 0 < first["gradient_share_kd"] < 1
    assert all(0 <= first[f"gradient_share_{term}"] <= 1 for term in terms)


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"kd_weight": 1e-5}, True),
        ({"kd_weight": 1e-5, "kd_warmup_steps": 100}, False),
        ({"kd_weight": 1e-5, "kd_every": 2}, True),
    ],
)
def test_distillation_that_does_nothing_is_noticed(tmp_path, monkeypatch, settings, warned):
    said = []
    monkeypatch.setattr("hf_detrkd.gradient_shares.logger.warning", said.append)
    trainer(tmp_path, gradient_share_steps=1, logging_steps=1, **settings).train()
    assert len(said) == warned
    if warned:
        proposed = re.search(r"--kd_weight (\S+) \(now 1e-05\)", said[0])[1]
        again = trainer(tmp_path, gradient_share_steps=1, logging_steps=1, **{**settings, "kd_weight": float(proposed)})
        again.train()
        assert again.state.log_history[0]["gradient_share_kd"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("method", [["kd_detr"], ["features", "kd_detr"]])
def test_terms_that_do_nothing_are_noticed_and_the_weights_that_are_proposed_are_right(tmp_path, monkeypatch, method):
    said = []
    monkeypatch.setattr("hf_detrkd.gradient_shares.logger.warning", said.append)
    config = {"general_points": 7, "weights": {"general_l1": 1e-7, "general_giou": 0.0}}
    settings = {"method": method, "gradient_share_steps": 1, "logging_steps": 1, "kd_decay": "linear"}
    several = len(method) > 1
    trainer(tmp_path, method_config={"kd_detr": config} if several else config, **settings).train()
    (message,) = said
    name = "kd_detr_general_l1" if several else "general_l1"
    named, proposed = re.search(
        r"norm: (.*?)\. The student .*--method_config '(.*)' --kd_decay linear$", message
    ).groups()
    assert re.fullmatch(rf"{name} \d.\d?e-\d\d", named)  # none that is switched off, and no other
    assert f"--method {' '.join(method)} " in message

    said.clear()
    proposed = json.loads(proposed)
    its = proposed["kd_detr"] if several else proposed
    assert its["general_points"] == 7 and its["weights"].keys() == config["weights"].keys()
    again = trainer(tmp_path / "again", method_config=proposed, **settings)
    again.train()
    assert again.state.log_history[0][f"gradient_share_{name}"] == pytest.approx(0.1, abs=0.03)
    assert not said


@pytest.mark.parametrize(
    ("settings", "share", "proposed"),
    [
        ({"kd_warmup_steps": 50}, 0.0056, None),  # 0.44 of the weight when it was measured, more in the mean of the log
        ({"kd_warmup_steps": 30}, 0.0056, 0.02 * (0.3 / 0.7) / (0.0056 / 0.9944) * 22 / 30),
        ({"kd_stop": 30}, 0.0056, 0.02 * (0.3 / 0.7) / (0.0056 / 0.9944)),  # three eighths of it in the mean of the log
    ],
)
def test_the_scale_in_the_steps_that_were_measured_counts(tmp_path, monkeypatch, settings, share, proposed):
    said = []
    monkeypatch.setattr("hf_detrkd.gradient_shares.logger.warning", said.append)
    args = config(tmp_path, kd_weight=0.02, max_steps=200, logging_steps=80, gradient_share_steps=500, **settings)
    notice, state = NoticeIdleTerms([]), TrainerState(max_steps=200)
    notice.on_train_begin(args, state, None)
    state.global_step = 80
    scale = sum(args.kd_scale(step, 200) for step in range(80)) / 80
    notice.on_log(args, state, None, {"gradient_share_kd": share, "kd_scale": scale})
    assert len(said) == (proposed is not None)
    if proposed:
        assert float(re.search(r"--kd_weight (\S+) \(now", said[0])[1]) == pytest.approx(proposed, rel=0.01)


def test_shares_measured_after_the_last_log_are_not_lost(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_detrkd.gradient_shares.logger.warning", said.append)
    run = trainer(tmp_path, max_steps=5, logging_steps=4, gradient_share_steps=5, kd_weight=1e-5)
    run.train()
    assert "gradient_share_kd" in run.state.log_history[-1] and len(said) == 1


def test_weights_are_proposed_for_the_methods_that_run(tmp_path, monkeypatch):
    """Not for those of the settings, which may say nothing of them: instances, or a null in a YAML file."""
    said = []
    monkeypatch.setattr("hf_detrkd.gradient_shares.logger.warning", said.append)
    pair = adapter_for(zoo.build("rt_detr")), adapter_for(zoo.build("rt_detr"))
    for names, given, share in (
        (["kd_detr"], {"general_points": 7, "temperature": 2.0}, "specific_l1"),
        (["features", "kd_detr"], {"features": None, "kd_detr": {"general_points": 7}}, "features_feature"),
    ):
        several = len(names) > 1
        args = config(tmp_path, method=names, method_config=given if several else None, gradient_share_steps=1)
        notice, state = NoticeIdleTerms(build_methods(names, given, *pair)), TrainerState(max_steps=3)
        notice.on_train_begin(args, state, None)
        state.global_step = 3
        logs = {"gradient_share_kd": 0.3, "kd_scale": 1.0, f"gradient_share_{share}": 1e-5, f"kd_{share}": 1.0}
        notice.on_log(args, state, None, logs)
        proposed = json.loads(re.search(r"--method_config '(.*)'", said.pop())[1])
        its, heavier = (proposed["kd_detr"], proposed["features"]) if several else (proposed, proposed)
        assert its["general_points"] == 7 and set(heavier["weights"]) == {share.removeprefix("features_")}


@pytest.mark.parametrize(
    ("max_steps", "every", "kd_every", "measured"),
    [
        (100, 40, 1, [20, 21, 22, 39, 79]),
        (3, 500, 1, [0, 1, 2]),
        (2, 500, 1, [0, 1]),
        (3, 1, 1, [0, 1, 2]),
        (100, 0, 1, []),
        (100, 40, 2, [20, 22, 24, 40, 80]),
        (100, 40, 3, [21, 24, 27, 39, 81]),
        (7, 40, 2, [2, 4, 6]),
    ],
)
def test_gradient_shares_are_not_those_of_the_first_steps(max_steps, every, kd_every, measured):
    """From random weights the task's gradient is a hundred times its usual size there: shares say nothing, and a good run was warned of."""
    taught = range(0, max_steps, kd_every)
    assert [step for step in taught if measured_in(step, max_steps, every, kd_every)] == measured


def test_gradient_share_is_that_of_separate_backward_passes(tmp_path):
    run = trainer(tmp_path, layer_supervision=False, max_grad_norm=0, ema_decay=0)
    batch = run.data_collator([Scenes()[i] for i in (1, 2)])
    model = run.model.train()
    with torch.no_grad():
        _, view = run.teacher_adapter.forward({"pixel_values": batch["pixel_values"]})

    def gradient(kd_scale, detection_weight):
        model.zero_grad()
        model.detection_weight = detection_weight
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        out = model(**batch, teacher_view=view, kd_scale=kd_scale, generator=generator, gradient_norms=True)
        norms = out["gradient_norms"]
        out["loss"].backward()
        squares = [p.grad.square().sum() for p in run.student.parameters() if p.grad is not None]
        return torch.stack(squares).sum().sqrt().item(), norms

    detection, norms = gradient(0.0, 1.0)
    assert norms["detection"].item() == pytest.approx(detection, rel=1e-4)
    kd, norms = gradient(0.5, 0.0)
    assert norms["kd"].item() == pytest.approx(kd, rel=1e-4)


def test_schedule_warms_up_and_leaves_the_teacher_out(tmp_path):
    run = trainer(tmp_path, max_steps=4, kd_warmup_steps=2, kd_stop=0.75)
    calls = []
    original = run._teacher_view
    run._teacher_view = lambda *args: calls.append(run.state.global_step) or original(*args)
    run.train()
    assert calls == [0, 1, 2]
    scales = [log["kd_scale"] for log in run.state.log_history if "kd_scale" in log]
    assert scales == [0.5, 1.0, 1.0, 0.0]


def test_the_teacher_works_in_every_second_step_only(tmp_path):
    run = trainer(tmp_path, max_steps=4, kd_every=2)
    calls = []
    original = run._teacher_view
    run._teacher_view = lambda *args: calls.append(run.state.global_step) or original(*args)
    run.train()
    assert calls == [0, 2]
    logs = [log for log in run.state.log_history if "kd_scale" in log]
    assert [log["kd_scale"] for log in logs] == [2, 0, 2, 0]
    assert ["kd_specific_l1" in log for log in logs] == [True, False, True, False]
    assert ["gradient_share_kd" in log for log in logs] == [True, False, True, False]


def test_classes_that_nothing_teaches_are_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_detrkd.trainer.logger.warning", said.append)
    for weight, warned in ((1.0, 0), (0.0, 1)):
        said.clear()
        trainer(tmp_path, classes=zoo.CLASSES - 2, detection_weight=weight)
        named = [line for line in said if "`detection_weight` is 0" in line]
        assert len(named) == warned and all("class 3, class 4" in line for line in named)


def test_backbone_has_a_learning_rate_of_its_own(tmp_path):
    run = trainer(tmp_path, backbone_lr_factor=0.1, learning_rate=1e-3)
    run.create_optimizer()
    backbone = {id(p) for p in run.model.adapter.feature_module.parameters()}
    for group in run.optimizer.param_groups:
        inside = {id(p) in backbone for p in group["params"]}
        assert len(inside) == 1
        assert group["lr"] == pytest.approx(1e-4 if inside.pop() else 1e-3)
    trainable = sum(p.requires_grad for p in run.model.parameters())
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == trainable


def test_accumulation_is_the_mean_over_micro_batches(tmp_path):
    # DETR's loss is normalised by boxes: equal counts in both micro batches make the means agree
    class Same(Scenes):
        def __getitem__(self, index):
            return super().__getitem__(2)

    states = []
    for size, accumulation in ((2, 1), (1, 2)):
        run = trainer(
            tmp_path,
            "conditional_detr",
            "conditional_detr",
            ema_decay=0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            gradient_share_steps=0,
            optim="sgd",  # Adam blows rounding errors of tiny gradients up to the learning rate
            learning_rate=1e-2,
        )
        run.train_dataset = Same()
        run.train()
        states.append(state_of(run.student))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pair", [("rt_detr", "rt_detr"), ("detr", "conditional_detr")])
def test_bf16_autocast_trains(tmp_path, pair):
    run = trainer(tmp_path, *pair, bf16=True)
    run.train()
    assert all(math.isfinite(log["loss"]) for log in run.state.log_history if "loss" in log)


def test_bf16_evaluates_in_bf16(tmp_path):
    """As the refusal of `bf16_full_eval` says; the weights stay as they are."""
    run = trainer(tmp_path, method="none", bf16=True, max_steps=1)
    seen = []
    layer = next(m for m in run.student.model.encoder.modules() if isinstance(m, torch.nn.Linear))
    layer.register_forward_hook(lambda m, a, output: seen.append((m.training, output.dtype)))
    run.evaluate()
    run.train()
    run.evaluate()
    assert set(seen) == {(training, torch.bfloat16) for training in (True, False)}
    assert run.student.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    states = []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path,
            "conditional_detr",
            "conditional_detr",
            gradient_checkpointing=checkpointing,
            ema_decay=0,
            optim="sgd",
            learning_rate=1e-3,
        )
        run.train()
        states.append(state_of(run.student))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_several_methods_in_one_run(tmp_path):
    run = trainer(tmp_path, method=["logit_kd", "kd_detr"], method_config={"kd_detr": KD_DETR})
    run.train()
    assert {"kd_logit_kd_class", "kd_kd_detr_specific_l1"} <= run.state.log_history[0].keys()


def test_teacher_with_other_pixels(tmp_path):
    student, teacher = zoo.build("rt_detr"), zoo.build("conditional_detr", seed=3)
    large = processor(teacher)
    large.size = {"height": 96, "width": 96}
    run = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config(tmp_path, method="logit_kd"),
        train_dataset=Scenes(),
        processing_class=processor(student),
        teacher_processing_class=large,
    )
    seen = []
    teacher.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["pixel_values"].shape)), with_kwargs=True)
    run.train()
    assert set(seen) == {(2, 3, 96, 96)} or set(seen) == {(2, 3, 96, 96), (1, 3, 96, 96)}


@pytest.fixture
def detr_teacher(tmp_path) -> Path:
    """A teacher that wants normalised pixels, with its image processor."""
    zoo.build("detr", seed=3).save_pretrained(tmp_path / "detr")
    DetrImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path / "detr")
    return tmp_path / "detr"


def sharing(folder, teacher, **more) -> DistillationTrainer:
    """A trainer that isn't told the teacher's image processor."""
    settings = {"method": "logit_kd", **more.pop("settings", {})}
    return DistillationTrainer(
        zoo.build("rt_detr"), teacher, config(folder, **settings), processing_class=processor(), **more
    )


@pytest.mark.parametrize("loaded", [False, True])
def test_teacher_gets_the_pixels_of_the_image_processor_beside_it(tmp_path, detr_teacher, loaded):
    teacher = AutoModelForObjectDetection.from_pretrained(detr_teacher) if loaded else str(detr_teacher)
    batch = sharing(tmp_path, teacher).data_collator([Scenes()[1]])
    expected = AutoImageProcessor.from_pretrained(detr_teacher)(images=[Scenes()[1]["image"]], return_tensors="pt")
    assert torch.equal(batch["teacher_pixel_values"], expected["pixel_values"])


def test_teachers_image_processor_is_loaded_like_the_teacher(tmp_path, detr_teacher, monkeypatch):
    calls = []
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", lambda *a, **k: calls.append((a, k)) or processor())
    options = {"token": "hf_secret", "cache_dir": str(tmp_path), "attn_implementation": "eager"}
    settings = {"teacher_model_name_or_path": str(detr_teacher), "teacher_model_revision": "v1"}
    sharing(tmp_path, None, settings=settings | {"teacher_model_init_kwargs": options})
    own = {"token": "hf_secret", "cache_dir": str(tmp_path), "revision": "v1"}
    assert calls == [((str(detr_teacher),), own)]


def test_teacher_shares_the_students_pixels_where_it_has_no_image_processor(tmp_path, detr_teacher, monkeypatch):
    said = []
    monkeypatch.setattr("hf_detrkd.trainer.logger.warning", said.append)

    def warnings(teacher, **more) -> list[str]:
        said.clear()
        run = sharing(tmp_path, teacher, **more)
        assert "teacher_pixel_values" not in run.data_collator([Scenes()[1]])
        return [message for message in said if "student's pixels" in message]

    (detr_teacher / "preprocessor_config.json").unlink()
    (message,) = warnings(str(detr_teacher))
    assert f"No image processor was loaded from {detr_teacher}" in message and "`teacher_processing_class`" in message
    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", None)  # without a name nothing is looked for
    (message,) = warnings(zoo.build("detr", seed=3))
    assert "DetrForObjectDetection has no `name_or_path`" in message
    assert not warnings(zoo.build("rt_detr", seed=3))
    assert not warnings(str(detr_teacher), teacher_processing_class=processor())
    assert not warnings(str(detr_teacher), data_collator=DetectionCollator(processor()))


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.NAMES)
def test_resume_in_mid_epoch_ends_with_the_same_parameters(tmp_path, family):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_share_steps": 0}
    if family not in zoo.REPLAYED:
        settings |= {"method": "drkd", "method_config": None}
    whole = trainer(tmp_path / "whole", family, family, **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", family, family, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(state_of(whole.student), state_of(resumed.student))
    assert_equal(state_of(whole.model.methods), state_of(resumed.model.methods))


def test_a_run_that_is_at_its_end_trains_no_further_step(tmp_path):
    """Killed in what comes after the training; in mid-epoch transformers takes a step before it looks at the limit."""
    settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert result.global_step == resumed.state.global_step == 3
    assert_equal(state_of(whole.student), state_of(resumed.student))


@pytest.mark.parametrize("family", ["detr", "rt_detr", "deformable_detr_refine", "lw_detr"])
def test_best_model_at_end_restores_every_tensor(tmp_path, family):
    run = trainer(
        tmp_path,
        family,
        family,
        max_steps=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=1e-3,
    )
    run.compute_metrics = lambda batch, compute_result: {"map": 0.0}  # nothing later is better than the first
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = AutoModelForObjectDetection.from_pretrained(tmp_path / "checkpoint-2")
    assert_equal(state_of(run.student), state_of(saved))
    run.save_model(str(tmp_path / "final"))
    assert_equal(state_of(AutoModelForObjectDetection.from_pretrained(tmp_path / "final")), state_of(saved))


def test_a_checkpoint_is_the_plain_student_and_its_average(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3, learning_rate=1e-2)
    raw = {}
    original = run.ema.copy_to_model
    run.ema.copy_to_model = lambda: raw.update(raw or state_of(run.student)) or original()
    run.train()
    folder = tmp_path / "checkpoint-3"
    saved = state_of(AutoModelForObjectDetection.from_pretrained(folder))
    assert_equal(saved, state_of(run.student))  # the average, which the student holds after training
    assert any(not torch.equal(saved[name], raw[name]) for name in saved)
    state = torch.load(folder / STATE_NAME, weights_only=True)
    assert_equal(state["student"], raw)
    assert state["teacher"]["digest"] == digest(run.teacher)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RTDetrForObjectDetection"]


def test_one_process_of_several_saves(tmp_path, monkeypatch):
    """transformers calls `_save` on every process (5.24), whose files would be written over each other."""
    run = trainer(tmp_path)
    monkeypatch.setattr(type(run.args), "should_save", False)
    run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_another_teacher_is_refused_on_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()
    other = trainer(tmp_path / "other", teacher=zoo.build("rt_detr", seed=4), **settings)
    with pytest.raises(ValueError, match="teacher's weights are not those"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    plain = trainer(tmp_path / "plain", ema_decay=0, **settings)
    with pytest.raises(ValueError, match="with a moving average"):
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    twin = trainer(tmp_path / "twin", method="none", **settings)
    with pytest.raises(ValueError, match="with a teacher"):
        twin.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_saved_student_predicts_without_this_package(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.save_model()
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_detrkd":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from PIL import Image
from transformers import pipeline
detect = pipeline("object-detection", model={str(tmp_path)!r})
found = detect(Image.new("RGB", (64, 64)), threshold=0.0)
assert len(found) > 0 and set(found[0]) == {{"score", "label", "box"}}, found
assert not any(name.startswith("hf_detrkd") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=200)


# -- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_streams_and_agrees_with_itself(tmp_path):
    run = trainer(tmp_path)
    first, second = run.evaluate(), run.evaluate()
    assert first["eval_map"] == second["eval_map"]
    assert {"eval_map", "eval_map_50", "eval_map_75", "eval_mar_100", "eval_loss"} <= first.keys()
    prediction = run.predict(Scenes(5, seed=2))
    assert "test_map" in prediction.metrics


def test_persistent_workers_dont_mix_data_sets_up(tmp_path):
    """Trainer caches one evaluation loader under persistent workers and would evaluate the first data set for ever."""
    run = trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    own, other = run.evaluate(), run.evaluate(Scenes(5, seed=2))
    assert own["eval_loss"] != other["eval_loss"]
    assert run.evaluate()["eval_loss"] == own["eval_loss"]
    assert len(run.get_eval_dataloader(Scenes(5, seed=2)).dataset) == 5
    assert run.get_eval_dataloader(run.eval_dataset) is run.get_eval_dataloader(run.eval_dataset)  # no new workers


def test_classes_of_one_name_are_measured_apart(tmp_path):
    """COCO's 91 names have "N/A" eleven times; a metric needs names of its own."""
    student = zoo.build("rt_detr")
    student.config.id2label = dict(enumerate(["N/A", "cat", "N/A", "dog", "N/A"]))
    data = Scenes(3)
    del data.id2label
    arguments = config(tmp_path, method="none")
    run = DistillationTrainer(student, args=arguments, eval_dataset=data, processing_class=processor())
    names = [name.removeprefix("eval_mar_100_") for name in run.evaluate() if name.startswith("eval_mar_100_")]
    assert set(names) <= {"N/A (0)", "cat", "N/A (2)", "dog", "N/A (4)", "small", "medium", "large"}
    assert "cat" in names and any("N/A" in name for name in names)


def test_evaluation_measures_the_average(tmp_path):
    run = trainer(tmp_path, max_steps=1, learning_rate=1e-2)
    loss = run.evaluate()["eval_loss"]
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.zero_()  # the average still has the weights
    assert run.evaluate()["eval_loss"] == loss
    assert all(not p.any() for p in run.student.parameters())


# -- refusals --------------------------------------------------------------------------------------------------------


def test_half_precision_checkpoints_are_trained_in_float32(tmp_path):
    zoo.build("rt_detr").bfloat16().save_pretrained(tmp_path / "half")
    run = trainer(tmp_path, str(tmp_path / "half"), teacher=None, method="none")
    assert run.student.dtype == torch.float32
    with pytest.raises(ValueError, match="Load it in float32"):
        trainer(tmp_path, teacher=zoo.build("rt_detr", seed=3).bfloat16())


def test_model_refuses_training_without_labels_and_methods_of_one_name(tmp_path):
    model = trainer(tmp_path).model
    with pytest.raises(ValueError, match="`labels` is missing"):
        model.train()(torch.zeros(1, 3, zoo.SIZE, zoo.SIZE))
    method = model.methods["kd_detr"]
    with pytest.raises(ValueError, match="each name may stand once"):
        DistillationModel(model.student, model.adapter, [method, method])


def test_refuses_what_cannot_work(tmp_path):
    with pytest.raises(TypeError, match="needs a DistillationConfig"):
        DistillationTrainer(zoo.build("rt_detr"), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="needs a teacher"):
        trainer(tmp_path, teacher=None)
    with pytest.raises(ValueError, match="classes"):
        trainer(tmp_path, zoo.build("rt_detr", classes=3), method="none")
    with pytest.raises(ValueError, match="known methods are"):
        trainer(tmp_path, method="kd_dter")
    with pytest.raises(ValueError, match="knows"):
        trainer(tmp_path, method_config={"temprature": 2})
    with pytest.raises(ValueError, match="`processing_class` is missing"):
        DistillationTrainer(zoo.build("rt_detr"), args=config(Path(tmp_path), method="none"), train_dataset=Scenes())


@pytest.mark.slow  # inductor compiles C++
def test_compiled_backbones_and_encoders_train(tmp_path):
    states = []
    for compiled in (False, True):
        run = trainer(tmp_path, compile_models=compiled, ema_decay=0, optim="sgd", learning_rate=1e-3)
        run.train()
        states.append(state_of(run.student))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-5)
