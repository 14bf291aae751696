"""Backbones by name (of timm, of transformers, and a few presets that need neither timm nor the Hub), and their weights."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneMixin

PRESETS: dict[str, dict[str, Any]] = {
    f"resnet{depth}vd": {
        "model_type": "rt_detr_resnet",
        "depths": depths,
        "hidden_sizes": [64, 128, 256, 512] if layer == "basic" else [256, 512, 1024, 2048],
        "layer_type": layer,
    }
    for depth, depths, layer in (
        (18, [2, 2, 2, 2], "basic"),
        (34, [3, 4, 6, 3], "basic"),
        (50, [3, 4, 6, 3], "bottleneck"),
    )
}
"""RT-DETR's own ResNets (the "vd" of PaddleDetection), as in PekingU/rtdetr_r18vd, r34vd and r50vd."""

PROBE = 128
"""Side of the image on which strides are measured: 4 tokens at stride 32."""


@dataclass(frozen=True)
class Backbone:
    """A backbone that gives maps of the strides asked for."""

    config: PreTrainedConfig
    channels: tuple[int, ...]
    """Of the maps, fine to coarse."""


def find_backbone(name: str, strides: Sequence[int]) -> Backbone:
    """A backbone by name, set to give one map per stride.

    Args:
        name: one of `PRESETS`; a timm model (``resnet18``, ``mobilenetv3_small_100``, also with ``timm/`` before it); or
            a folder, config.json or Hub id of a transformers backbone, or of a detector whose backbone is meant.
        strides: of the maps, fine to coarse.

    Raises:
        ValueError: nothing is called so, or it doesn't give these strides.
    """
    if len(set(strides)) < len(strides):
        raise ValueError(
            f"The teacher's backbone gives maps of strides {list(strides)}: it is dilated, which other backbones can't "
            "follow. Make a student with the teacher's own backbone, or of a teacher without dilation."
        )
    timm_name = name.removeprefix("hf_hub:").removeprefix("timm/")
    if name in PRESETS:
        return _of_transformers(name, AutoConfig.for_model(**PRESETS[name]), strides)
    if not Path(name).exists() and _is_timm(timm_name):
        return _of_timm(timm_name, strides)
    return _of_transformers(name, _read_config(name), strides)


def pretrained_weights(name: str) -> Mapping[str, Tensor]:
    """The weights of a pretrained backbone, under its own names.

    Args:
        name: a timm model, or a folder or Hub id of a transformers backbone, or of a detector whose backbone is meant.

    Raises:
        RuntimeError: they can't be had, for example because there is no network.
    """
    timm_name = name.removeprefix("hf_hub:").removeprefix("timm/")
    try:
        if name in PRESETS:
            raise OSError("it is a preset, which has none")
        if not Path(name).exists() and _is_timm(timm_name):
            import timm

            return timm.create_model(timm_name, pretrained=True, features_only=True).state_dict()
        if getattr(AutoConfig.from_pretrained(name), "backbone_config", None) is None:
            return AutoBackbone.from_pretrained(name).state_dict()
        detector = AutoModelForObjectDetection.from_pretrained(name)
        return next(module for module in detector.modules() if isinstance(module, BackboneMixin)).state_dict()
    except Exception as error:  # the Hub's client, timm and requests each have errors of their own
        raise RuntimeError(
            f"The weights of the backbone {name!r} could not be loaded: {error}. Pass a safetensors file with them, or "
            "start from random weights."
        ) from error


def pixels_of(name: str) -> dict[str, Any]:
    """How the images were normalised that a pretrained backbone learned from, as settings of an image processor.

    Args:
        name: as of `pretrained_weights`.

    Returns:
        ``do_normalize`` and, with it, ``image_mean`` and ``image_std``; nothing where it isn't known.
    """
    timm_name = name.removeprefix("hf_hub:").removeprefix("timm/")
    if name in PRESETS:
        return {}
    if not Path(name).exists() and _is_timm(timm_name):
        import timm

        wants = timm.get_pretrained_cfg(timm_name)
        return {"do_normalize": True, "image_mean": list(wants.mean), "image_std": list(wants.std)}
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):  # there is none
        return {}
    settings = ("do_normalize", *(("image_mean", "image_std") if processor.do_normalize else ()))
    return {setting: getattr(processor, setting) for setting in settings}


