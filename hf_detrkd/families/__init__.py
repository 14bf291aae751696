"""The families of detectors in transformers that hf_detrkd knows: one line per ``config.model_type``."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from .base import FamilyAdapter
from .conditional_detr import ConditionalDetrAdapter
from .d_fine import Deimv2Adapter, DFineAdapter
from .dab_detr import DabDetrAdapter
from .deformable_detr import DeformableDetrAdapter
from .detr import DetrAdapter, TableTransformerAdapter
from .lw_detr import LwDetrAdapter, RfDetrAdapter
from .rt_detr import RTDetrAdapter, RTDetrV2Adapter
from .yolos import YolosAdapter

FAMILIES: dict[str, type[FamilyAdapter]] = {
    "conditional_detr": ConditionalDetrAdapter,
    "d_fine": DFineAdapter,
    "dab-detr": DabDetrAdapter,
    "deformable_detr": DeformableDetrAdapter,
    "deimv2": Deimv2Adapter,
    "detr": DetrAdapter,
    "lw_detr": LwDetrAdapter,
    "rf_detr": RfDetrAdapter,
    "rt_detr": RTDetrAdapter,
    "rt_detr_v2": RTDetrV2Adapter,
    "table-transformer": TableTransformerAdapter,
    "yolos": YolosAdapter,
}


def adapter_for(model: PreTrainedModel, classes: Sequence[int] | None = None) -> FamilyAdapter:
    """The adapter of a model's family.

    Args:
        model: a ``...ForObjectDetection`` model of transformers.
        classes: the model's classes that its views keep, in the views' order; None: all. Sigmoid heads lose the other
            columns; softmax heads count the other classes as no-object, which is their exact marginal.

    Raises:
        TypeError: not a transformers model.
        ValueError: a family without an adapter, a model without detection heads, or `classes` it doesn't have.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}; it must be a transformers PreTrainedModel. Unwrap it from DDP or "
            "torch.compile first."
        )
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"`model` is a {type(model).__name__} of the family {family!r}, which hf_detrkd has no adapter for. "
            f"Known families: {', '.join(sorted(FAMILIES))}. To add one, say in a subclass of FamilyAdapter (a file "
            "in hf_detrkd/families/) what its decoder calls its arguments and how its heads read the output, add a "
            "line to FAMILIES and a tiny model to tests/zoo.py: the contract tests say what is missing."
        )
    if not any(base.__name__.endswith("ForObjectDetection") for base in type(model).__mro__):
        raise ValueError(
            f"`model` is a {type(model).__name__}, which is no object detector. Load the checkpoint with "
            "AutoModelForObjectDetection."
        )
    return FAMILIES[family](model, classes)


__all__ = ["FAMILIES", "FamilyAdapter", "adapter_for"]
