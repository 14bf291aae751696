"""Deformable DETR: one-stage, with box refinement, and two-stage."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..view import DetrView, Queries
from .base import FamilyAdapter
from .capture import DecoderCall
from .references import reference_logit, refine


class DeformableDetrAdapter(FamilyAdapter):
    """Deformable DETR. One-stage queries have a centre as their ``reference``, two-stage queries a box."""

    position_argument = "object_queries_position_embeddings"
    reference_argument = "reference_points"
    mask_argument = "attention_mask"  # no argument of its own: the decoder hands it on to the self-attention
    sampled = True

    @property
    def reference_size(self) -> int:
        return 4 if self.model.config.two_stage else 2

    @property
    def num_queries(self) -> int:
        config = self.model.config
        return config.two_stage_num_proposals if config.two_stage else config.num_queries

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        inverse_sigmoid = sys.modules[type(self.model).__module__].inverse_sigmoid
        hidden = self._head_input(call.output.intermediate_hidden_states.transpose(0, 1)[:, :, part])
        # Layer l corrects the reference it was given: the queries' own, then what the layer before made of it
        given = [call.arguments["reference_points"], *call.output.intermediate_reference_points.unbind(1)[:-1]]
        logits, boxes = [], []
        for layer, (state, reference) in enumerate(zip(hidden, given, strict=True)):
            logits.append(self.model.class_embed[layer](state))
            reference = inverse_sigmoid(self._head_input(reference[:, part]))
            boxes.append(refine(self.model.bbox_embed[layer](state), reference))
        return hidden, torch.stack(logits), torch.stack(boxes)

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        """Two-stage: exactly the queries the model would make of such proposals. One-stage: the nearest, moved."""
        if not self.model.config.two_stage:
            return super().queries_from_boxes(view, boxes, labels)
        proposals = self.base.get_proposal_pos_embed(reference_logit(boxes))
        embedding = self.base.pos_trans_norm(self.base.pos_trans(proposals.to(self.model.dtype)))
        position, content = embedding.split(self.width, dim=-1)
        return Queries(content, position, boxes)