def load_backbone_weights(model: PreTrainedModel, source: str) -> int:
    """Load a pretrained backbone's weights (of timm, say, or of another detector) into the backbone of a detector.

    The backbone is the part of the model in which the most tensor names end like the file's.

    Args:
        model: the detector, changed in place.
        source: a safetensors file under the backbone's own tensor names; or what `pretrained_weights` takes, such as a
            detector's folder or Hub id. What the model's backbone doesn't have (a classifier) is left out.

    Returns:
        the number of tensors loaded.

    Raises:
        ValueError: where the source lacks a tensor of the backbone, or has it in another shape.
        RuntimeError: there is no such source.
    """
    of_file = Path(source).suffix == ".safetensors" and Path(source).is_file()
    weights = load_file(source) if of_file else pretrained_weights(source)
    state = model.state_dict()
    places = Counter(name.removesuffix(key) for name in state for key in weights if name.endswith("." + key))
    if not places:
        raise ValueError(
            f"{source} doesn't fit {type(model).__name__}: no tensor of the model ends with a name of it, such as "
            f"{sorted(weights)[:3]}. It must have the names of the backbone itself, without what a detector puts before."
        )
    place = max(places, key=places.get)
    backbone = {name: value for name, value in state.items() if name.startswith(place)}
    fitting = {
        name: weights[name.removeprefix(place)]
        for name, value in backbone.items()
        if name.removeprefix(place) in weights and weights[name.removeprefix(place)].shape == value.shape
    }
    # BatchNorm's counters change nothing here, and not every file has them
    missing = sorted(name for name in backbone.keys() - fitting.keys() if not name.endswith(".num_batches_tracked"))
    if missing:
        raise ValueError(
            f"{source} doesn't fit the backbone of {type(model).__name__}: {len(missing)} of its {len(backbone)} tensors "
            f"are not in it with their name and shape, the first are {missing[:3]}. Is it another network or "
            "another width?"
        )
    model.load_state_dict(fitting, strict=False)
    return len(fitting)


def _is_timm(name: str) -> bool:
    if find_spec("timm") is None:
        return False
    import timm

    return timm.is_model(name)


def _of_timm(name: str, strides: Sequence[int]) -> Backbone:
    import timm

    try:
        with torch.device("meta"):
            info = timm.create_model(name, pretrained=False, features_only=True).feature_info
    except (AttributeError, RuntimeError) as error:  # timm says that the model gives no features
        raise ValueError(f"The backbone {name!r} of timm gives no feature maps: {error}.") from error
    indices = _levels(name, info.reduction(), strides)
    config = AutoConfig.for_model("timm_backbone", backbone=name, out_indices=[info.out_indices[i] for i in indices])
    return Backbone(config, tuple(info.channels()[i] for i in indices))


def _of_transformers(name: str, config: PreTrainedConfig, strides: Sequence[int]) -> Backbone:
    try:
        config.out_indices = list(range(len(config.stage_names)))
        with torch.device("meta"):
            maps = AutoBackbone.from_config(config).eval()(torch.zeros(1, 3, PROBE, PROBE)).feature_maps
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{name} is a {type(config).__name__}, which can't be a backbone that gives feature maps: {error}."
        ) from error
    indices = _levels(name, [PROBE // feature.shape[-1] for feature in maps], strides)
    config.out_indices = indices
    return Backbone(config, tuple(maps[i].shape[1] for i in indices))


def _levels(name: str, has: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """For each stride the last stage that has it."""
    last = {stride: index for index, stride in enumerate(has)}
    if any(stride not in last for stride in wanted):
        raise ValueError(
            f"The backbone {name!r} gives maps of strides {list(has)}, but the teacher's family is set to read "
            f"{list(wanted)}. Take a backbone with a pyramid, for example a ResNet."
        )
    return [last[stride] for stride in wanted]


def _read_config(name: str) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        known = list(PRESETS)
        if find_spec("timm") is not None:
            import timm

            known += timm.list_models()
            hint = ""
        else:
            hint = " timm is not installed: pip install timm has a thousand more."
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or known[:3]
        raise ValueError(
            f"There is no backbone {name!r}: it is no preset ({', '.join(PRESETS)}), no model of timm, and no config of "
            f"transformers can be read there ({type(error).__name__}). Near: {', '.join(near)}.{hint}"
        ) from error
    inner = getattr(config, "backbone_config", None)  # of a detector
    return config if inner is None else inner
