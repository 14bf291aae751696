"""DAB-DETR: queries are boxes, content starts as zeros (or as learned patterns)."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from .base import FamilyAdapter
from .capture import DecoderCall
from .references import refine


class DabDetrAdapter(FamilyAdapter):
    """DAB-DETR. One pair of heads, which is also what refines the boxes from layer to layer."""

    reference_argument = "query_position_embeddings"
    reference_is_logit = True
    mask_by_hook = True
    memory_mask_argument = "memory_key_padding_mask"
    cross_attention = "cross_attn"
    always_eager = True

    @property
    def learned_content(self) -> bool:
        return self.model.config.num_patterns > 0

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_queries(self) -> int:
        return self.model.config.num_queries * max(self.model.config.num_patterns, 1)

    @property
    def feature_module(self) -> nn.Module:
        return self.base.backbone.conv_encoder

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        inverse_sigmoid = sys.modules[type(self.model).__module__].inverse_sigmoid
        hidden = self._head_input(call.output.intermediate_hidden_states[:, :, part])
        reference = inverse_sigmoid(self._head_input(call.output.reference_points[:, :, part]))
        return hidden, self.model.class_embed(hidden), refine(self.model.bbox_predictor(hidden), reference)

    def _check_model(self) -> None:
        if self.model.config.query_dim != 4:
            raise ValueError(
                f"`query_dim` of the model is {self.model.config.query_dim}; views need boxes, `query_dim` 4."
            )
