"""The adapter between a family of transformers' detectors and `DetrView`: capture one decoder call, call it again.

Every family calls its decoder with keyword arguments. A hook before the decoder keeps them, a hook after it keeps what
came out, and ``decoder(**{**kept, <query arguments>: others})`` decodes other queries on the same memory. What the
arguments are called and how the output is read is the family's `DecoderContract`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..view import DetrView, Queries
from . import capture
from .capture import DecoderCall
from .checks import check_checkpointing, enough_places
from .classes import keep_classes
from .contract import DecoderContract
from .references import at_least_float32
from .replay import replay


class FamilyAdapter(DecoderContract):
    """One model as its family prescribes.

    A subclass is a decoder contract (`DecoderContract`). The adapter changes nothing in the model and keeps nothing of a
    batch: what it hangs into the model for a call goes with the call.
    """

    def __init__(self, model: PreTrainedModel, classes: Sequence[int] | None = None):
        super().__init__(model, classes)
        self._call: DecoderCall | None = None

    def forward(self, inputs: Mapping, attentions: bool = False) -> tuple[ModelOutput, DetrView]:
        """Runs the model.

        Args:
            inputs: arguments of ``model.forward``, with ``labels`` or without.
            attentions: whether the view, and replays on it, hold attention maps.

        Returns:
            the model's output as it is without the adapter, and the view of its own queries.
        """
        self.check_call(attentions)
        call = DecoderCall()
        with ExitStack() as stack:
            decoding = stack.enter_context(ExitStack())

            def before(module, args, kwargs):
                call.arguments = self.arguments(args, kwargs)
                decoding.enter_context(self.decoding(call, attentions, replaying=False))
                return args, {**kwargs, **self.attention_flags(attentions)}

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
            with enough_places(self.model):
                output = self.model(**inputs)
            self.layer_predictions()
        if self.memory_mask_argument is None and inputs.get("pixel_mask") is not None:
            call.memory_mask = capture.cells_of(inputs["pixel_mask"], self.memory_shapes(call))
        part = self.own(len(call))
        view = self.view_of(call, part, self.queries(call, part), call.predictions, attentions)
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
            return self.predict(call, slice(0, len(call)))[1:]
        if call.predictions is None:
            call.predictions = self.predict(call, self.own(len(call)))
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

    def replay(self, view: DetrView, groups: Sequence[Queries], detach_memory: bool = False) -> tuple[DetrView, ...]:
        """Decodes groups of queries that don't see each other on the memory of a view, one view per group.

        Args:
            view: of this adapter, from `forward` or `replay`.
            groups: (B, k, ...) each, any k. What the view says of queries that a group's mask calls padding is finite
                and means nothing.
            detach_memory: gradients stop at the memory instead of flowing on to encoder and backbone.
        """
        return replay(self, view, groups, detach_memory)

    # ------------------------------------------------------------------------- a call of the decoder, first or again

    @contextmanager
    def decoding(self, call: DecoderCall, attentions: bool, replaying: bool):
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

    def attention_flags(self, attentions: bool) -> dict:
        """What asks the decoder for its attention maps, where it takes no other word."""
        return {"output_attentions": True} if attentions and self.always_eager else {}

    def predict(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """`heads` in float32: hidden states, logits and boxes of some queries of a call."""
        # Autocast would round the boxes to 8 bits
        with torch.autocast(call.arguments["inputs_embeds"].device.type, enabled=False):
            hidden, logits, boxes = self.heads(call, part)
        return hidden, at_least_float32(logits), at_least_float32(boxes)

    def memory_shapes(self, call: DecoderCall) -> tuple[tuple[int, int], ...]:
        """(h, w) of every level of the memory, fine to coarse."""
        shapes = call.arguments.get("spatial_shapes_list") or [call.features[-1].shape[-2:]]
        return tuple((int(height), int(width)) for height, width in shapes)

    def view_of(
        self, call: DecoderCall, part: slice, queries: Queries, predictions: Sequence[Tensor], attentions: bool
    ) -> DetrView:
        """The view of some queries of a call, from their `predict`."""
        hidden, logits, boxes = predictions
        arguments, mask = call.arguments, self.memory_mask_argument
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
            memory_shapes=self.memory_shapes(call),
            memory_mask=arguments[mask].bool() if mask else call.memory_mask,
            features=call.features,
            self_attentions=among_queries,
            cross_attentions=to_memory,
            edges=edges,
            edge_reference=edge_reference,
            adapter=self,
            decoder_arguments=arguments,
        )

    def check_call(self, attentions: bool) -> None:
        """Refuses a state of the model in which views would be wrong.

        Raises:
            ValueError: the message says what to change.
        """
        check_checkpointing(self, attentions)
