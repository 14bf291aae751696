"""The uniform value between models and losses: what a DETR-like detector saw and said, whatever its family.

Letters, used in every docstring of this package:

======  =====================================================================
B       images of a batch
L       decoder layers
Q       queries
K       classes
D       width of the decoder
S       memory tokens, the sum of ``h * w`` over the levels of the memory
H       attention heads
M       pairs of a match
N       targets of an image
======  =====================================================================

Boxes are ``(cx, cy, w, h)`` in [0, 1] of the unpadded image, as in transformers. Masks are True where an element is real.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .families.base import FamilyAdapter

Classification = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Queries:
    """What one model's decoder takes as its object queries. A family leaves out (None) what it does not have."""

    content: Tensor
    """(B, Q, D) the embeddings that enter the first decoder layer; zeros in DETR, Conditional DETR and DAB-DETR."""
    position: Tensor | None = None
    """(B, Q, D) positional embeddings, in families that don't compute them from the reference."""
    reference: Tensor | None = None
    """(B, Q, 4) boxes or (B, Q, 2) centres in [0, 1] from which the decoder starts."""
    mask: Tensor | None = None
    """(B, Q) True = real: no other query sees those that are padding. None: all are real."""
    edge_reference: Tensor | None = None
    """(B, Q, 4) boxes that distributions of edges are to be relative to; None: those that the decoder itself predicts."""

    def __len__(self) -> int:
        return self.content.shape[1]

    def detach(self) -> Queries:
        """The same queries without their graph."""
        return self._map(Tensor.detach)

    def all_real(self) -> Queries:
        """The same queries with a mask that says of all that they are real."""
        return replace(self, mask=torch.ones(self.content.shape[:2], dtype=torch.bool, device=self.content.device))

    def select(self, index: Tensor) -> Queries:
        """The queries at ``index`` (B, k), image by image."""
        return self._map(lambda value: take(value, index))

    def _map(self, function) -> Queries:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Queries(**{name: None if value is None else function(value) for name, value in values.items()})

    @staticmethod
    def concatenate(groups: list[Queries]) -> Queries:
        """One group after the other along Q, with the parts that all of them have; a missing mask is one of all real."""
        if any(group.mask is not None for group in groups):
            groups = [group if group.mask is not None else group.all_real() for group in groups]

        def join(name: str) -> Tensor | None:
            parts = [getattr(group, name) for group in groups]
            return None if any(part is None for part in parts) else torch.cat(parts, dim=1)

        return Queries(**{f.name: join(f.name) for f in fields(Queries)})


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of every decoder layer, normalised over what is attended to."""

    kind: Literal["dense", "sampled"]
    weights: tuple[Tensor, ...]
    """L times: dense (B, H, Q, S) or (B, H, Q, Q); sampled (B, Q, H, P), P = all sampling points of all levels."""
    locations: tuple[Tensor, ...] | None = None
    """Sampled only, L times (B, Q, H, P, 2): where each point lies, x and y in [0, 1] of its level."""
    levels: tuple[int, ...] | None = None
    """Sampled only: the number of points on each level, fine to coarse; their sum is P."""


@dataclass(frozen=True)
class Proposals:
    """What a two-stage model predicts at every token of its memory, before it selects its queries."""

    logits: Tensor
    """(B, S, K) of sigmoid heads, float32."""
    boxes: Tensor
    """(B, S, 4), float32."""
    valid: Tensor
    """(B, S) False at padding and at tokens so near to the border that the model never selects them."""


@dataclass(frozen=True)
class DetrView:
    """One forward pass, or one replay of the decoder, of one detector.

    Holds the model's own object queries only: denoising queries and the extra groups of Group DETR are cut away.
    ``logits`` and ``boxes`` are float32 under autocast too.
    """

    logits: Tensor
    """(L, B, Q, K) where ``classification`` is "sigmoid", (L, B, Q, K + 1) with no-object last where it is "softmax"."""
    boxes: Tensor
    """(L, B, Q, 4). D-FINE-like and RF-DETR-like models may leave [0, 1]."""
    hidden_states: Tensor
    """(L, B, Q, D), as the model's own heads read them."""
    classification: Classification
    queries: Queries
    """The input of decoder layer 0."""
    memory: Tensor
    """(B, S, D) what the decoder cross-attends to."""
    memory_shapes: tuple[tuple[int, int], ...]
    """(h, w) of every level of the memory, fine to coarse."""
    memory_mask: Tensor | None
    """(B, S) True = real; None where the model was given no mask of the pixels and makes none itself."""
    features: tuple[Tensor, ...]
    """Per level (B, C, h, w), fine to coarse, as the backbone gives them."""
    self_attentions: AttentionMaps | None = None
    cross_attentions: AttentionMaps | None = None
    edges: Tensor | None = None
    """(L, B, Q, 4, bins) logits of the distributions of left, top, right and bottom; None where boxes are predicted
    without distributions."""
    edge_reference: Tensor | None = None
    """(B, Q, 4) boxes that the distributions of all layers are relative to; without graph."""
    proposals: Proposals | None = None
    """Of a forward pass of a two-stage model; a replay has none."""
    adapter: FamilyAdapter | None = None
    """The adapter that made the view; it decodes again on this view's memory."""
    decoder_arguments: dict | None = None
    """What the decoder was called with; for the adapter only."""

    def class_probs(self) -> Tensor:
        """(L, B, Q, K) foreground probabilities, without the no-object column, for both kinds of heads."""
        if self.classification == "softmax":
            return self.logits.softmax(-1)[..., :-1]
        return self.logits.sigmoid()

    def memory_maps(self) -> tuple[Tensor, ...]:
        """Per level (B, D, h, w), fine to coarse: the maps that the decoder reads."""
        return tuple(
            level.mT.unflatten(-1, shape)
            for level, shape in zip(self._levels(self.memory), self.memory_shapes, strict=True)
        )

    def memory_masks(self) -> tuple[Tensor, ...]:
        """Per level (B, h, w), True = real; all True where there is no mask."""
        mask = self.memory_mask
        if mask is None:
            mask = torch.ones(self.memory.shape[:2], dtype=torch.bool, device=self.memory.device)
        return tuple(
            level.unflatten(-1, shape) for level, shape in zip(self._levels(mask), self.memory_shapes, strict=True)
        )

    def _levels(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tokens.split([height * width for height, width in self.memory_shapes], dim=1)

    def replay(self, *groups: Queries, detach_memory: bool = False) -> DetrView | tuple[DetrView, ...]:
        """Decode other queries on the memory of this view, with gradient.

        Several groups don't see each other. One group gives one view, several give a tuple of views in their order.
        """
        views = self.adapter.replay(self, groups, detach_memory=detach_memory)
        return views[0] if len(groups) == 1 else views

    def queries_from_boxes(self, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        """Queries that this model's decoder understands, placed on ``boxes`` (B, k, 4); ``labels`` (B, k) or None."""
        return self.adapter.queries_from_boxes(self, boxes, labels)


def take(values: Tensor, index: Tensor) -> Tensor:
    """(B, k, ...) of (B, Q, ...) the rows at ``index`` (B, k), image by image."""
    return values.take_along_dim(index.view(*index.shape, *(1 for _ in values.shape[2:])), 1)
