"""A teacher sharded over processes is the same teacher; a student is not to be sharded."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import sharding_table
import torch
import zoo
from launching import finish, torchrun
from sharding_worker import TEACHER, task_losses
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from hf_detrkd import DistillationConfig
from hf_detrkd.families import adapter_for
from hf_detrkd.sharding import LARGEST_UNIT, shard_teacher, units_of

ROOT = Path(__file__).parents[1]


@pytest.fixture
def group():
    """This process as a group of one: hooks, gathering and freeing are those of many."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("largest", [0, 2_000], ids=["layers", "blocks"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_same_view(group, name, largest):
    """To the bit, with attention maps and replays, twice; single layers as units are the hardest case."""
    model = zoo.build(name).eval().requires_grad_(False)
    sharded = copy.deepcopy(model)
    adapters = adapter_for(model), adapter_for(sharded)
    shard_teacher(adapters[1], torch.device("cpu"), largest)
    inside = {name for name, parameter in sharded.named_parameters() if isinstance(parameter, DTensor)}
    assert inside
    for seed in (0, 1):
        inputs = zoo.batch(labels=False, seed=seed)
        with torch.no_grad():
            (_, own), (_, other) = (adapter.forward(inputs, attentions=True) for adapter in adapters)
            views = [(own, other)]
            if adapters[0].replays:
                views.append((own.replay(own.queries), other.replay(other.queries)))
        for one, two in views:
            for part in ("logits", "boxes", "hidden_states", "memory", "features"):
                torch.testing.assert_close(getattr(two, part), getattr(one, part), rtol=0, atol=0)
            maps = one.cross_attentions.weights, two.cross_attentions.weights
            torch.testing.assert_close(maps[1], maps[0], rtol=0, atol=0)
        freed = {name for name, parameter in sharded.named_parameters() if isinstance(parameter, DTensor)}
        assert freed == inside


def test_compiled(group):
    """`compile_models`, in the order of the trainer; the gathering breaks the graphs and stays outside of them."""
    model = zoo.build("rt_detr").eval().requires_grad_(False)
    adapters = adapter_for(model), adapter_for(copy.deepcopy(model))
    shard_teacher(adapters[1], torch.device("cpu"), 2_000)
    for module in adapters[1].before_decoder:
        module.compile(backend="eager")
    for seed in (0, 1):
        inputs = zoo.batch(labels=False, seed=seed)
        with torch.no_grad():
            (_, own), (_, other) = (adapter.forward(inputs) for adapter in adapters)
        torch.testing.assert_close(other.logits, own.logits)
        torch.testing.assert_close(other.features, own.features)


@pytest.mark.parametrize("name", zoo.REPLAYED)
def test_the_decoder_stays_whole(name):
    """What methods replay, once per number of targets in the batch where the decoder takes no mask."""
    adapter = adapter_for(zoo.build(name))
    inside = {id(p) for unit in units_of(adapter.before_decoder, 0) for p in unit.parameters()}
    assert inside.isdisjoint(map(id, adapter.decoder.parameters()))
    before = [parameter for module in adapter.before_decoder for parameter in module.parameters()]
    assert sum(p.numel() for p in before if id(p) in inside) >= 0.9 * sum(p.numel() for p in before)


def test_units_are_the_largest_modules_that_are_called():
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))  # 40 parameters
    model = nn.ModuleDict(
        {"stages": nn.ModuleList([block, nn.Linear(4, 8)]), "scale": nn.ParameterList([nn.Parameter()])}
    )
    model["norm"] = nn.ReLU()
    assert list(units_of([model], 40)) == [block, model["stages"][1]]
    assert list(units_of([model], 39)) == [block[0], block[1], model["stages"][1]]
    assert list(units_of([block], 40)) == [block]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sharding")
    finish(torchrun(2, Path(__file__).with_name("sharding_worker.py"), str(folder)))
    return json.loads((folder / "result.json").read_text())


def test_two_processes_train_alike_with_a_sharded_teacher(trained):
    whole, sharded = trained["logs"]
    assert [log["loss"] for log in whole] == [log["loss"] for log in sharded] and len(whole) == 3
    names = [name for name in whole[0] if name.startswith("kd_")]
    assert len(names) > 4 and all(
        one[name] == two[name] for one, two in zip(whole, sharded, strict=True) for name in names
    )
    assert trained["unlike"] == [[], []]  # after a resume neither


def test_each_process_holds_a_share(trained):
    adapter = adapter_for(zoo.build(TEACHER))
    inside = sum(p.numel() for unit in units_of(adapter.before_decoder, LARGEST_UNIT) for p in unit.parameters())
    assert sum(trained["held"]) == 2 * trained["whole"] - inside and inside > 0
    assert max(trained["held"]) < trained["whole"]
    assert trained["given"] == trained["whole"]  # the model that the caller passed
    assert trained["counted"] == trained["whole"]


def test_its_detections_are_drawn(trained):
    assert trained["sheets"] == ["step_3.png"]


def test_another_teacher_is_refused_on_resume(trained):
    assert "teacher's weights are not those" in trained["refusal"]


@pytest.mark.parametrize(
    ("families", "words"),
    [
        ({"conditional_detr", "deformable_detr", "dab-detr", "lw_detr", "rf_detr"}, "the same:"),
        ({"detr", "table-transformer", "yolos"}, "weighted mean over the queries of its own process:"),
        ({"rt_detr", "rt_detr_v2", "d_fine", "deimv2"}, "divided by the boxes of its own process:"),
    ],
)
def test_whose_loss_is_that_of_one_large_batch(trained, families, words):
    """Each group as docs/scaling.md has it. With several processes, DDP takes the mean of their losses."""
    whole, parts = task_losses(slice(4)), trained["losses"]
    names = [name for name in whole if zoo.CONFIGS[name][0] in families]
    assert names
    for name in names:
        mean = sum(part[name] for part in parts) / len(parts)
        assert (abs(mean - whole[name]) < 1e-5 * whole[name]) == (words == "the same:"), name
        assert mean == pytest.approx(whole[name], rel=0.2)
    [line] = [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if words in line]
    assert set(re.findall(r"`([\w-]+)`", line)) == families


def test_shares_of_real_teachers():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert sharding_table.table() in text, "python tests/sharding_table.py"


def test_one_process_needs_all_of_it():
    with pytest.warns(UserWarning, match="`shard_teacher` has no effect: there is one process"):
        args = DistillationConfig(output_dir="unused", shard_teacher=True, use_cpu=True)
    assert not args.shard_teacher


@pytest.mark.parametrize(
    ("variable", "what"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP in the configuration of accelerate launch would shard the student"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed in the configuration"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM in"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config in"),
    ],
)
def test_a_launcher_that_shards_the_student_is_refused(monkeypatch, variable, what):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{what}.*shard_teacher=True"):
        DistillationConfig(output_dir="unused")
    monkeypatch.setenv(variable, "false")
    DistillationConfig(output_dir="unused")


@pytest.mark.parametrize("setting", [{"fsdp": "full_shard"}, {"deepspeed": "zero.json"}])
def test_settings_that_shard_the_student_are_refused(setting):
    with pytest.raises(ValueError, match=f"`{next(iter(setting))}` would shard the student"):
        DistillationConfig(output_dir="unused", **setting)
