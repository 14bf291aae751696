"""RT-DETR and RT-DETRv2: queries are selected from the encoder's tokens; the decoder predicts after every layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ..view import DetrView, Queries
from .base import DecoderCall, FamilyAdapter


class RTDetrAdapter(FamilyAdapter):
    """RT-DETR. Pixel masks are not read, so views have no memory mask."""

    reference_argument = "reference_points"
    reference_is_logit = True
    mask_argument = "encoder_attention_mask"  # transformers' name for the mask of the self-attention
    memory_mask_argument = None
    sampled = True

    def own(self, number: int) -> slice:
        return slice(number - self.num_queries, number)  # denoising queries come first

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        output = call.output
        layers = output.intermediate_hidden_states, output.intermediate_logits, output.intermediate_reference_points
        hidden, logits, boxes = (x.transpose(0, 1)[:, :, part] for x in layers)
        return self._head_input(hidden), logits, boxes

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        """Content is the model's denoising embedding of the label where there are labels, else the nearest query's."""
        queries = super().queries_from_boxes(view, boxes, labels)
        if labels is None or self.model.config.num_denoising == 0:
            return queries
        if self.classes is not None:
            labels = torch.tensor(self.classes, device=labels.device)[labels]
        return replace(queries, content=self.base.denoising_class_embed(labels))


class RTDetrV2Adapter(RTDetrAdapter):
    """RT-DETRv2: sampling is a function without a module of its own, so locations are read off its inputs."""

    def sampling(self, stack: ExitStack, call: DecoderCall) -> None:
        for layer in self.decoder.layers:
            attention = layer.encoder_attn
            references = []

            def keep_reference(module, args, kwargs, references=references):
                references.append(kwargs["reference_points"])

            def keep_locations(module, args, offsets, attention=attention, references=references):
                scale = self.points_scale(attention)[:, None] * attention.offset_scale
                reference = references[-1][:, :, None]
                offsets = offsets.view(*offsets.shape[:2], attention.n_heads, len(scale), 2)
                call.locations.append(reference[..., :2] + offsets * scale * reference[..., 2:])

            stack.callback(attention.register_forward_pre_hook(keep_reference, with_kwargs=True).remove)
            stack.callback(attention.sampling_offsets.register_forward_hook(keep_locations).remove)

    def points_scale(self, attention) -> Tensor:
        """(P,) one over the number of points on the level of each point."""
        return attention.n_points_scale
