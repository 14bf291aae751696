"""The task loss: transformers' own, with all layers matched at once, boxes compared pair by pair and counted over all
processes, and, on request, every decoder layer supervised."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from ..matching import GroundTruthMatcher, Pairs
from .boxes import generalized_iou_of_corners, iou_of_corners

if TYPE_CHECKING:
    from ..families.base import FamilyAdapter

DIVERGED = (
    "The student predicts NaN or infinite numbers: its training has diverged. Start again with a lower --learning_rate, a larger "
    "--warmup_steps or, in the place of --fp16 true, with --bf16 true."
)


@contextmanager
def task_loss(adapter: FamilyAdapter, per_layer: bool) -> Iterator[None]:
    """While it runs, the loss that the adapter's model computes from ``labels`` is matched by ``GroundTruthMatcher``.

    The value is the same to the bit in float32. Under autocast transformers matches with costs of 8 bits in some
    families; here the costs are always float32. Group DETR's losses (lw_detr, rf_detr) keep transformers' matching.
    transformers compares each of the N matched boxes of a batch with all N targets and reads the diagonal; with the
    denoising queries of RT-DETR that is a third of a small model's training step, and grows with the square of the
    objects. Here boxes are compared with their own targets only.

        with task_loss(adapter, per_layer=True):
            output, view = adapter.forward(batch)

    Args:
        adapter: of a model whose loss function is transformers' own.
        per_layer: supervise every decoder layer, as ``config.auxiliary_loss=True`` does; but that flag changes the
            predictions of DETR-like models, while here the config is left as it is and the layers' predictions are
            ``adapter.layer_predictions()``. Nothing changes where the flag is on already. In the RT-DETR line the flag
            also stands for the losses of the encoder and of the denoising queries.

    Raises:
        FloatingPointError: while it runs, where the predictions are no numbers.
    """
    model = adapter.model
    original, assigned = model.loss_function, model.__dict__.get("_loss_function")

    def loss_function(logits, labels, device, pred_boxes, config, outputs_class=None, outputs_coord=None, *args, **kw):
        if per_layer and not config.auxiliary_loss and adapter.num_layers > 1:
            config = copy.copy(config)
            config.auxiliary_loss = True
            if outputs_class is None or outputs_coord is None:
                # The loss of Group DETR also trains the groups that are no part of the view.
                every_query = logits.shape[1] != adapter.num_queries
                outputs_class, outputs_coord = adapter.layer_predictions(every_query)
        with _matched_at_once():
            try:
                return original(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, *args, **kw)
            except ValueError as error:  # of the matching, or of transformers' boxes, with all their numbers
                if logits.isfinite().all() and pred_boxes.isfinite().all():
                    raise
                raise FloatingPointError(DIVERGED) from error

    model.loss_function = loss_function
    try:
        yield
    finally:
        if assigned is None:
            del model._loss_function
        else:
            model.loss_function = assigned


class _Precomputed(nn.Module):
    """Stands in for a criterion's matcher and hands out the pairs that are computed already, call by call."""

    def __init__(self, pairs: list[list[Pairs]]) -> None:
        super().__init__()
        self._pairs = iter(pairs)

    def forward(self, outputs, targets) -> list[Pairs]:
        return next(self._pairs)


@contextmanager
def _matched_at_once() -> Iterator[None]:
    """While it runs, every criterion of transformers finds its matchings computed.

    transformers builds criterion and matcher anew inside each loss function, so that a hook for all modules is the one
    place to meet them. All criteria call their matcher for the last layer first, then for the auxiliary outputs.
    """
    replaced: list[tuple[nn.Module, nn.Module]] = []
    compared = ExitStack()

    def before(criterion: nn.Module, arguments: tuple) -> None:
        if not isinstance(criterion, (ImageLoss, RTDetrLoss)):
            return
        matcher = GroundTruthMatcher.like(criterion.matcher)
        if matcher is None:
            return
        outputs, targets = arguments
        predictions = [outputs, *outputs.get("auxiliary_outputs", ())]
        logits = [layer["logits"] for layer in predictions]
        pairs = matcher.pairs(logits, [layer["pred_boxes"] for layer in predictions], targets)
        replaced.append((criterion, criterion.matcher))
        criterion.matcher = _Precomputed(pairs)
        compared.enter_context(_functions_replaced(criterion))

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
        compared.close()
        for criterion, matcher in replaced:
            criterion.matcher = matcher


@contextmanager
def _functions_replaced(criterion: nn.Module) -> Iterator[None]:
    """While it runs, the criterion calls `_REPLACED`: global names in the modules of transformers that define it.

    IoUs are then those of box i with target i, for its methods read only these.
    """
    modules = {sys.modules[kind.__module__] for kind in type(criterion).__mro__}
    replaced = [(module, name) for module in modules for name in _REPLACED if name in vars(module)]
    originals = [getattr(module, name) for module, name in replaced]
    for (module, name), original in zip(replaced, originals, strict=True):
        setattr(module, name, _REPLACED[name](original))
    try:
        yield
    finally:
        for (module, name), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


class _Diagonal:
    """Stands for a matrix of which only the diagonal is ever read."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None) -> Tensor:
        if function is not torch.diag:
            raise TypeError(f"transformers' loss calls {function} where it used to call torch.diag.")
        return arguments[0].values


def _box_iou(original: Callable) -> Callable:
    """transformers' ``box_iou``: (IoU, union) of boxes as corners, (N, 4) each. Its losses never read the union."""

    def box_iou(a: Tensor, b: Tensor) -> tuple[_Diagonal, None]:
        return _Diagonal(iou_of_corners(a.float().unbind(-1), b.float().unbind(-1))), None

    return box_iou


def _generalized_box_iou(original: Callable) -> Callable:
    """transformers' ``generalized_box_iou`` of boxes as corners, (N, 4) each."""

    def generalized_box_iou(a: Tensor, b: Tensor) -> _Diagonal | Tensor:
        if not all((boxes[:, 2:] >= boxes[:, :2]).all() for boxes in (a, b)):
            return original(a, b)  # which refuses boxes that are NaN or of negative size
        return _Diagonal(generalized_iou_of_corners(a.float().unbind(-1), b.float().unbind(-1)))

    return generalized_box_iou


def _reduce(original: Callable) -> Callable:
    """accelerate's ``reduce``, by which `ImageLoss` counts the boxes of all processes before it divides by the processes.

    transformers (5.17 to 5.24) leaves it at its default, the mean, and so divides twice: on N processes every loss of
    boxes would weigh N times as much as on one.
    """

    def reduce(number: Tensor) -> Tensor:
        return original(number, reduction="sum")

    return reduce


_REPLACED = {"box_iou": _box_iou, "generalized_box_iou": _generalized_box_iou, "reduce": _reduce}
