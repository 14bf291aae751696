"""Students: a smaller detector of the teacher's family, and detectors with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from .backbones import PROBE, Backbone, find_backbone, load_backbone_weights
from .families import FamilyAdapter, adapter_for
from .families.architecture import ARCHITECTURES, Architecture
from .inheritance import inherit_layers

PRETRAINED = "pretrained"
"""As `backbone_weights` of `make_student`: those that come with the backbone's name (`pretrained_weights`)."""


def make_student(
    teacher: PreTrainedModel,
    *,
    backbone: str | None = None,
    backbone_weights: str | None = None,
    d_model: int | None = None,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    num_queries: int | None = None,
    id2label: Mapping[int, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    inherit_weights: bool = True,
) -> PreTrainedModel:
    """A smaller detector of the teacher's family, with the teacher's weights wherever name and shape fit.

    What is not named is as in the teacher. Of a deeper encoder or decoder the student's layers are spread evenly and end
    with the last (`kept_layers`): of six layers three become the 2nd, 4th and 6th. Heads that every layer has of its own
    come with their layer, those of the proposals stay the proposals'. What only a first layer has comes from the first.
    Of learned queries the first are taken; they are in no order. Nothing of another backbone is inherited, and of another
    width only what doesn't have it. New weights are drawn from torch's generator: with one seed twins are equal.

    Args:
        teacher: any `AutoModelForObjectDetection` that hf_detrkd knows.
        backbone: see `find_backbone`; it gives maps of the same strides as the teacher's.
        backbone_weights: what `load_backbone_weights` takes, or ``"pretrained"`` for those that come with the backbone's
            name. None: random.
        d_model: the width; the other widths of encoder and decoder (feed-forward ones too) grow or shrink with it.
        encoder_layers: of the transformer encoder.
        decoder_layers: of the decoder.
        num_queries: of the decoder.
        id2label: the classes; None: the teacher's. With other classes, class heads start from random weights.
        settings: any other fields of the config, by name.
        inherit_weights: False: the student's architecture alone.

    Raises:
        ValueError: something can't be changed, or not so; the message says what and why.
    """
    adapter = adapter_for(teacher)
    architecture = ARCHITECTURES[teacher.config.model_type]
    if backbone is None and backbone_weights is not None:
        raise ValueError("`backbone_weights` goes with `backbone`: the teacher's backbone comes with its weights.")
    wanted = {
        "backbone": backbone,
        "d_model": d_model,
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "num_queries": num_queries,
    }
    _check_wanted(wanted, adapter, architecture)
    found = None if backbone is None else find_backbone(backbone, _strides(adapter))
    config = _student_config(teacher.config, architecture, wanted, found, {**(settings or {})})
    if id2label is not None:
        config.id2label = {int(index): name for index, name in id2label.items()}
        config.label2id = {name: index for index, name in config.id2label.items()}
    try:
        student = from_config(config).eval()
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        given = {name: value for name, value in {**wanted, **(settings or {})}.items() if value is not None}
        raise ValueError(f"No {config.model_type} can be built with {given}: {error}") from error
    if inherit_weights:
        inherit_layers(student, teacher, architecture, new_backbone=backbone is not None)
    if backbone_weights is not None:
        load_backbone_weights(student, backbone if backbone_weights == PRETRAINED else backbone_weights)
    return student


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A detector with random weights, drawn as by transformers, but for transformer and queries of DETR and its like.

    There the released code takes Xavier's uniform distribution for matrices and N(0, 1) for queries (`Architecture`'s
    ``drawn_as_released``), transformers N(0, 0.02^2) for both. With that all queries read the same from the image: a DETR learned
    to tell them apart by the noise of dropout, which evaluation hasn't. In training its loss fell, its AP stayed at 0.
    """
    model = AutoModelForObjectDetection.from_config(config, dtype=torch.float32)
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None or not architecture.drawn_as_released:
        return model
    for name, parameter in model.named_parameters():
        if name in architecture.query_tensors:
            nn.init.normal_(parameter)
        elif (
            name.startswith(architecture.drawn_as_released) and parameter.dim() > 1 and parameter.any()
        ):  # zeros are meant
            nn.init.xavier_uniform_(parameter)
    return model


def _check_wanted(wanted: Mapping[str, Any], adapter: FamilyAdapter, architecture: Architecture) -> None:
    config = adapter.model.config
    places = {
        "backbone": architecture.backbone,
        "d_model": architecture.width,
        "encoder_layers": architecture.encoder_layers,
        "decoder_layers": architecture.decoder_layers,
        "num_queries": architecture.queries,
    }
    for name, value in wanted.items():
        if value is not None and not places[name]:
            raise ValueError(f"`{name}` of {config.model_type} can't be changed: {architecture.reasons[name]}")
    for name in ("encoder_layers", "decoder_layers", "num_queries"):
        if wanted[name] is None:
            continue
        has = adapter.num_queries if name == "num_queries" else getattr(config, places[name])
        if not 1 <= wanted[name] <= has:
            raise ValueError(
                f"`{name}` is {wanted[name]}, but the teacher has {has}: a student made from it has 1 to {has}. For a "
                "larger model write a config, and pass it with `inherit`."
            )
    heads = [getattr(config, name) for name in architecture.heads]
    step = math.lcm(4, *heads)  # sines and cosines of two coordinates
    if wanted["d_model"] is not None and (wanted["d_model"] < step or wanted["d_model"] % step):
        raise ValueError(
            f"`d_model` is {wanted['d_model']}; with {heads} attention heads it must be a multiple of {step}. Other numbers "
            f"of heads go into `settings` of a config's own fields: {', '.join(architecture.heads)}."
        )


def _student_config(
    config: PreTrainedConfig,
    architecture: Architecture,
    wanted: Mapping[str, Any],
    backbone: Backbone | None,
    settings: Mapping[str, Any],
) -> PreTrainedConfig:
    """The teacher's config with what is wanted."""
    values = config.to_dict()
    unknown = sorted(settings.keys() - values.keys())
    if unknown:
        raise ValueError(f"`settings` has {unknown}, which {type(config).__name__} doesn't have.")
    for name in architecture.derived:
        values.pop(name, None)
    if wanted["d_model"] is not None:
        before = values[architecture.width[0]]
        for name in architecture.width:
            values[name] = _scaled(values[name], wanted["d_model"], before)
    if wanted["encoder_layers"] is not None:
        values[architecture.encoder_layers] = wanted["encoder_layers"]
    if wanted["decoder_layers"] is not None:
        values |= {architecture.decoder_layers: wanted["decoder_layers"], **architecture.with_decoder}
    if wanted["num_queries"] is not None:
        values |= dict.fromkeys(architecture.queries, wanted["num_queries"])
    if backbone is not None:
        values["backbone_config"] = backbone.config.to_dict()
        if architecture.backbone_channels is not None:
            values[architecture.backbone_channels] = list(backbone.channels)
    values |= settings
    for name in ("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype"):
        values.pop(name, None)
    return type(config).from_dict(values)


def _scaled(value: int | Sequence[int], width: int, before: int):
    if isinstance(value, int):
        return max(1, value * width // before)
    return [_scaled(one, width, before) for one in value]


def _strides(adapter: FamilyAdapter) -> list[int]:
    """Of the maps that the teacher's backbone gives."""
    module, device = adapter.feature_module, adapter.model.device
    was_training = module.training
    with torch.no_grad():
        output = module.eval()(
            torch.zeros(1, 3, PROBE, PROBE, device=device), torch.ones(1, PROBE, PROBE, device=device)
        )
    module.train(was_training)
    return [PROBE // feature.shape[-1] for feature in adapter.feature_maps(output)]
