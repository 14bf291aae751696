"""Which split of a data set is trained on, which chooses, and which is measured last; and what a run records of itself."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
import zoo
from transformers import RTDetrImageProcessor

from hf_detrkd.commands import records
from hf_detrkd.commands.arguments import DataArguments, ModelArguments
from hf_detrkd.commands.setup import (
    build_detector,
    build_image_processor,
    choose_splits,
    load_data,
    load_part,
    write_json,
)
from tests import tiny_datasets


def rows(*names: str) -> datasets.DatasetDict:
    """Splits of 20 rows each that say where they come from."""
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"row": [f"{name} {index}" for index in range(20)]}) for name in names}
    )


def flags(**splits: str) -> DataArguments:
    return DataArguments(dataset_name="DATA", **{f"dataset_{part}_split": name for part, name in splits.items()})


def chosen(splits, arguments, wanted=("train", "validation", "test"), say=lambda text: None) -> dict[str, list[str]]:
    """By part, its rows."""
    splits, names = choose_splits(splits, arguments, wanted, say)
    assert list(names) == list(wanted)
    return {part: splits[name]["row"][:] for part, name in names.items()}


ALL = ("train", "validation", "test")


def test_splits_under_their_usual_names_and_others():
    splits = rows("train", "validation", "test", "night")
    assert chosen(splits, flags()) == {name: splits[name]["row"][:] for name in ALL}
    assert chosen(splits, flags(test="night"))["test"] == splits["night"]["row"][:]
    assert chosen(splits, flags(train="train2017", validation="val", test="testing")) == chosen(splits, flags())


@pytest.mark.parametrize("own", [(), ("test",)])
def test_without_a_validation_split_a_share_of_train_is_held_out(own):
    said = []
    parts = chosen(rows("train", *own), flags(), say=said.append)
    assert (len(parts["train"]), len(parts["validation"])) == (17, 3)
    assert sorted(parts["train"] + parts["validation"]) == sorted(rows("train")["train"]["row"])
    assert said[0] == "15% of 'train' are held out for validation"
    if own:
        assert parts["test"] == rows("test")["test"]["row"][:] and len(said) == 1
    else:
        assert parts["test"] == parts["validation"] and said[1:] == [
            "no split 'test': the final numbers are those of 'validation'"
        ]


def test_the_folders_validation_split_as_the_test_split():
    """It must not choose the checkpoint too: a share of train does, and is not trained on."""
    splits = rows("train", "validation")
    parts = chosen(splits, flags(validation="train", test="validation"))
    assert parts["test"] == splits["validation"]["row"][:]
    assert len(parts["validation"]) == 3 and all(row.startswith("train") for row in parts["validation"])
    assert len(parts["train"]) == 17 and not set(parts["train"]) & set(parts["validation"])
    both = chosen(splits, flags(validation="train", test="train"))  # tuning measures on the validation split alone
    assert both["test"] == both["validation"] == parts["validation"]
    taken = chosen(rows("train", "validation", "held_out"), flags(validation="train", test="validation"))
    assert taken == parts  # a split that is called so by chance is another
    other = chosen(rows("labelled"), flags(train="labelled"))
    assert (len(other["train"]), len(other["validation"])) == (17, 3)


@pytest.mark.parametrize("part", ALL)
def test_a_name_that_is_not_there_is_refused(part):
    """A misspelt one would train, choose or measure on something else."""
    with pytest.raises(
        ValueError, match=rf"DATA has no split 'tets'; it has \['train', 'validation'\].*--dataset_{part}_split"
    ):
        chosen(rows("train", "validation"), flags(**{part: "tets"}))


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("train2014", "train2017", "validation"), "train"),
        (("train", "val", "dev"), "validation"),
        (("train", "validation", "test2015", "test2017"), "test"),
    ],
)
def test_of_two_splits_of_one_usual_name_one_must_be_chosen(names, part):
    """Neither is skipped for a share of train or for the validation split."""
    splits = rows(*names)
    with pytest.raises(ValueError, match=rf"no split '{part}'; it has .*'{names[-2]}'.*--dataset_{part}_split"):
        chosen(splits, flags())
    name = next(name for name in names if name not in ALL)
    assert {row.split()[0] for row in chosen(splits, flags(**{part: name}))[part]} == {name}


def test_one_part_needs_no_other():
    splits = rows("test", "night")
    assert chosen(splits, flags(), ["test"]) == {"test": splits["test"]["row"][:]}
    assert chosen(splits, flags(test="night"), ["test"]) == {"test": splits["night"]["row"][:]}
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['test', 'night'\]"):
        chosen(splits, flags(), ["validation"])
    assert len(chosen(rows("train"), flags(), ["train"])["train"]) == 17


def test_loaded_from_a_folder(tmp_path, capsys):
    folder = str(tiny_datasets.write_coco(tmp_path / "set"))
    arguments = DataArguments(
        dataset_name=folder, dataset_validation_split="train", dataset_test_split="validation", train_val_split=0.2
    )
    data = load_data(arguments, seed=0)
    whole = load_data(DataArguments(dataset_name=folder, max_train_samples=2), seed=0)
    assert (data.validation_split, data.test_split) == ("held_out", "validation")
    assert (whole.validation_split, whole.test_split) == ("validation", "validation")
    assert data.test.split["image_id"][:] == whole.validation.split["image_id"][:] == whole.test.split["image_id"][:]
    assert len(data.train) + len(data.validation) == 3 and len(whole.train) == 2
    test, name = load_part("test", arguments)
    assert name == "validation" and test.split["image_id"][:] == data.test.split["image_id"][:]
    for limits, number in (({"max_eval_samples": 1}, 1), ({"max_train_samples": 2}, 2), ({}, 3)):
        assert len(load_part("train", DataArguments(dataset_name=folder, **limits))[0]) == number


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1), ("win32", 1)])
def test_peak_memory_in_the_units_of_the_system(monkeypatch, platform, unit):
    """getrusage counts KiB on Linux, bytes on macOS; Windows has none."""
    monkeypatch.setattr(records.sys, "platform", platform)
    monkeypatch.setattr(records.torch.cuda, "is_available", lambda: False)
    value = 3 * 2**20 // unit
    if platform == "win32":
        monkeypatch.setitem(sys.modules, "resource", None)
        process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=value))
        monkeypatch.setattr(records.psutil, "Process", lambda: process)
    else:
        monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=value))
    assert records.peak_memory() == 3


def test_classes_of_a_checkpoint_in_another_order_keep_their_weights(tmp_path):
    """transformers loads heads of as many classes as they are, whatever the classes are called."""
    for family in ("rt_detr", "detr"):
        model = zoo.build(family)
        model.config.id2label = dict(enumerate(["cat", "dog", "cow", "pig", "hen"]))
        model.save_pretrained(tmp_path / family)
        arguments = ModelArguments(model_name_or_path=str(tmp_path / family))
        moved = build_detector(arguments, dict(enumerate(["Dog", "cat", "hen", "owl", "cow"])))
        order = [1, 0, 4, 3, 2]  # the owl gets what no other class wants
        before, after = model.state_dict(), moved.state_dict()
        assert before.keys() == after.keys()
        heads = [name for name in before if not torch.equal(before[name], after[name])]
        assert heads and all("class" in name or "score_head" in name for name in heads)
        for name in heads:
            assert torch.equal(after[name][:5], before[name][:5][order]), name
            assert torch.equal(after[name][5:], before[name][5:]), name  # no-object
        others = build_detector(arguments, dict(enumerate("pqrst"))).state_dict()
        assert all(torch.equal(before[name], others[name]) for name in before)


def test_image_size_resizes(tmp_path):
    """Also where the checkpoint's processor doesn't."""
    model = zoo.build("rt_detr")
    processor = RTDetrImageProcessor(do_resize=False)
    processor = build_image_processor(ModelArguments(image_size=48), model, processor)
    pixels = processor(images=[torch.zeros(3, 100, 80, dtype=torch.uint8)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 48, 48)


def test_processes_write_json_side_by_side(tmp_path):
    """Each into a part of its own: another's may be half written."""
    (tmp_path / "results.json.part").write_text("another's")
    write_json({"a": 1}, tmp_path / "results.json")
    assert (tmp_path / "results.json.part").read_text() == "another's" and (tmp_path / "results.json").is_file()
    assert len(list(tmp_path.iterdir())) == 2
