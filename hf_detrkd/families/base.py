"""The adapter between a family of transformers' detectors and `DetrView`: capture one decoder call, call it again.

Every family calls its decoder with keyword arguments. A hook before the decoder keeps them, a hook after it keeps what
came out, and ``decoder(**{**kept, <query arguments>: others})`` decodes other queries on the same memory. A family says
what its decoder calls these arguments and how its own head modules read the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..view import AttentionMaps, Classification, DetrView, Queries

# References travel as boxes in [0, 1] and enter some decoders before a sigmoid. The error this makes at the border is
# below float32's resolution of the rest, and the slope of the logit stays finite.
LOGIT_EPS = 1e-7


@dataclass
class DecoderCall:
    """One call of a decoder: what went in, what came out, and what its layers computed on the way."""

    arguments: dict = field(default_factory=dict)
    output: ModelOutput | None = None
    layer_states: list[Tensor] = field(default_factory=list)
    """L times (B, N, D), as the layers return them."""
    self_attentions: list[Tensor] = field(default_factory=list)
    cross_attentions: list[Tensor] = field(default_factory=list)
    locations: list[Tensor] = field(default_factory=list)
    features: tuple[Tensor, ...] = ()
    predictions: tuple[Tensor, Tensor, Tensor] | None = None
    """Hidden states, logits and boxes of the model's own queries, once they were asked for."""


