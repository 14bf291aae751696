"""The distillation methods: one file per paper, one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..families import FamilyAdapter
from .auto import ALIKE, Choice, attends_densely, choose, settled, with_choice
from .base import DistillationMethod, Paper, configure
from .cl_detr import CLDetr, CLDetrConfig
from .clockdistill import CLoCKDistill, CLoCKDistillConfig
from .d3etr import D3ETR, D3ETRConfig
from .detrdistill import DETRDistill, DETRDistillConfig
from .drkd import DRKD, DRKDConfig
from .features import Features, FeaturesConfig
from .kd_detr import KDDetr, KDDetrConfig
from .ld import LD, LDConfig
from .logit_kd import LogitKD, LogitKDConfig
from .proposals import ProposalKD, ProposalsConfig
from .qskd import QSKD, QSKDConfig

METHODS: dict[str, type[DistillationMethod]] = {
    "logit_kd": LogitKD,
    "kd_detr": KDDetr,
    "features": Features,
    "d3etr": D3ETR,
    "qskd": QSKD,
    "detrdistill": DETRDistill,
    "clockdistill": CLoCKDistill,
    "cl_detr": CLDetr,
    "ld": LD,
    "drkd": DRKD,
    "proposals": ProposalKD,
}
"""``none``, the twin, is the absence of a method."""


def build_methods(
    names: Sequence[str], settings: Mapping[str, Any] | None, student: FamilyAdapter, teacher: FamilyAdapter
) -> list[DistillationMethod]:
    """The methods named, configured and checked against the pair.

    Args:
        names: keys of `METHODS`.
        settings: for one method its settings; for several a dict of settings by method name.

    Raises:
        ValueError: unknown method or setting, or a pair that lacks what a method needs.
    """
    configs = method_configs(names, settings)
    return [METHODS[name](config, student, teacher) for name, config in zip(names, configs, strict=True)]


def method_configs(names: Sequence[str], settings: Mapping[str, Any] | None) -> list[Any]:
    """The configs of the methods named, by arguments as those of `build_methods`; needs no models.

    Raises:
        ValueError: unknown method or setting.
    """
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"`method` is {name!r}; known methods are none, {', '.join(METHODS)}.{hint}")
    settings = settings or {}
    if len(names) == 1:
        settings = {names[0]: settings}
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ValueError(
            f"`method_config` has settings for {unknown}, but the methods of this run are {list(names)}; "
            "with several methods it must be a dict by method name."
        )
    return [configure(METHODS[name].config_class, settings.get(name)) for name in names]


__all__ = [
    "ALIKE",
    "D3ETR",
    "DRKD",
    "LD",
    "METHODS",
    "QSKD",
    "CLDetr",
    "CLDetrConfig",
    "CLoCKDistill",
    "CLoCKDistillConfig",
    "Choice",
    "D3ETRConfig",
    "DETRDistill",
    "DETRDistillConfig",
    "DRKDConfig",
    "DistillationMethod",
    "Features",
    "FeaturesConfig",
    "KDDetr",
    "KDDetrConfig",
    "LDConfig",
    "LogitKD",
    "LogitKDConfig",
    "Paper",
    "ProposalKD",
    "ProposalsConfig",
    "QSKDConfig",
    "attends_densely",
    "build_methods",
    "choose",
    "configure",
    "method_configs",
    "settled",
    "with_choice",
]
