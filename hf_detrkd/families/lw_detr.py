"""LW-DETR and RF-DETR: no encoder, boxes predicted relative to the selected ones, Group DETR in training."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor, nn

from .base import FamilyAdapter
from .capture import DecoderCall


class LwDetrAdapter(FamilyAdapter):
    """LW-DETR. Features are those after the projector inside its backbone module; they are also the memory."""

    reference_argument = "reference_points"
    cross_attention = "cross_attn"
    sampled = True
    scores_quality = True

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return (self.width,) * len(self.model.config.projector_scale_factors)

    def own(self, number: int) -> slice:
        return slice(0, self.num_queries)  # the first group is the one used in evaluation

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        refine_bboxes = sys.modules[type(self.model).__module__].refine_bboxes
        hidden = self._head_input(call.output.intermediate_hidden_states[:, :, part])
        reference = self._head_input(call.arguments["reference_points"][:, part]).expand(len(hidden), -1, -1, -1)
        return hidden, self.model.class_embed(hidden), refine_bboxes(reference, self.model.bbox_embed(hidden))

    def training_flags(self, replaying: bool) -> Iterable[tuple[nn.Module, bool]]:
        # In training a self-attention cuts its queries into groups; a replay brings one group
        return [(layer.self_attn, False) for layer in self.decoder.layers] if replaying else ()


class RfDetrAdapter(LwDetrAdapter):
    """RF-DETR: a single level."""

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return (self.width,)

    def feature_maps(self, output) -> tuple[Tensor, ...]:
        return (output[0],)