class FamilyAdapter:
    """One model seen as its family prescribes.

    Subclasses are a decoder contract: the class attributes below, `heads`, and where needed the few methods after it.
    """

    classification: ClassVar[Classification] = "sigmoid"
    position_argument: ClassVar[str | None] = None
    """The decoder's argument for (B, Q, D) position embeddings of the queries."""
    reference_argument: ClassVar[str | None] = None
    """The decoder's argument for the queries' boxes or centres."""
    reference_is_logit: ClassVar[bool] = False
    """Whether the decoder takes the reference before a sigmoid."""
    mask_argument: ClassVar[str | None] = None
    """The decoder's argument for a float mask (B, 1, Q, Q) of its self-attention."""
    mask_by_hook: ClassVar[bool] = False
    """The decoder hands its layers no mask, but their ``self_attn`` takes one."""
    memory_mask_argument: ClassVar[str | None] = "encoder_attention_mask"
    cross_attention: ClassVar[str] = "encoder_attn"
    """Name of the cross-attention module of a layer."""
    sampled: ClassVar[bool] = False
    """Whether cross-attention samples points (deformable attention) instead of attending to all of the memory."""
    returns_attentions: ClassVar[bool] = False
    """The decoder is always eager and gives attention maps when its argument ``output_attentions`` says so."""
    learned_content: ClassVar[bool] = True
    """False where the content of all queries is zeros."""
    boxes_to_queries: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, classes: Sequence[int] | None = None):
        self.model = model
        self.base = model.model  # not `base_model`: RT-DETR of transformers 5.17 has no prefix
        self.decoder = self.base.decoder
        self.classes = self._check_classes(classes)
        self._call: DecoderCall | None = None
        self._check_model()

    # ------------------------------------------------------------------------------------------------- sizes

    @property
    def provides(self) -> frozenset[str]:
        """What methods can ask of this model.

        "replay"; "self_attentions", "cross_attentions" (dense over the memory) or "sampled_attentions"; "padding" (it
        reads a pixel mask); "content" (queries start from embeddings that are not zeros), "position" (queries take
        position embeddings), "reference" (queries carry a box or a centre) and "queries_from_boxes".
        """
        has = {
            "replay": True,
            "self_attentions": True,
            "cross_attentions": not self.sampled,
            "sampled_attentions": self.sampled,
            "padding": self.memory_mask_argument is not None,
            "content": self.learned_content,
            "position": self.position_argument is not None,
            "reference": self.reference_size > 0,
            "queries_from_boxes": self.boxes_to_queries,
        }
        return frozenset(name for name, provided in has.items() if provided)

    @property
    def reference_size(self) -> int:
        """4: queries carry a box, 2: a centre, 0: neither."""
        return 4 if self.reference_argument else 0

    @property
    def width(self) -> int:
        """D of queries and hidden states."""
        return self.model.config.d_model

    @property
    def memory_width(self) -> int:
        """D of the memory."""
        return self.width

    @property
    def num_layers(self) -> int:
        """L of the decoder."""
        return self.model.config.decoder_layers

    @property
    def num_queries(self) -> int:
        """Q, the model's own queries."""
        return self.model.config.num_queries

    @property
    def num_classes(self) -> int:
        """K of the views."""
        return self.model.config.num_labels if self.classes is None else len(self.classes)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of ``DetrView.features``, fine to coarse."""
        return tuple(self.feature_module.intermediate_channel_sizes)

    # ------------------------------------------------------------------------------------------------- family

    @property
    def feature_module(self) -> nn.Module:
        """The module whose output is the backbone's feature maps."""
        return self.base.backbone

    def feature_maps(self, output) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) in the output of `feature_module`."""
        return tuple(feature for feature, _ in output)

    def own(self, number: int) -> slice:
        """Which of the ``number`` queries of a decoder call in ``model.forward`` are the model's own."""
        return slice(0, number)

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(L, B, Q, D) hidden states, (L, B, Q, K or K + 1) logits and (L, B, Q, 4) boxes of some queries of a call."""
        raise NotImplementedError

    def queries(self, call: DecoderCall, part: slice) -> Queries:
        """Some of the queries that entered a call."""
        arguments = call.arguments
        position = arguments[self.position_argument][:, part] if self.position_argument else None
        reference = arguments[self.reference_argument][:, part] if self.reference_argument else None
        if self.reference_is_logit and reference is not None:
            reference = reference.sigmoid()
        return Queries(arguments["inputs_embeds"][:, part], position, reference)

    def output_for_model(self, call: DecoderCall) -> ModelOutput | None:
        """What the model is to see instead of the decoder's output; None: the output itself."""
        return None

    def training_flags(self, replaying: bool) -> Iterator[tuple[nn.Module, bool]]:
        """Modules, and the value their own ``training`` attribute has to have while the decoder runs."""
        return iter(())

    def prepare_replay(self, stack: ExitStack, groups: list[Queries]) -> list[Queries]:
        """A family's own hooks around a replay, and the groups of queries that its decoder is to take."""
        return groups

    def sampling(self, stack: ExitStack, call: DecoderCall) -> None:
        """Records the sampling locations of every cross-attention, L times (B, N, H, ..., 2)."""

        def keep(module, args):
            call.locations.append(args[4])

        for layer in self.decoder.layers:
            stack.callback(getattr(layer, self.cross_attention).attn.register_forward_pre_hook(keep).remove)

    def sampling_levels(self) -> tuple[int, ...]:
        """Points that one head samples on each level."""
        attention = getattr(self.decoder.layers[0], self.cross_attention)
        return (attention.n_points,) * attention.n_levels

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, inputs: Mapping, attentions: bool = False) -> tuple[ModelOutput, DetrView]:
        """Runs the model.

        Args:
            inputs: arguments of ``model.forward``, with ``labels`` or without.
            attentions: whether the view, and replays on it, hold attention maps.

        Returns:
            the model's output, unchanged, and the view of its own queries.
        """
        self._check_call(attentions)
        call = DecoderCall()
        with ExitStack() as stack:
            decoding = stack.enter_context(ExitStack())

            def before(module, args, kwargs):
                call.arguments = kwargs
                decoding.enter_context(self._decoding(call, attentions, replaying=False))
                return args, {**kwargs, **self._flags(attentions)}

            def after(module, args, output):
                decoding.close()
                call.output = output
                return self.output_for_model(call)

            def keep_features(module, args, output):
                call.features = self.feature_maps(output)

            stack.callback(self.decoder.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(self.decoder.register_forward_hook(after).remove)
            stack.callback(self.feature_module.register_forward_hook(keep_features).remove)
            self._call = call
            stack.callback(self.close)
            output = self.model(**inputs)
            self.layer_predictions()
        part = self.own(call.arguments["inputs_embeds"].shape[1])
        return output, self._view(call, part, self.queries(call, part), call.predictions, attentions)

    def layer_predictions(self, every_query: bool = False) -> tuple[Tensor, Tensor]:
        """(L, B, Q, K or K + 1) logits and (L, B, Q, 4) boxes of every layer, float32, all classes of the model.

        For use while `forward` runs, once the decoder has run (in ``model.loss_function``). The view takes the same
        tensors.

        Args:
            every_query: the denoising queries and extra groups of a training forward too, in the decoder's order.
        """
        call = self._call
        if call is None or call.output is None:
            raise RuntimeError(
                "`layer_predictions` was called while no decoder output is there. Call it inside "
                "`FamilyAdapter.forward`, after the decoder has run; afterwards the view has the predictions."
            )
        number = call.arguments["inputs_embeds"].shape[1]
        if every_query:
            return self._predict(call, slice(0, number))[1:]
        if call.predictions is None:
            call.predictions = self._predict(call, self.own(number))
        return call.predictions[1:]

    def close(self) -> None:
        """Forgets the batch. Nothing of the adapter stays in the model between calls, so there is no more to undo."""
        self._call = None

    def __enter__(self) -> FamilyAdapter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- replay

    def replay(self, view: DetrView, groups: Sequence[Queries], detach_memory: bool = False) -> tuple[DetrView, ...]:
        """Decodes groups of queries that don't see each other on the memory of a view, one view per group.

        One call of the decoder where its self-attention takes a mask, else one call per group.

        Args:
            view: of this adapter, from `forward` or `replay`.
            groups: (B, k, ...) each, any k.
            detach_memory: whether gradients stop at the memory instead of flowing on to encoder and backbone.
        """
        attentions = view.self_attentions is not None
        self._check_call(attentions)
        groups = [self._check_queries(view, queries) for queries in groups]
        # A mask that came through a hook would be gone when checkpointing computes the layer again in the backward pass
        masked = self.mask_argument or (self.mask_by_hook and not self._checkpointing())
        if len(groups) > 1 and not masked:
            return tuple(self.replay(view, (queries,), detach_memory)[0] for queries in groups)

        memory = view.decoder_arguments
        if detach_memory:
            memory = {name: x.detach() if isinstance(x, Tensor) else x for name, x in memory.items()}
        call = DecoderCall(features=view.features)
        with ExitStack() as stack:
            groups = self.prepare_replay(stack, groups)
            queries = Queries.concatenate(groups)
            call.arguments = {**memory, **self._query_arguments(queries)}
            if len(groups) > 1:
                self._isolate(stack, call, [len(group) for group in groups])
            stack.enter_context(self._decoding(call, attentions, replaying=True))
            call.output = self.decoder(**call.arguments, **self._flags(attentions))
        hidden, logits, boxes = self._predict(call, slice(0, len(queries)))
        views, start = [], 0
        for group in groups:
            part = slice(start, start + len(group))
            predictions = hidden[:, :, part], logits[:, :, part], boxes[:, :, part]
            views.append(self._view(call, part, group, predictions, attentions))
            start = part.stop
        return tuple(views)

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        """Queries placed on boxes; what a box doesn't determine is borrowed from the nearest own query of the view.

        Args:
            view: of this adapter.
            boxes: (B, k, 4) in [0, 1].
            labels: (B, k) classes of the view, used where the family embeds them.
        """
        nearest = nearest_reference(boxes, view.queries.reference)
        return replace(view.queries.select(nearest), reference=boxes[..., : self.reference_size])

    # ------------------------------------------------------------------------------------------------- inside

    def _flags(self, attentions: bool) -> dict:
        return {"output_attentions": True} if attentions and self.returns_attentions else {}

    @contextmanager
    def _decoding(self, call: DecoderCall, attentions: bool, replaying: bool):
        """What has to hold while the decoder runs, given back afterwards."""

        def keep_state(module, args, output):
            call.layer_states.append(output[0] if isinstance(output, tuple) else output)

        def keep_attention(attentions: list):
            return lambda module, args, output: attentions.append(output[1])

        with ExitStack() as stack:
            for module, training in self.training_flags(replaying):
                stack.callback(setattr, module, "training", module.training)
                module.training = training
            for layer in self.decoder.layers:
                stack.callback(layer.register_forward_hook(keep_state).remove)
                if attentions:
                    keep = keep_attention(call.self_attentions)
                    stack.callback(layer.self_attn.register_forward_hook(keep).remove)
                    keep = keep_attention(call.cross_attentions)
                    stack.callback(getattr(layer, self.cross_attention).register_forward_hook(keep).remove)
            if attentions and self.sampled:
                self.sampling(stack, call)
            if attentions and not self.returns_attentions:
                config = self.decoder.config
                # The key "" is this config alone: the backbone keeps its own implementation
                stack.callback(setattr, config, "_attn_implementation", {"": config._attn_implementation})
                config._attn_implementation = {"": "eager"}
            yield

    def _isolate(self, stack: ExitStack, call: DecoderCall, sizes: Sequence[int]) -> None:
        """Lets every query see its own group only."""
        content = call.arguments["inputs_embeds"]
        group = torch.repeat_interleave(torch.tensor(sizes)).to(content.device)
        mask = torch.zeros(len(group), len(group), dtype=content.dtype, device=content.device)
        mask = mask.masked_fill(group[:, None] != group[None, :], -torch.inf).expand(len(content), 1, -1, -1)
        if self.mask_argument:
            call.arguments[self.mask_argument] = mask
            return
        for layer in self.decoder.layers:
            hook = layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
            )
            stack.callback(hook.remove)

    def _query_arguments(self, queries: Queries) -> dict:
        """The decoder's query arguments for these queries."""
        arguments = {"inputs_embeds": queries.content}
        if self.position_argument:
            arguments[self.position_argument] = queries.position
        if self.reference_argument:
            reference = queries.reference
            arguments[self.reference_argument] = reference.logit(LOGIT_EPS) if self.reference_is_logit else reference
        if self.mask_argument:
            arguments[self.mask_argument] = None
        return arguments

    def _predict(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        # Under autocast a head would round its boxes to 8 bits
        with torch.autocast(call.arguments["inputs_embeds"].device.type, enabled=False):
            hidden, logits, boxes = self.heads(call, part)
        return hidden, at_least_float32(logits), at_least_float32(boxes)

    def _view(
        self, call: DecoderCall, part: slice, queries: Queries, predictions: tuple[Tensor, ...], attentions: bool
    ) -> DetrView:
        hidden, logits, boxes = predictions
        arguments = call.arguments
        memory, mask = arguments["encoder_hidden_states"], self.memory_mask_argument
        shapes = arguments.get("spatial_shapes_list") or [call.features[-1].shape[-2:]]
        self_attentions, cross_attentions = self._attention_maps(call, part) if attentions else (None, None)
        query_arguments = {"inputs_embeds", self.position_argument, self.reference_argument, self.mask_argument}
        return DetrView(
            logits=self._select_classes(logits),
            boxes=boxes,
            hidden_states=hidden,
            classification=self.classification,
            queries=queries,
            memory=memory,
            memory_shapes=tuple((int(height), int(width)) for height, width in shapes),
            memory_mask=arguments[mask].bool() if mask else None,
            features=call.features,
            self_attentions=self_attentions,
            cross_attentions=cross_attentions,
            adapter=self,
            decoder_arguments={name: x for name, x in arguments.items() if name not in query_arguments},
        )

    def _attention_maps(self, call: DecoderCall, part: slice) -> tuple[AttentionMaps, AttentionMaps]:
        batch = len(call.arguments["inputs_embeds"])
        # Group DETR stacks its groups along the batch, the model's own first
        own = tuple(weights[:batch, :, part, part] for weights in call.self_attentions)
        self_attentions = AttentionMaps("dense", own)
        if not self.sampled:
            return self_attentions, AttentionMaps("dense", tuple(w[:, :, part] for w in call.cross_attentions))
        weights = tuple(w[:, part].flatten(3) for w in call.cross_attentions)
        locations = tuple(x[:, part].flatten(3, -2) for x in call.locations)
        return self_attentions, AttentionMaps("sampled", weights, locations, self.sampling_levels())

    def _select_classes(self, logits: Tensor) -> Tensor:
        if self.classes is None:
            return logits
        if self.classification == "sigmoid":
            return logits[..., self.classes]
        dropped = [c for c in range(logits.shape[-1]) if c not in self.classes]  # no-object among them
        return torch.cat([logits[..., self.classes], logits[..., dropped].logsumexp(-1, keepdim=True)], dim=-1)

    def _head_input(self, hidden: Tensor) -> Tensor:
        """Hidden states in the type of the head's weights, float32 under autocast."""
        return hidden.to(self.model.dtype)

    def _checkpointing(self) -> bool:
        return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.decoder.layers)

    # ------------------------------------------------------------------------------------------------- checks

    def _check_model(self) -> None:
        """Refuses what the family's decoder can't do."""

    def _check_call(self, attentions: bool) -> None:
        if not self._checkpointing():
            return
        for layer in self.decoder.layers:
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if function is not None and getattr(function, "keywords", {}).get("use_reentrant", True):
                raise ValueError(
                    "The model uses reentrant gradient checkpointing, under which losses on attention maps silently "
                    "lose their gradient. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
        if attentions and not self.returns_attentions and self.decoder.config._attn_implementation != "eager":
            raise ValueError(
                "Attention maps were asked for under gradient checkpointing, but the model's attention is "
                f"{self.decoder.config._attn_implementation!r}: the backward pass would compute the layers again "
                "without maps. Load the model with attn_implementation='eager' or switch checkpointing off."
            )

    def _check_classes(self, classes: Sequence[int] | None) -> list[int] | None:
        if classes is None:
            return None
        classes, number = [int(c) for c in classes], self.model.config.num_labels
        if not classes or len(set(classes)) < len(classes) or not all(0 <= c < number for c in classes):
            raise ValueError(
                f"`classes` is {classes}; it must hold different indices of the model's {number} classes, at least one."
            )
        return classes

    def _check_queries(self, view: DetrView, queries: Queries) -> Queries:
        family, batch = self.model.config.model_type, len(view.memory)
        sizes = {"content": self.width}
        if self.position_argument:
            sizes["position"] = self.width
        if self.reference_argument:
            sizes["reference"] = self.reference_size
        for name, size in sizes.items():
            value = getattr(queries, name)
            if value is None or value.shape[0] != batch or value.shape[-1] != size:
                given = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"`{name}` of the queries has shape {given}; the decoder of this {family} model needs "
                    f"({batch}, k, {size})."
                )
        if self.model.dtype in (torch.float16, torch.bfloat16):
            parts = {name: getattr(queries, name) for name in sizes}
            return replace(queries, **{name: value.to(self.model.dtype) for name, value in parts.items()})
        return queries


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32, anything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nearest_reference(boxes: Tensor, reference: Tensor) -> Tensor:
    """(B, k) index of the reference (B, Q, 4 or 2) whose centre is nearest to each of the boxes (B, k, 4)."""
    distance = (boxes[:, :, None, :2] - reference.detach()[:, None, :, :2]).square().sum(-1)
    return distance.argmin(-1)


def refined(delta: Tensor, reference_logit: Tensor) -> Tensor:
    """Boxes from a head's output and the reference it corrects: (..., 4) logits plus (..., 2) or (..., 4) logits."""
    size = reference_logit.shape[-1]
    return torch.cat([delta[..., :size] + reference_logit, delta[..., size:]], dim=-1).sigmoid()
