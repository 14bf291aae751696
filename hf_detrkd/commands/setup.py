"""From flags to models, image processors and data sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedModel,
    RTDetrImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from ..backbones import load_backbone_weights, pixels_of
from ..data import (
    Augmentation,
    DetectionDataset,
    check_dataset,
    input_size,
    keep_classes,
    load_detection_dataset,
    split_off_validation,
)
from ..data.schema import split_name
from ..inheritance import order_classes
from ..reporting.writing import whole
from ..students import PRETRAINED, from_config
from .arguments import DataArguments, ModelArguments

PARTS = ("train", "validation", "test")

SPLIT_SEED = 0
"""The validation split must not change with the seed of a run."""


@dataclass(frozen=True)
class Data:
    """The splits of a run."""

    train: DetectionDataset
    validation: DetectionDataset
    test: DetectionDataset
    validation_split: str
    """The name of the split in ``validation``: ``held_out`` where a share of train is, and the test is called `validation`."""
    test_split: str
    """The name of the split in ``test``: the validation split where the data set has no test split."""


def load_data(
    arguments: DataArguments,
    seed: int,
    say=print,
    cache_dir: str | None = None,
    token: str | None = None,
) -> Data:
    """Load, check and split a data set; what the checks found is said. `augment` adds the augmentation."""
    parts, names = _load_parts(PARTS, arguments, say, cache_dir, token)
    return Data(
        train=DetectionDataset(parts["train"], seed=seed),
        validation=DetectionDataset(parts["validation"]),
        test=DetectionDataset(parts["test"]),
        validation_split=names["validation"],
        test_split=names["test"],
    )


def check_part(part: str) -> None:
    """Refuses a ``--split`` that is none of the three."""
    if part not in PARTS:
        raise ValueError(f"--split is {part!r}; allowed are {', '.join(PARTS)}.")


def load_part(
    part: str, arguments: DataArguments, say=print, cache_dir: str | None = None, token: str | None = None
) -> tuple[DetectionDataset, str]:
    """Train, validation or test, to measure on, and the name of its split: for the test it may be the validation
    split's. The data set need not have the others."""
    parts, names = _load_parts((part,), arguments, say, cache_dir, token)
    return DetectionDataset(parts[part]), names[part]


def _load_parts(
    wanted: Sequence[str], arguments: DataArguments, say, cache_dir: str | None, token: str | None
) -> tuple[dict[str, datasets.Dataset], dict[str, str]]:
    """By part, the checked rows and the name of the split."""
    splits = load_detection_dataset(
        arguments.dataset_name,
        config_name=arguments.dataset_config_name,
        format=arguments.dataset_format,
        bbox_format=arguments.bbox_format,
        cache_dir=cache_dir,
        token=token,
    )
    if arguments.classes:
        splits = keep_classes(splits, arguments.classes)
    splits, names = choose_splits(splits, arguments, wanted, say)
    limits = {names[part]: arguments.max_eval_samples for part in wanted}
    if "train" in wanted and (len(wanted) > 1 or arguments.max_eval_samples is None):  # alone it is measured
        limits[names["train"]] = arguments.max_train_samples
    used = {
        name: splits[name].select(range(min(limit or len(splits[name]), len(splits[name]))))
        for name, limit in limits.items()
    }
    checked, report = check_dataset(datasets.DatasetDict(used), strict=arguments.strict)
    say(str(report))
    return {part: checked[names[part]] for part in wanted}, names


def choose_splits(
    splits: datasets.DatasetDict, arguments: DataArguments, wanted: Sequence[str] = PARTS, say=print
) -> tuple[datasets.DatasetDict, dict[str, str]]:
    """The splits to use, and which of them is each of the ``wanted`` parts.

    A share of train is held out for validation where the flags name the training split for it, or where there is no
    split `validation` and they name no other. Without a split `test` the validation split's numbers are the final ones.
    `val`, `valid`, `train2017` and so on are the splits' usual names too. Any other name that the data set doesn't have
    is refused, and a usual one where several splits have kept their own names because they would share it.
    """
    train, validation, test = (
        name if name in splits else split_name(name)  # loading gave the splits their usual names
        for name in (arguments.dataset_train_split, arguments.dataset_validation_split, arguments.dataset_test_split)
    )
    usual = set(map(split_name, splits))
    no_test = test == "test" and test not in usual
    if no_test:
        test = validation
    hold_out = validation == train or (validation == "validation" and validation not in usual)
    if hold_out:
        held_out = "held_out" if "validation" in splits else "validation"
        while held_out in splits:  # somebody's own
            held_out += "_of_train"
        validation, test = held_out, held_out if test == validation else test
    names = {part: name for part, name in zip(PARTS, (train, validation, test), strict=True) if part in wanted}
    if hold_out and not {train, held_out}.isdisjoint(names.values()):
        _require(splits, "train", train, arguments.dataset_name)
        say(f"{arguments.train_val_split:.0%} of {train!r} are held out for validation")
        splits = split_off_validation(splits, arguments.train_val_split, SPLIT_SEED, train, held_out)
    for part, name in names.items():
        _require(splits, part, name, arguments.dataset_name)
    if no_test and "test" in wanted:
        say(f"no split 'test': the final numbers are those of {test!r}")
    return splits, names


