"""Conditional DETR: DETR whose cross-attention looks around a centre that is computed from the position embedding."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from ..view import DetrView, Queries
from .base import FamilyAdapter
from .capture import DecoderCall
from .detr import DetrAdapter
from .references import reference_logit, refine


class ConditionalDetrAdapter(DetrAdapter):
    """Conditional DETR. A query's ``reference`` (B, Q, 2) is its centre.

    The decoder computes the centre of a position embedding itself. In a replay the reference of the queries takes its
    place; queries without one get the decoder's.
    """

    classification = "sigmoid"
    mask_argument = None
    mask_by_hook = True
    boxes_to_queries = True

    @property
    def reference_size(self) -> int:
        return 2

    def queries(self, call: DecoderCall, part: slice) -> Queries:
        centres = call.output.reference_points.transpose(0, 1)  # (Q, B, 2) in the output
        return replace(super().queries(call, part), reference=centres[:, part])

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.normed_states(call, part)
        centre = self._head_input(call.output.reference_points.transpose(0, 1)[:, part])
        inverse_sigmoid = sys.modules[type(self.model).__module__].inverse_sigmoid
        boxes = refine(self.model.bbox_predictor(hidden), inverse_sigmoid(centre).expand(len(hidden), -1, -1, -1))
        return hidden, self.model.class_labels_classifier(hidden), boxes

    def prepare_replay(self, stack: ExitStack, groups: list[Queries]) -> list[Queries]:
        head = self.decoder.ref_point_head
        groups = [
            replace(group, reference=head(group.position).sigmoid()) if group.reference is None else group
            for group in groups
        ]
        centres = reference_logit(Queries.concatenate(groups).reference)
        stack.callback(head.register_forward_hook(lambda module, args, output: centres).remove)
        return groups

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        return FamilyAdapter.queries_from_boxes(self, view, boxes, labels)
