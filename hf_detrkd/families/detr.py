"""DETR and Table Transformer: queries are learned position embeddings, content starts as zeros, layers share heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..view import DetrView, Queries
from .base import FamilyAdapter
from .capture import DecoderCall


class DetrAdapter(FamilyAdapter):
    """DETR. Its queries know no boxes.

    ``config.auxiliary_loss`` changes what the decoder computes (it normalises between its layers); views follow the
    model as it is configured.
    """

    classification = "softmax"
    position_argument = "object_queries_position_embeddings"
    mask_argument = "attention_mask"
    boxes_to_queries = False

    @property
    def learned_content(self) -> bool:
        return False

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.normed_states(call, part)
        return hidden, self.model.class_labels_classifier(hidden), self.model.bbox_predictor(hidden).sigmoid()

    def normed_states(self, call: DecoderCall, part: slice) -> Tensor:
        """(L, B, Q, D) what the layers return, after the decoder's last norm."""
        inner = [self.decoder.layernorm(self._head_input(state[:, part])) for state in call.layer_states[:-1]]
        return torch.stack([*inner, self._head_input(call.output.last_hidden_state[:, part])])

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        raise ValueError(
            f"The queries of {self.model.config.model_type} know no boxes, so none can be placed on boxes. "
            "Learn an embedding of the box, or take a family with boxes or centres in its queries."
        )

    def check_call(self, attentions: bool) -> None:
        super().check_call(attentions)
        layerdrop = self.model.config.decoder_layerdrop
        if self.model.training and layerdrop > 0:
            raise ValueError(
                f"`decoder_layerdrop` is {layerdrop}: a training step may skip decoder layers, and the layers of views "
                "would lose their place. Set it to 0."
            )


class TableTransformerAdapter(DetrAdapter):
    """Table Transformer: DETR with the norm before each block."""

    position_argument = "query_position_embeddings"
    always_eager = True

    @property
    def feature_module(self) -> nn.Module:
        return self.base.backbone.conv_encoder
