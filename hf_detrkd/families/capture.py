"""What one call of a decoder computes, kept by hooks that live as long as the call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from ..view import AttentionMaps


@dataclass
class DecoderCall:
    """One call of a decoder: what went in, what came out, and what its layers computed on the way.

    N queries: the model's own, and in a training step denoising queries or the groups of Group DETR too.
    """

    arguments: dict = field(default_factory=dict)
    output: ModelOutput | None = None
    layer_states: list[Tensor] = field(default_factory=list)
    """L times (B, N, D), as the layers return them."""
    self_attentions: list[Tensor] = field(default_factory=list)
    """L times (B, H, N, N)."""
    cross_attentions: list[Tensor] = field(default_factory=list)
    """L times (B, H, N, S), or (B, N, H, ...) over sampling points."""
    locations: list[Tensor] = field(default_factory=list)
    """L times (B, N, H, ..., 2), where the sampling points lie."""
    features: tuple[Tensor, ...] = ()
    memory_mask: Tensor | None = None
    """(B, S) of families whose decoder takes none."""
    predictions: tuple[Tensor, Tensor, Tensor] | None = None
    """Hidden states, logits and boxes of the model's own queries, once they were asked for."""

    def __len__(self) -> int:
        return self.arguments["inputs_embeds"].shape[1]


def keep_layers(stack: ExitStack, call: DecoderCall, layers: Iterable[nn.Module]) -> None:
    """Keeps what every layer returns until the stack is closed."""

    def keep(module, args, output):
        call.layer_states.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        stack.callback(layer.register_forward_hook(keep).remove)


def keep_attentions(stack: ExitStack, call: DecoderCall, layers: Iterable[nn.Module], cross_attention: str) -> None:
    """Keeps the weights that every self-attention and cross-attention returns beside its output."""

    def keep_self(module, args, output):
        call.self_attentions.append(output[1])

    def keep_cross(module, args, output):
        call.cross_attentions.append(output[1])

    for layer in layers:
        stack.callback(layer.self_attn.register_forward_hook(keep_self).remove)
        stack.callback(getattr(layer, cross_attention).register_forward_hook(keep_cross).remove)


def keep_locations(stack: ExitStack, call: DecoderCall, layers: Iterable[nn.Module], cross_attention: str) -> None:
    """Keeps the locations that every deformable attention hands to its sampling module."""

    def keep(module, args):
        call.locations.append(args[4])

    for layer in layers:
        stack.callback(getattr(layer, cross_attention).attn.register_forward_pre_hook(keep).remove)


def self_attentions(call: DecoderCall, part: slice) -> AttentionMaps:
    """The maps among some of the queries of a call."""
    batch = len(call.arguments["inputs_embeds"])
    # Group DETR stacks its groups along the batch, the model's own first
    return AttentionMaps("dense", tuple(weights[:batch, :, part, part] for weights in call.self_attentions))


def cross_attentions(call: DecoderCall, part: slice, levels: tuple[int, ...] | None) -> AttentionMaps:
    """The maps between some of the queries of a call and its memory; ``levels`` of the points where it is sampled."""
    if levels is None:
        return AttentionMaps("dense", tuple(weights[:, :, part] for weights in call.cross_attentions))
    weights = tuple(weights[:, part].flatten(3) for weights in call.cross_attentions)
    locations = tuple(points[:, part].flatten(3, -2) for points in call.locations)
    return AttentionMaps("sampled", weights, locations, levels)


def mask_self_attention(stack: ExitStack, layers: Iterable[nn.Module], mask: Tensor) -> None:
    """Puts a mask into self-attentions whose decoder hands them none."""

    def put(module, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    for layer in layers:
        stack.callback(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True).remove)


def group_mask(sizes: Sequence[int], content: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, 1, N, N) float mask under which each of N queries sees its own group: 0, and minus infinity elsewhere.

    Where ``real`` (B, N) is False a query is padding, which sees the group but which none but itself sees.
    """
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(content.device)
    hidden = group[:, None] != group
    if real is not None:
        # A softmax needs something to see, so padding sees at least itself
        itself = torch.eye(len(group), dtype=torch.bool, device=content.device)
        hidden = hidden | (~real[:, None] & ~itself)
    mask = torch.zeros(hidden.shape, dtype=content.dtype, device=content.device).masked_fill(hidden, -torch.inf)
    return mask.view(-1, 1, *hidden.shape[-2:]).expand(len(content), 1, -1, -1)


def use_eager_attention(stack: ExitStack, config: PretrainedConfig) -> None:
    """Lets attention modules of this config return their weights until the stack is closed."""
    # The key "" stands for this config alone: the backbone's keeps its implementation
    stack.callback(setattr, config, "_attn_implementation", {"": config._attn_implementation})
    config._attn_implementation = {"": "eager"}


def set_training(stack: ExitStack, module: nn.Module, training: bool) -> None:
    """Sets the flag of one module, not of its children, until the stack is closed."""
    stack.callback(setattr, module, "training", module.training)
    module.training = training


def cells_of(pixel_mask: Tensor, shapes: Iterable[tuple[int, int]]) -> Tensor:
    """(B, S) True = real, of the cells of all levels, from a mask of the pixels (B, height, width); as transformers' encoders do."""
    mask = pixel_mask[:, None].float()
    return torch.cat([interpolate(mask, size=shape).flatten(1) > 0 for shape in shapes], dim=1)
