"""RT-DETR and RT-DETRv2: queries are selected from the encoder's tokens; the decoder predicts after every layer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..view import DetrView, Proposals, Queries
from .base import FamilyAdapter
from .capture import DecoderCall
from .proposals import proposals_of


class RTDetrAdapter(FamilyAdapter):
    """RT-DETR. Pixel masks are not read; views take from them where the padding lies."""

    reference_argument = "reference_points"
    reference_is_logit = True
    mask_argument = "encoder_attention_mask"  # transformers' name for the mask of the self-attention
    memory_mask_argument = None
    sampled = True
    scores_quality = True

    @property
    def matching_costs(self) -> dict[str, float]:
        names = {
            "class_cost": "class_cost",
            "l1_cost": "bbox_cost",
            "giou_cost": "giou_cost",
            "alpha": "alpha",
            "gamma": "gamma",
        }
        return {name: getattr(self.model.config, f"matcher_{its}") for name, its in names.items()}

    def own(self, number: int) -> slice:
        return slice(number - self.num_queries, number)  # denoising queries come first

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        output = call.output
        layers = output.intermediate_hidden_states, output.intermediate_logits, output.intermediate_reference_points
        hidden, logits, boxes = (x.transpose(0, 1)[:, :, part] for x in layers)
        return self._head_input(hidden), logits, boxes

    @property
    def embeds_labels(self) -> bool:
        return self.model.config.num_denoising > 0

    @property
    def two_stage(self) -> bool:
        return True

    def proposals(self, output: ModelOutput, view: DetrView) -> Proposals:
        return proposals_of(output.enc_outputs_class, output.enc_outputs_coord_logits, self.classes)

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        """Content is the model's denoising embedding of the label where there are labels, else the nearest query's."""
        queries = super().queries_from_boxes(view, boxes, labels)
        if labels is None or not self.embeds_labels:
            return queries
        if self.classes is not None:
            labels = torch.tensor(self.classes, device=labels.device)[labels]
        return replace(queries, content=self.base.denoising_class_embed(labels))


class RTDetrV2Adapter(RTDetrAdapter):
    """RT-DETRv2. It samples in a function, not in a module, so locations are computed from what hooks can see."""

    def keep_locations(self, stack: ExitStack, call: DecoderCall) -> None:
        offsets = []

        def keep_offsets(module, args, output):
            offsets.append(output)

        def keep(attention, args, kwargs, output):
            # Deformable DETR (arXiv 2010.04159), A.3: offsets are in units of the reference box
            scale = self.points_scale(attention)[:, None] * attention.offset_scale
            reference = kwargs["reference_points"][:, :, None]
            offset = offsets.pop().unflatten(-1, (attention.n_heads, len(scale), 2))
            call.locations.append(reference[..., :2] + offset * scale * reference[..., 2:])

        for layer in self.decoder.layers:
            stack.callback(layer.encoder_attn.sampling_offsets.register_forward_hook(keep_offsets).remove)
            stack.callback(layer.encoder_attn.register_forward_hook(keep, with_kwargs=True).remove)

    def points_scale(self, attention: nn.Module) -> Tensor:
        """(P,) for each point one over the number of points on its level."""
        return attention.n_points_scale
