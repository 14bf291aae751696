"""The task loss: transformers' own, with all layers matched at once, boxes compared pair by pair, and, on request, every
decoder layer supervised."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_for_object_detection import ImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from ..matching import GroundTruthMatcher, Match, Pairs, matches
from .boxes import generalized_iou_of_corners, iou_of_corners

if TYPE_CHECKING:
    from ..families.base import FamilyAdapter


@dataclass
class TaskLoss:
    """What is left of a task loss besides its value, which is ``output.loss``."""

    _pairs: list[list[Pairs]] = field(default_factory=list)
    _device: torch.device | None = None

    @property
    def matching(self) -> tuple[Match, ...] | None:
        """The matching with the targets that the loss used, for the model's own queries.

        One match per decoder layer where every layer is supervised, else the last layer's alone; also the last alone
        for the D-FINE line, whose loss supervises a head before the first layer in place of the last layer but one.
        None where there was no loss, or where it matched other queries than the model's own: the groups of Group DETR
        and, in older transformers (5.17), the denoising queries of the RT-DETR line.
        """
        return matches(self._pairs, self._device) if self._pairs else None


@contextmanager
def task_loss(adapter: FamilyAdapter, per_layer: bool) -> Iterator[TaskLoss]:
    """While it runs, the loss that the adapter's model computes from ``labels`` is matched by ``GroundTruthMatcher``.

    The value is the same to the bit in float32. Under autocast transformers matches with costs of 8 bits in some
    families; here the costs are always float32. Group DETR's losses (lw_detr, rf_detr) keep transformers' matching.
    transformers compares each of the N matched boxes of a batch with all N targets and reads the diagonal; with the
    denoising queries of RT-DETR that is a third of a small model's training step, and grows with the square of the
    objects. Here boxes are compared with their own targets only.

        with task_loss(adapter, per_layer=True) as task:
            output, view = adapter.forward(batch)
        loss, matching = output.loss, task.matching

    Args:
        adapter: of a model whose loss function is transformers' own.
        per_layer: supervise every decoder layer, as ``config.auxiliary_loss=True`` does; but that flag changes the
            predictions of DETR-like models, while here the config is left as it is and the layers' predictions are
            ``adapter.layer_predictions()``. Nothing changes where the flag is on already. In the RT-DETR line the flag
            also stands for the losses of the encoder and of the denoising queries.
    """
    model, task = adapter.model, TaskLoss()
    original, assigned = model.loss_function, model.__dict__.get("_loss_function")

    def loss_function(logits, labels, device, pred_boxes, config, outputs_class=None, outputs_coord=None, *args, **kw):
        if per_layer and not config.auxiliary_loss and adapter.num_layers > 1:
            config = copy.copy(config)
            config.auxiliary_loss = True
            if outputs_class is None or outputs_coord is None:
                # The loss of Group DETR also trains the groups that are no part of the view.
                every_query = logits.shape[1] != adapter.num_queries
                outputs_class, outputs_coord = adapter.layer_predictions(every_query)
        with _matched_at_once(task, adapter.num_queries):
            return original(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, *args, **kw)

    model.loss_function = loss_function
    try:
        yield task
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
def _matched_at_once(task: TaskLoss, num_queries: int) -> Iterator[None]:
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
        compared.enter_context(_boxes_compared_in_pairs(criterion))

        auxiliary = pairs[1:]
        if isinstance(criterion, DFineLoss):
            auxiliary = []
        elif isinstance(criterion, RTDetrLoss):
            auxiliary = auxiliary[:-1]  # the last is the encoder's
        if all(layer.shape[1] == num_queries for layer in logits):
            task._pairs, task._device = [*auxiliary, pairs[0]], logits[0].device

    hook = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()
        compared.close()
        for criterion, matcher in replaced:
            criterion.matcher = matcher


@contextmanager
def _boxes_compared_in_pairs(criterion: nn.Module) -> Iterator[None]:
    """While it runs, the criterion's IoUs are those of box i with target i, for its methods read only these.

    The functions that give all pairs are global names in the modules of transformers that define the criterion.
    """
    modules = {sys.modules[kind.__module__] for kind in type(criterion).__mro__}
    replaced = [(module, name) for module in modules for name in _IN_PAIRS if name in vars(module)]
    originals = [getattr(module, name) for module, name in replaced]
    for (module, name), original in zip(replaced, originals, strict=True):
        setattr(module, name, _IN_PAIRS[name](original))
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


_IN_PAIRS = {"box_iou": _box_iou, "generalized_box_iou": _generalized_box_iou}
