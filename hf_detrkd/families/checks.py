"""What would make views or replays wrong, refused in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from ..view import DetrView, Queries

if TYPE_CHECKING:
    from .base import FamilyAdapter


def checkpointing(layers: Iterable[nn.Module]) -> bool:
    """Whether any layer will be computed again in the backward pass."""
    return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers)


def check_checkpointing(adapter: FamilyAdapter, attentions: bool) -> None:
    """Refuses checkpointing under which a view's tensors would have no gradient, or another one.

    Raises:
        ValueError: the message says what to change.
    """
    if not checkpointing(adapter.layers):
        return
    function = next(layer._gradient_checkpointing_func for layer in adapter.layers)
    if getattr(function, "keywords", {}).get("use_reentrant", True):
        raise ValueError(
            "The model uses reentrant gradient checkpointing, under which losses on attention maps silently lose "
            "their gradient. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
    implementation = adapter.decoder.config._attn_implementation
    if attentions and not adapter.always_eager and implementation != "eager":
        raise ValueError(
            f"Attention maps were asked for under gradient checkpointing with {implementation!r} attention, which "
            "gives none: the backward pass would compute the layers again by another function. Load the model "
            "with attn_implementation='eager', or switch checkpointing off."
        )


@contextmanager
def enough_places(model: PreTrainedModel) -> Iterator[None]:
    """Around a forward pass: says in words that the images are too small for a two-stage detector.

    It makes its queries of the best places of its feature maps, and there must be as many places as queries.

    Raises:
        ValueError: instead of the RuntimeError of torch.topk, which knows neither.
    """
    try:
        yield
    except RuntimeError as error:
        if "selected index k out of range" not in str(error):
            raise
        config = model.config
        number = getattr(config, "two_stage_num_proposals", None) or config.num_queries
        raise ValueError(
            f"The images have fewer places in the feature maps of this {config.model_type} model than it has queries, "
            f"{number}, and it makes each query of another place. Pass larger images (--image_size), or take a model with "
            "fewer queries (--student_num_queries, or num_queries in its config)."
        ) from error


def checked_queries(adapter: FamilyAdapter, view: DetrView, queries: Queries) -> Queries:
    """Queries that the adapter's decoder takes, in its type.

    Raises:
        ValueError: they don't fit it.
    """
    sizes = {"content": adapter.width}
    if adapter.position_argument:
        sizes["position"] = adapter.width
    if adapter.reference_argument or (adapter.reference_size and queries.reference is not None):
        sizes["reference"] = adapter.reference_size
    for name, size in sizes.items():
        value = getattr(queries, name)
        shape = None if value is None else tuple(value.shape)
        if shape != (len(view.memory), len(queries), size):
            raise ValueError(
                f"`{name}` of the queries has shape {shape}; the decoder of this {adapter.model.config.model_type} "
                f"model needs (B, k, {size}) with B {len(view.memory)}."
            )
    if queries.mask is not None and not adapter.takes_mask:
        raise ValueError(
            f"The queries have a `mask`, which the self-attention of this {adapter.model.config.model_type} decoder "
            f"doesn't take ({adapter.decoder.config._attn_implementation!r} attention). Decode images with equally "
            "many queries together, without a mask."
        )
    if queries.edge_reference is not None and not adapter.has_edges:
        raise ValueError(
            f"The queries have an `edge_reference`, but {adapter.model.config.model_type} predicts boxes without "
            "distributions of their edges. Leave it out."
        )
    if adapter.model.dtype.itemsize == 2:  # a model in half precision takes no other
        queries = replace(queries, **{name: getattr(queries, name).to(adapter.model.dtype) for name in sizes})
    return queries
