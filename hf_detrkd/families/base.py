"""The adapter between a family of transformers' detectors and `DetrView`: capture one decoder call, call it again.

Every family calls its decoder with keyword arguments. A hook before the decoder keeps them, a hook after it keeps what
came out, and ``decoder(**{**kept, <query arguments>: others})`` decodes other queries on the same memory. A family says
what its decoder calls these arguments and how its own head modules read the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..view import AttentionMaps, Classification, DetrView, Proposals, Queries
from . import capture
from .capture import DecoderCall
from .classes import checked_classes, keep_classes
from .references import at_least_float32, nearest, reference_logit


class FamilyAdapter:
    """One model as its family prescribes.

    A subclass is a decoder contract: the class attributes below, `heads`, and the few other methods of its section
    where the family needs them. The adapter changes nothing in the model and keeps nothing of a batch: what it hangs
    into the model for a call goes with the call.
    """

    classification: ClassVar[Classification] = "sigmoid"
    position_argument: ClassVar[str | None] = None
    """The decoder's argument for (B, Q, D) position embeddings of the queries."""
    reference_argument: ClassVar[str | None] = None
    """The decoder's argument for the queries' boxes or centres."""
    reference_is_logit: ClassVar[bool] = False
    """Whether the decoder takes them before a sigmoid."""
    mask_argument: ClassVar[str | None] = None
    """The decoder's argument for a float mask (B, 1, Q, Q) of its self-attention."""
    mask_by_hook: ClassVar[bool] = False
    """The decoder hands its layers no mask, but their ``self_attn`` takes one."""
    memory_mask_argument: ClassVar[str | None] = "encoder_attention_mask"
    cross_attention: ClassVar[str] = "encoder_attn"
    """Name of the cross-attention of a layer."""
    sampled: ClassVar[bool] = False
    """Whether cross-attention samples points (deformable attention) instead of attending to all of the memory."""
    always_eager: ClassVar[bool] = False
    """Attention is eager whatever the config says, and gives its maps if ``output_attentions`` asks the decoder to."""
    replays: ClassVar[bool] = True
    """Whether the decoder can decode other queries on the memory it has."""
    boxes_to_queries: ClassVar[bool] = True
    has_edges: ClassVar[bool] = False
    """Whether boxes are predicted as distributions of their edges, `edge_bins`."""

    def __init__(self, model: PreTrainedModel, classes: Sequence[int] | None = None):
        self.model = model
        self._check_model()
        self.classes = checked_classes(classes, model.config.num_labels)
        self._call: DecoderCall | None = None

    # ---------------------------------------------------------------------------------------- what methods ask for

    @property
    def provides(self) -> frozenset[str]:
        """What methods can count on.

        "replay"; "self_attentions", and "cross_attentions" (over all of the memory) or "sampled_attentions"; "padding"
        (pixel masks are read); "content" (queries start from embeddings, not from zeros), "position" (they take
        position embeddings), "reference" (they carry a box or a centre), "queries_from_boxes", "label_content" (which
        reads the labels it is given); "query_mask" (a replay takes queries of which some are padding);
        "edge_distributions" (of which boxes are the expectation).
        """
        has = {
            "replay": self.replays,
            "self_attentions": True,
            "cross_attentions": not self.sampled,
            "sampled_attentions": self.sampled,
            "padding": self.memory_mask_argument is not None,
            "content": self.learned_content,
            "position": self.position_argument is not None,
            "reference": self.reference_size > 0,
            "queries_from_boxes": self.boxes_to_queries,
            "label_content": self.embeds_labels,
            "query_mask": self._takes_mask(),
            "edge_distributions": self.has_edges,
            "proposals": self.two_stage,
        }
        return frozenset(name for name, provided in has.items() if provided)

    @property
    def learned_content(self) -> bool:
        """False where the content of every query is zeros."""
        return True

    @property
    def embeds_labels(self) -> bool:
        """Whether `queries_from_boxes` makes content of labels."""
        return False

    @property
    def edge_bins(self) -> tuple[int, float, float] | None:
        """What the bins of the edges' distributions stand for: D-FINE's number of the last bin, `up` and `reg_scale`."""
        return None

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

    @property
    def matching_costs(self) -> tuple[float, float, float]:
        """Of class, L1 and GIoU in the matching of queries with targets, as the family trains."""
        config = self.model.config
        return config.class_cost, config.bbox_cost, config.giou_cost

    # ---------------------------------------------------------------------------------------- what a family says

    @property
    def base(self) -> nn.Module:
        """The model without its heads."""
        return self.model.model  # RT-DETR of transformers 5.17 has no `base_model`

    @property
    def decoder(self) -> nn.Module:
        """The module whose call turns queries and memory into the states that the heads read."""
        return self.base.decoder

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's, L of them."""
        return self.decoder.layers

    def arguments(self, args: tuple, kwargs: dict) -> dict:
        """What a call of the decoder is given; "inputs_embeds" (B, N, D) are its queries."""
        return kwargs

    def memory(self, call: DecoderCall) -> Tensor:
        """(B, S, D) what the decoder cross-attends to."""
        return call.arguments["encoder_hidden_states"]

    @property
    def feature_module(self) -> nn.Module:
        """The module whose output is the backbone's feature maps."""
        return self.base.backbone

    @property
    def before_decoder(self) -> tuple[nn.Module, ...]:
        """The modules that run once per batch whatever is replayed: the backbone, and the encoder where there is one."""
        encoder = dict(self.base.named_children()).get("encoder")
        return (self.feature_module,) if encoder is None else (self.feature_module, encoder)

    def feature_maps(self, output) -> tuple[Tensor, ...]:
        """The maps (B, C, h, w) in the output of `feature_module`."""
        return tuple(feature for feature, _ in output)

    def own(self, number: int) -> slice:
        """Which of the ``number`` queries of a decoder call in ``model.forward`` are the model's own."""
        return slice(0, number)

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(L, B, Q, D) hidden states, (L, B, Q, K or K + 1) logits and (L, B, Q, 4) boxes of some queries of a call."""
        raise NotImplementedError

    def proposals(self, output: ModelOutput, view: DetrView) -> Proposals | None:
        """What the model predicts at every token, where it has two stages, from its own output."""
        return None

    @property
    def two_stage(self) -> bool:
        """Whether queries are selected among `proposals`."""
        return False

    def edges(self, call: DecoderCall, part: slice) -> tuple[Tensor | None, Tensor | None]:
        """(L, B, Q, 4, bins) logits of the edges' distributions and (B, Q, 4) boxes they are relative to."""
        return None, None

    def queries(self, call: DecoderCall, part: slice) -> Queries:
        """Some of the queries that entered a call."""

        def argument(name: str | None) -> Tensor | None:
            return None if name is None else call.arguments[name][:, part]

        reference = argument(self.reference_argument)
        if self.reference_is_logit:
            reference = reference.sigmoid()
        return Queries(argument("inputs_embeds"), argument(self.position_argument), reference)

    def prepare_replay(self, stack: ExitStack, groups: list[Queries]) -> list[Queries]:
        """A family's own hooks around a replay, and the groups as its decoder is to take them."""
        return groups

    def training_flags(self, replaying: bool) -> Iterable[tuple[nn.Module, bool]]:
        """Modules, and the value that their own ``training`` must have while the decoder runs."""
        return ()

    def output_for_model(self, call: DecoderCall) -> ModelOutput | None:
        """What the model is to see instead of the decoder's output; None: the output itself."""
        return None

    def keep_attentions(self, stack: ExitStack, call: DecoderCall) -> None:
        """Records the weights of every attention, in eager mode, which alone gives them."""
        capture.keep_attentions(stack, call, self.layers, self.cross_attention)
        if not self.always_eager:
            capture.use_eager_attention(stack, self.decoder.config)

    def keep_locations(self, stack: ExitStack, call: DecoderCall) -> None:
        """Records where every cross-attention samples."""
        capture.keep_locations(stack, call, self.layers, self.cross_attention)

    def sampling_levels(self) -> tuple[int, ...]:
        """Points that one head samples on each level."""
        attention = getattr(self.layers[0], self.cross_attention)
        return (attention.n_points,) * attention.n_levels

    def attention_maps(self, call: DecoderCall, part: slice) -> tuple[AttentionMaps, AttentionMaps]:
        """What was recorded of some of the queries of a call: among them, and between them and the memory."""
        levels = self.sampling_levels() if self.sampled else None
        return capture.self_attentions(call, part), capture.cross_attentions(call, part, levels)

    # ---------------------------------------------------------------------------------------- forward

    def forward(self, inputs: Mapping, attentions: bool = False) -> tuple[ModelOutput, DetrView]:
        """Runs the model.

        Args:
            inputs: arguments of ``model.forward``, with ``labels`` or without.
            attentions: whether the view, and replays on it, hold attention maps.

        Returns:
            the model's output as it is without the adapter, and the view of its own queries.
        """
        self._check_call(attentions)
        call = DecoderCall()
        with ExitStack() as stack:
            decoding = stack.enter_context(ExitStack())

            def before(module, args, kwargs):
                call.arguments = self.arguments(args, kwargs)
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
        part = self.own(len(call))
        view = self._view(call, part, self.queries(call, part), call.predictions, attentions)
        return output, replace(view, proposals=self.proposals(output, view))

    def layer_predictions(self, every_query: bool = False) -> tuple[Tensor, Tensor]:
        """(L, B, Q, K or K + 1) logits and (L, B, Q, 4) boxes of every layer, float32, all classes of the model.

        For the task loss: it exists while `forward` runs, once the decoder has run. The view has the same tensors.

        Args:
            every_query: with the denoising queries and extra groups of a training step, in the decoder's order.
        """
        call = self._call
        if call is None or call.output is None:
            raise RuntimeError(
                "`layer_predictions` was called while there is no decoder output. Call it during "
                "`FamilyAdapter.forward`, after the decoder has run; afterwards the view has the predictions."
            )
        if every_query:
            return self._predict(call, slice(0, len(call)))[1:]
        if call.predictions is None:
            call.predictions = self._predict(call, self.own(len(call)))
        return call.predictions[1:]

    def compile(self) -> None:
        """torch.compile of what comes before the decoder.

        Compiling the decoder or the whole model breaks into dozens of graphs at matching and denoising.
        """
        for module in self.before_decoder:
            module.compile()

    def close(self) -> None:
        """Forgets the batch. Between calls the adapter leaves nothing in the model, so there is no more to undo."""
        self._call = None

    def __enter__(self) -> FamilyAdapter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------- replay

    def replay(self, view: DetrView, groups: Sequence[Queries], detach_memory: bool = False) -> tuple[DetrView, ...]:
        """Decodes groups of queries that don't see each other on the memory of a view, one view per group.

        One call of the decoder where its self-attention takes a mask, else one per group: outside self-attention a
        decoder treats every query alone.

        Args:
            view: of this adapter, from `forward` or `replay`.
            groups: (B, k, ...) each, any k. What the view says of queries that a group's mask calls padding is finite
                and means nothing.
            detach_memory: gradients stop at the memory instead of flowing on to encoder and backbone.
        """
        attentions = view.self_attentions is not None
        self._check_call(attentions)
        groups = [self._check_queries(view, queries) for queries in groups]
        masked = len(groups) > 1 or any(queries.mask is not None for queries in groups)
        if not groups or (len(groups) > 1 and not self._takes_mask()):
            return tuple(self.replay(view, (queries,), detach_memory)[0] for queries in groups)

        memory = view.decoder_arguments
        if detach_memory:
            memory = {name: x.detach() if isinstance(x, Tensor) else x for name, x in memory.items()}
        call = DecoderCall(features=view.features)
        with ExitStack() as stack:
            groups = self.prepare_replay(stack, groups)
            call.arguments = {**memory, **self._query_arguments(view, groups)}
            if masked:
                real = Queries.concatenate(groups).mask
                mask = capture.group_mask([len(group) for group in groups], call.arguments["inputs_embeds"], real)
                if self.mask_argument:
                    call.arguments[self.mask_argument] = mask
                else:
                    capture.mask_self_attention(stack, self.layers, mask)
            stack.enter_context(self._decoding(call, attentions, replaying=True))
            call.output = self.decoder(**{**call.arguments, **self._flags(attentions)})
        predictions = self._predict(call, slice(0, len(call)))
        views, start = [], 0
        for group in groups:
            part = slice(start, start + len(group))
            views.append(self._view(call, part, group, [x[:, :, part] for x in predictions], attentions))
            start = part.stop
        return tuple(views)

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        """Queries placed on boxes; what a box doesn't determine is lent by the nearest of the view's queries.

        Args:
            view: of this adapter.
            boxes: (B, k, 4) in [0, 1].
            labels: (B, k) classes of the view; used by families that embed them.

        Raises:
            ValueError: the queries of the family know no boxes.
        """
        queries = view.queries.select(nearest(boxes, view.queries.reference))
        return replace(queries, reference=boxes[..., : self.reference_size])

    # ---------------------------------------------------------------------------------------- inside

    @contextmanager
    def _decoding(self, call: DecoderCall, attentions: bool, replaying: bool):
        """What holds while the decoder runs."""
        with ExitStack() as stack:
            for module, training in self.training_flags(replaying):
                capture.set_training(stack, module, training)
            capture.keep_layers(stack, call, self.layers)
            if attentions:
                self.keep_attentions(stack, call)
                if self.sampled:
                    self.keep_locations(stack, call)
            yield

    def _flags(self, attentions: bool) -> dict:
        return {"output_attentions": True} if attentions and self.always_eager else {}

    def _takes_mask(self) -> bool:
        if self.decoder.config._attn_implementation not in (None, "eager", "sdpa"):
            return False  # others take no float mask
        # What a hook puts in would be missing where checkpointing computes the layer again in the backward pass
        return bool(self.mask_argument) or (self.mask_by_hook and not self._checkpointing())

    def _query_arguments(self, view: DetrView, groups: list[Queries]) -> dict:
        queries = Queries.concatenate(groups)
        values = {
            self.position_argument: queries.position,
            self.reference_argument: queries.reference,
            self.mask_argument: None,
            "inputs_embeds": queries.content,
        }
        if self.reference_is_logit:
            # The view's own go back as they came: from a sigmoid and back they would lose bits
            own, argument = view.queries.reference, view.decoder_arguments[self.reference_argument]
            logits = [argument if q.reference is own else reference_logit(q.reference) for q in groups]
            values[self.reference_argument] = torch.cat(logits, dim=1)
        return {name: value for name, value in values.items() if name is not None}

    def _predict(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        # Autocast would round the boxes to 8 bits
        with torch.autocast(call.arguments["inputs_embeds"].device.type, enabled=False):
            hidden, logits, boxes = self.heads(call, part)
        return hidden, at_least_float32(logits), at_least_float32(boxes)

    def _head_input(self, x: Tensor) -> Tensor:
        """In the type of the heads' weights; under autocast that is float32."""
        return x.to(self.model.dtype)

    def _view(
        self, call: DecoderCall, part: slice, queries: Queries, predictions: Sequence[Tensor], attentions: bool
    ) -> DetrView:
        hidden, logits, boxes = predictions
        arguments, mask = call.arguments, self.memory_mask_argument
        shapes = arguments.get("spatial_shapes_list") or [call.features[-1].shape[-2:]]
        among_queries, to_memory = self.attention_maps(call, part) if attentions else (None, None)
        of_queries = {"inputs_embeds", self.position_argument, self.mask_argument}
        arguments = {name: x for name, x in arguments.items() if name not in of_queries}
        edges, edge_reference = self.edges(call, part)
        if self.reference_argument:
            arguments[self.reference_argument] = arguments[self.reference_argument][:, part]
        return DetrView(
            logits=keep_classes(logits, self.classes, self.classification),
            boxes=boxes,
            hidden_states=hidden,
            classification=self.classification,
            queries=queries,
            memory=self.memory(call),
            memory_shapes=tuple((int(height), int(width)) for height, width in shapes),
            memory_mask=arguments[mask].bool() if mask else None,
            features=call.features,
            self_attentions=among_queries,
            cross_attentions=to_memory,
            edges=edges,
            edge_reference=edge_reference,
            adapter=self,
            decoder_arguments=arguments,
        )

    def _checkpointing(self) -> bool:
        return any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in self.layers)

    # ---------------------------------------------------------------------------------------- checks

    def _check_model(self) -> None:
        """Refuses a model that the family's views can't follow."""

    def _check_call(self, attentions: bool) -> None:
        if not self._checkpointing():
            return
        function = next(layer._gradient_checkpointing_func for layer in self.layers)
        if getattr(function, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "The model uses reentrant gradient checkpointing, under which losses on attention maps silently lose "
                "their gradient. Pass gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        implementation = self.decoder.config._attn_implementation
        if attentions and not self.always_eager and implementation != "eager":
            raise ValueError(
                f"Attention maps were asked for under gradient checkpointing with {implementation!r} attention, which "
                "gives none: the backward pass would compute the layers again by another function. Load the model "
                "with attn_implementation='eager', or switch checkpointing off."
            )

    def _check_queries(self, view: DetrView, queries: Queries) -> Queries:
        sizes = {"content": self.width}
        if self.position_argument:
            sizes["position"] = self.width
        if self.reference_argument or (self.reference_size and queries.reference is not None):
            sizes["reference"] = self.reference_size
        for name, size in sizes.items():
            value = getattr(queries, name)
            shape = None if value is None else tuple(value.shape)
            if shape != (len(view.memory), len(queries), size):
                raise ValueError(
                    f"`{name}` of the queries has shape {shape}; the decoder of this {self.model.config.model_type} "
                    f"model needs (B, k, {size}) with B {len(view.memory)}."
                )
        if queries.mask is not None and not self._takes_mask():
            raise ValueError(
                f"The queries have a `mask`, which the self-attention of this {self.model.config.model_type} decoder "
                f"doesn't take ({self.decoder.config._attn_implementation!r} attention). Decode images with equally "
                "many queries together, without a mask."
            )
        if queries.edge_reference is not None and not self.has_edges:
            raise ValueError(
                f"The queries have an `edge_reference`, but {self.model.config.model_type} predicts boxes without "
                "distributions of their edges. Leave it out."
            )
        if self.model.dtype.itemsize == 2:  # a model in half precision takes no other
            queries = replace(queries, **{name: getattr(queries, name).to(self.model.dtype) for name in sizes})
        return queries
