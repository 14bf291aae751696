"""D-FINE and DEIMv2: RT-DETR's decoder with boxes as refined distributions."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..view import Queries
from .capture import DecoderCall
from .references import reference_logit
from .rt_detr import RTDetrV2Adapter


class DFineAdapter(RTDetrV2Adapter):
    """D-FINE. In evaluation its decoder gives the last layer's predictions only.

    So the decoder module alone is told to be in training while it runs (its layers are not), and the model gets the
    output it would have had: evaluation losses count the layers they counted before.

    The distributions of all layers are relative to one box, which a head predicts from the first layer's output. In a
    replay the ``edge_reference`` of queries takes its place.
    """

    has_edges = True

    @property
    def edge_bins(self) -> tuple[int, float, float]:
        # Of the weights, which are what a checkpoint brings; the decoder takes no notice of their sign
        return self.decoder.max_num_bins, abs(float(self.decoder.up)), abs(float(self.decoder.reg_scale))

    def training_flags(self, replaying: bool) -> Iterable[tuple[nn.Module, bool]]:
        return ((self.decoder, True),)

    def output_for_model(self, call: DecoderCall) -> ModelOutput | None:
        if self.decoder.training or self.num_layers == 1:
            return None
        names = ("logits", "reference_points", "predicted_corners")
        per_layer = {f"intermediate_{name}": call.output[f"intermediate_{name}"][:, -1:] for name in names}
        return replace(call.output, **per_layer, initial_reference_points=call.output.initial_reference_points[:, -1:])

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        output, layers = call.output, self.num_layers
        hidden = output.intermediate_hidden_states[:, :, part]
        # One more entry in front: the predictions before the first refinement
        logits = output.intermediate_logits.transpose(0, 1)[-layers:, :, part]
        boxes = output.intermediate_reference_points.transpose(0, 1)[-layers:, :, part]
        return self._head_input(hidden), logits, boxes

    def edges(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor]:
        output = call.output
        corners = output.intermediate_predicted_corners.transpose(0, 1)[:, :, part]
        return corners.unflatten(-1, (4, -1)), output.initial_reference_points[:, 0, part]

    def prepare_replay(self, stack: ExitStack, groups: list[Queries]) -> list[Queries]:
        if all(group.edge_reference is None for group in groups):
            return groups
        inverse_sigmoid = sys.modules[type(self.model).__module__].inverse_sigmoid

        def put(module, args, output):
            """What the decoder, adding it to the logit of a query's reference, makes its edge reference of."""
            parts = []
            for group, own in zip(groups, output.split([len(group) for group in groups], dim=1), strict=True):
                if group.edge_reference is not None:
                    own = (reference_logit(group.edge_reference) - inverse_sigmoid(group.reference)).to(own.dtype)
                parts.append(own)
            return torch.cat(parts, dim=1)

        stack.callback(self.decoder.pre_bbox_head.register_forward_hook(put).remove)
        return groups

    def points_scale(self, attention: nn.Module) -> Tensor:
        return attention.num_points_scale

    def sampling_levels(self) -> tuple[int, ...]:
        return tuple(self.decoder.layers[0].encoder_attn.num_points_list)

    def _check_model(self) -> None:
        if self.model.eval_idx != self.num_layers - 1:
            raise ValueError(
                f"`eval_idx` of the model is {self.model.config.eval_idx}: it predicts from a layer before its last, "
                f"which the views of {self.model.config.model_type} can't follow. Set `eval_idx` to -1."
            )


class Deimv2Adapter(DFineAdapter):
    """DEIMv2. Its features are those after the projection inside its backbone module."""

    @property
    def feature_module(self) -> nn.Module:
        return self.base.conv_encoder

    @property
    def feature_channels(self) -> tuple[int, ...]:
        config = self.model.config
        if config.backbone_config.model_type == "dinov3_vit":  # its levels are fused with those of a small CNN
            return (config.encoder_hidden_dim,) * len(self.feature_module.fusion_proj)
        channels = super().feature_channels
        return channels if config.encoder_type == "lite" else (config.encoder_hidden_dim,) * len(channels)

    def feature_maps(self, output) -> tuple[Tensor, ...]:
        return tuple(output)
