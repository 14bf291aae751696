"""What a family says of its decoder, and what can be asked of any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..view import AttentionMaps, Classification, DetrView, Proposals, Queries
from . import capture
from .capture import DecoderCall
from .checks import checkpointing
from .classes import checked_classes
from .references import nearest


class DecoderContract:
    """How one family calls its decoder, and how its own head modules read what comes out.

    A family sets the class attributes, writes `heads`, and overrides the few other methods of the second section that
    it needs to. What methods ask for follows from them.
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
    scores_quality: ClassVar[bool] = False
    """Whether training makes a score the IoU of the box (varifocal loss and its kin), not the probability of the class."""
    has_edges: ClassVar[bool] = False
    """Whether boxes are predicted as distributions of their edges, `edge_bins`."""

    def __init__(self, model: PreTrainedModel, classes: Sequence[int] | None = None):
        self.model = model
        self._check_model()
        self.classes = checked_classes(classes, model.config.num_labels)

    def _check_model(self) -> None:
        """Refuses a model that the family's views can't follow."""

    # ---------------------------------------------------------------------------------------- what methods ask for

    @property
    def provides(self) -> frozenset[str]:
        """What methods can count on.

        "replay"; "self_attentions", and "cross_attentions" (over all of the memory) or "sampled_attentions"; "padding"
        (pixel masks are read); "content" (queries start from embeddings, not from zeros), "position" (they take
        position embeddings), "reference" (they carry a box or a centre), "queries_from_boxes", "label_content" (which
        reads the labels it is given); "query_mask" (a replay takes queries of which some are padding);
        "edge_distributions" (of which boxes are the expectation); "proposals" (of a first stage); "quality_scores"
        (training makes a score the IoU of the box).
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
            "query_mask": self.takes_mask,
            "edge_distributions": self.has_edges,
            "proposals": self.two_stage,
            "quality_scores": self.scores_quality,
        }
        return frozenset(name for name, provided in has.items() if provided)

    @property
    def takes_mask(self) -> bool:
        """Whether self-attention can be told which queries see each other."""
        if self.decoder.config._attn_implementation not in (None, "eager", "sdpa"):
            return False  # others take no float mask
        # What a hook puts in would be missing where checkpointing computes the layer again in the backward pass
        return bool(self.mask_argument) or (self.mask_by_hook and not checkpointing(self.layers))

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
    def matching_costs(self) -> dict[str, float]:
        """Settings of `GroundTruthMatcher` with which it matches queries with targets as the family does in training."""
        config = self.model.config
        return {"class_cost": config.class_cost, "l1_cost": config.bbox_cost, "giou_cost": config.giou_cost}

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

    def _head_input(self, x: Tensor) -> Tensor:
        """In the type of the heads' weights; under autocast that is float32."""
        return x.to(self.model.dtype)
