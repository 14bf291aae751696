"""YOLOS: a ViT whose detection tokens run through all of its layers beside the patches; there is no decoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..view import AttentionMaps, DetrView, Queries
from . import capture
from .base import FamilyAdapter
from .capture import DecoderCall


class YolosAdapter(FamilyAdapter):
    """YOLOS. Its queries can't be replayed: the patches attend to them, so there is no memory without them.

    Views have one layer, the last, on which alone the heads are trained. Memory, and the one feature map, are the
    patches as the detection tokens attend to them there, after the norm before its attention; what the last layer makes
    of the patches is read by nothing and trained by nothing. Attention maps are those of the last layer, from the
    detection tokens, normalised over detection tokens and over patches each. Pixel masks are not
    read; views take from them where the padding lies.
    """

    classification = "softmax"
    memory_mask_argument = None
    replays = False
    boxes_to_queries = False

    @property
    def base(self) -> nn.Module:
        return self.model.vit

    @property
    def decoder(self) -> nn.Module:
        return self.base.encoder

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.decoder.layer[-1:]

    @property
    def num_layers(self) -> int:
        return 1

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def num_queries(self) -> int:
        return self.model.config.num_detection_tokens

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def feature_module(self) -> nn.Module:
        return self.layers[0].layernorm_before

    @property
    def before_decoder(self) -> tuple[nn.Module, ...]:
        """Every layer but the last, in which views look."""
        return tuple(self.decoder.layer[:-1])

    def feature_maps(self, output: Tensor) -> tuple[Tensor, ...]:
        arguments, patch = self._call.arguments, self.model.config.patch_size
        grid = arguments["height"] // patch, arguments["width"] // patch
        return (output[:, 1 : -self.num_queries].mT.unflatten(-1, grid),)  # the first token is the class token

    def memory(self, call: DecoderCall) -> Tensor:
        return call.features[0].flatten(2).mT

    def arguments(self, args: tuple, kwargs: dict) -> dict:
        return {**kwargs, "inputs_embeds": args[0][:, -self.num_queries :]}

    def own(self, number: int) -> slice:
        return slice(number - self.num_queries, number)  # of all tokens the last

    def heads(self, call: DecoderCall, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.base.layernorm(self._head_input(call.output.last_hidden_state))
        hidden = tokens[:, -self.num_queries :][:, part]
        boxes = self.model.bbox_predictor(hidden).sigmoid()
        return hidden[None], self.model.class_labels_classifier(hidden)[None], boxes[None]

    def keep_attentions(self, stack: ExitStack, call: DecoderCall) -> None:
        attention, eager = self.layers[0].attention.attention, stack.enter_context(ExitStack())

        def before(module, args):  # the layers before keep their attention: all tokens of 12 layers are much memory
            capture.use_eager_attention(eager, self.decoder.config)

        def keep(module, args, output):
            eager.close()
            call.self_attentions.append(output[1])

        stack.callback(attention.register_forward_pre_hook(before).remove)
        stack.callback(attention.register_forward_hook(keep).remove)

    def attention_maps(self, call: DecoderCall, part: slice) -> tuple[AttentionMaps, AttentionMaps]:
        weights, number = call.self_attentions[0], self.num_queries

        def over(keys: slice) -> AttentionMaps:
            share = weights[:, :, -number:, keys]
            share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
            return AttentionMaps("dense", (share,))

        return over(slice(-number, None)), over(slice(1, -number))

    def replay(self, view: DetrView, groups: Sequence[Queries], detach_memory: bool = False) -> tuple[DetrView, ...]:
        raise ValueError(
            "The queries of yolos run through its whole ViT and the patches attend to them, so no other queries can be "
            "decoded on the memory of a view. Take a method that doesn't replay, or a family with a decoder."
        )

    def queries_from_boxes(self, view: DetrView, boxes: Tensor, labels: Tensor | None = None) -> Queries:
        raise ValueError("The queries of yolos know no boxes, so none can be placed on boxes. Take another family.")

    def _check_model(self) -> None:
        if self.model.config.auxiliary_loss:
            raise ValueError(
                "`auxiliary_loss` of the yolos model is True, with which transformers' own forward fails as soon as it "
                "is given labels. Set model.config.auxiliary_loss = False."
            )
