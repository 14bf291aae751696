"""Other queries on the memory that a decoder has already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..view import DetrView, Queries
from . import capture
from .capture import DecoderCall
from .checks import checked_queries
from .references import reference_logit

if TYPE_CHECKING:
    from .base import FamilyAdapter


def replay(
    adapter: FamilyAdapter, view: DetrView, groups: Sequence[Queries], detach_memory: bool
) -> tuple[DetrView, ...]:
    """`FamilyAdapter.replay`.

    One call of the decoder where its self-attention takes a mask, else one per group: outside self-attention a decoder
    treats every query alone.
    """
    attentions = view.self_attentions is not None
    adapter.check_call(attentions)
    groups = [checked_queries(adapter, view, queries) for queries in groups]
    masked = len(groups) > 1 or any(queries.mask is not None for queries in groups)
    if not groups or (len(groups) > 1 and not adapter.takes_mask):
        return tuple(replay(adapter, view, (queries,), detach_memory)[0] for queries in groups)

    memory = view.decoder_arguments
    if detach_memory:
        memory = {name: x.detach() if isinstance(x, Tensor) else x for name, x in memory.items()}
    call = DecoderCall(features=view.features, memory_mask=view.memory_mask)
    with ExitStack() as stack:
        groups = adapter.prepare_replay(stack, groups)
        call.arguments = {**memory, **_query_arguments(adapter, view, groups)}
        if masked:
            real = Queries.concatenate(groups).mask
            mask = capture.group_mask([len(group) for group in groups], call.arguments["inputs_embeds"], real)
            if adapter.mask_argument:
                call.arguments[adapter.mask_argument] = mask
            else:
                capture.mask_self_attention(stack, adapter.layers, mask)
        stack.enter_context(adapter.decoding(call, attentions, replaying=True))
        call.output = adapter.decoder(**{**call.arguments, **adapter.attention_flags(attentions)})
    predictions = adapter.predict(call, slice(0, len(call)))
    views, start = [], 0
    for group in groups:
        part = slice(start, start + len(group))
        views.append(adapter.view_of(call, part, group, [x[:, :, part] for x in predictions], attentions))
        start = part.stop
    return tuple(views)


def _query_arguments(adapter: FamilyAdapter, view: DetrView, groups: list[Queries]) -> dict:
    queries = Queries.concatenate(groups)
    values = {
        adapter.position_argument: queries.position,
        adapter.reference_argument: queries.reference,
        adapter.mask_argument: None,
        "inputs_embeds": queries.content,
    }
    if adapter.reference_is_logit:
        # The view's own go back as they came: from a sigmoid and back they would lose bits
        own, argument = view.queries.reference, view.decoder_arguments[adapter.reference_argument]
        logits = [argument if q.reference is own else reference_logit(q.reference) for q in groups]
        values[adapter.reference_argument] = torch.cat(logits, dim=1)
    return {name: value for name, value in values.items() if name is not None}