def _require(splits: datasets.DatasetDict, part: str, name: str, dataset: str) -> None:
    if name not in splits:
        raise ValueError(
            f"{dataset} has no split {name!r}; it has {list(splits)}. Name one with --dataset_{part}_split."
        )


def augment(data: Data, arguments: DataArguments, *processors: BaseImageProcessor | None) -> None:
    """Have the training split augmented, at the size that all the image processors want where they agree on one."""
    data.train.augmentation = Augmentation(
        flip=arguments.flip,
        scale=tuple(arguments.scale),
        crop=arguments.crop,
        photometric=arguments.photometric,
        size=input_size(*processors),
    )


def build_detector(arguments: ModelArguments, id2label: dict[int, str] | None) -> PreTrainedModel:
    """A detector from a checkpoint or, with random weights, from a config; its classes are ``id2label``.

    A checkpoint with another number of classes gets new class heads. With as many it keeps its own, each row with the class of
    its name (`order_classes`).
    """
    if (arguments.model_name_or_path is None) == (arguments.config_name is None):
        raise ValueError(
            "Pass one of --model_name_or_path (a checkpoint) and --config_name (a config, random weights); got "
            f"{arguments.model_name_or_path!r} and {arguments.config_name!r}."
        )
    hub = arguments.hub()
    config = AutoConfig.from_pretrained(arguments.model_name_or_path or arguments.config_name, **hub)
    before = {int(i): name for i, name in config.id2label.items()}
    same = id2label is None or before == id2label
    if not same:
        config.id2label = dict(id2label)
        config.label2id = {name: i for i, name in id2label.items()}
    if arguments.model_name_or_path is not None:
        if arguments.backbone_weights is not None:
            raise ValueError(
                "--backbone_weights goes with --config_name; a checkpoint has its backbone's weights already."
            )
        model = AutoModelForObjectDetection.from_pretrained(
            arguments.model_name_or_path, config=config, ignore_mismatched_sizes=not same, dtype=torch.float32, **hub
        )
        if not same and len(before) == len(id2label):
            order_classes(model, before)
        return model
    model = from_config(config)
    if arguments.backbone_weights is not None:
        load_backbone_weights(model, arguments.backbone_weights)
    return model


def build_image_processor(
    arguments: ModelArguments, model: PreTrainedModel, processor: BaseImageProcessor | None = None
) -> BaseImageProcessor:
    """``processor``, or else the image processor beside the checkpoint, or for a model from a config the one of its
    family; with the size and normalisation that the flags say."""
    place = arguments.image_processor_name or arguments.model_name_or_path
    if processor is None and place is not None:
        processor = AutoImageProcessor.from_pretrained(place, **arguments.hub())
    elif processor is None:
        processor = family_image_processor(model)
    if arguments.image_size is not None:
        processor.size = {"height": arguments.image_size, "width": arguments.image_size}
        processor.do_resize = True
    if arguments.do_normalize is not None:
        processor.do_normalize = arguments.do_normalize
    return processor


def normalise_for(processor: BaseImageProcessor, made: Mapping[str, Any]) -> None:
    """Gives a made student the pixels that its pretrained backbone learned from, where they are known (`pixels_of`).

    Args:
        processor: the student's, changed in place.
        made: what `make_student` is called with.
    """
    if made.get("backbone_weights") == PRETRAINED:
        for setting, value in pixels_of(made["backbone"]).items():
            setattr(processor, setting, value)


def family_image_processor(model: PreTrainedModel) -> BaseImageProcessor:
    """The default image processor of a model's family; RT-DETR's for the families that have none of their own.

    RT-DETRv2's published checkpoints use RT-DETR's too.
    """
    try:
        classes = IMAGE_PROCESSOR_MAPPING[type(model.config)]
    except KeyError:
        return RTDetrImageProcessor()
    return classes["torchvision"]()


def write_json(values: dict | list, path: str | Path) -> None:
    """Readable JSON; whole or not at all, also where several processes write it."""
    with whole(path) as part:
        part.write_text(json.dumps(values, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
