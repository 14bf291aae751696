"""What of a family's config makes a model smaller, and where its state dict keeps what exists once per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One family's names. A setting whose field is None or empty can't be changed; `reasons` says why."""

    width: tuple[str, ...] = ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")
    """Fields that grow with the width; the first is the width itself."""
    heads: tuple[str, ...] = ("encoder_attention_heads", "decoder_attention_heads")
    """Fields with numbers of attention heads, which divide the width."""
    encoder_layers: str | None = "encoder_layers"
    decoder_layers: str | None = "decoder_layers"
    queries: tuple[str, ...] = ("num_queries",)
    with_decoder: Mapping[str, Any] = field(default_factory=dict)
    """What else is set where the number of decoder layers changes."""
    backbone: str | None = "model.backbone."
    """What stands before the backbone's tensors; None: the backbone can't be changed."""
    backbone_channels: str | None = None
    """The field that repeats the channels of the backbone's maps."""
    encoder_lists: tuple[str, ...] = ("model.encoder.layers",)
    """Lists with one entry per encoder layer."""
    decoder_lists: tuple[str, ...] = ("model.decoder.layers",)
    """Lists with one entry per decoder layer, heads included; entries beyond (of the proposals) follow the last layer."""
    query_tensors: tuple[str, ...] = ()
    """Learned queries: one row each, in no order."""
    query_groups: str | None = None
    """The field that says how many times over the rows are there, for training in groups."""
    drawn_as_released: tuple[str, ...] = ()
    """Where matrices start from Xavier's uniform distribution and learned queries from N(0, 1), as in the released code;
    transformers draws all of them from N(0, 0.02^2). See `from_config`."""
    derived: tuple[str, ...] = ()
    """Fields that the config computes from others."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """By setting, why it can't be changed."""


_TRANSFORMER = ("model.encoder.layers.", "model.decoder.layers.")
"""Transformer._reset_parameters of facebookresearch/detr, models/transformer.py, and of those that follow it; queries are
nn.Embedding's own (models/detr.py, query_embed)."""

_DETR = Architecture(query_tensors=("model.query_position_embeddings.weight",), drawn_as_released=_TRANSFORMER)

_CONDITIONAL = (
    *_TRANSFORMER,
    *("model.encoder.query_scale.", "model.decoder.query_scale."),
    *("model.decoder.ref_point_head.", "model.decoder.ref_anchor_head."),
)
"""With the MLPs inside the transformers of Conditional DETR and DAB-DETR, which are reset with them."""

_RT_DETR = Architecture(
    width=("d_model", "encoder_hidden_dim", "decoder_in_channels", "encoder_ffn_dim", "decoder_ffn_dim"),
    backbone_channels="encoder_in_channels",
    encoder_lists=("model.encoder.aifi.0.layers", "model.encoder.encoder.0.layers"),  # 5.23, and before
    decoder_lists=(
        "model.decoder.layers",
        *("model.decoder.class_embed", "model.decoder.bbox_embed", "class_embed", "bbox_embed"),
    ),
)

_D_FINE = Architecture(
    width=_RT_DETR.width,
    backbone_channels="encoder_in_channels",
    encoder_lists=_RT_DETR.encoder_lists,
    decoder_lists=(*_RT_DETR.decoder_lists, "model.decoder.lqe_layers"),
    with_decoder={"eval_idx": -1},
    derived=("head_dim",),
)

_NO_ENCODER = "the family has no transformer encoder."
_VIT = "the backbone is a windowed ViT whose layers, windows and projector are one design."

_LW_DETR = Architecture(
    width=("d_model", "decoder_ffn_dim"),
    heads=("decoder_self_attention_heads", "decoder_cross_attention_heads"),
    encoder_layers=None,
    backbone=None,
    query_tensors=("model.query_feat.weight", "model.reference_point_embed.weight"),
    query_groups="group_detr",
    derived=("projector_in_channels", "projector_out_channels"),
    reasons={"encoder_layers": _NO_ENCODER, "backbone": _VIT},
)

_YOLOS = "a YOLOS is one ViT whose detection tokens run through all of it. Start from a smaller YOLOS checkpoint."

ARCHITECTURES: dict[str, Architecture] = {
    "conditional_detr": replace(_DETR, drawn_as_released=_CONDITIONAL),
    "d_fine": _D_FINE,
    "dab-detr": Architecture(
        width=("hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"),
        query_tensors=("model.query_refpoint_embeddings.weight",),
        drawn_as_released=_CONDITIONAL,
    ),
    "deformable_detr": Architecture(
        queries=("num_queries", "two_stage_num_proposals"),
        decoder_lists=_RT_DETR.decoder_lists,
        query_tensors=_DETR.query_tensors,
        drawn_as_released=_TRANSFORMER,
    ),
    "deimv2": Architecture(
        width=_RT_DETR.width,
        encoder_lists=_RT_DETR.encoder_lists,
        decoder_lists=_D_FINE.decoder_lists,
        with_decoder=_D_FINE.with_decoder,
        derived=_D_FINE.derived,
        backbone=None,
        reasons={"backbone": "DEIMv2's backbone module holds projections made for its own backbone."},
    ),
    "detr": _DETR,
    "lw_detr": _LW_DETR,
    "rf_detr": _LW_DETR,
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "table-transformer": _DETR,
    "yolos": Architecture(
        width=(),
        heads=(),
        encoder_layers=None,
        decoder_layers=None,
        queries=(),
        backbone=None,
        reasons=dict.fromkeys(("backbone", "d_model", "encoder_layers", "decoder_layers", "num_queries"), _YOLOS),
    ),
}
"""By ``config.model_type``."""
