"""What the loss is made of, from one log to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class LossParts:
    """The parts of every step's loss since the last log, on the device: no synchronisation per step."""

    def __init__(self):
        self._window: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, outputs: Mapping[str, Any], scale: float | None) -> None:
        """Keeps a step's parts.

        Args:
            outputs: of `DistillationModel` in training.
            scale: the schedule's factor of the distillation terms; None where there is no teacher.
        """
        self._window["detection_loss"].append(outputs["detection_loss"])
        if scale is None:
            return
        for name, value in outputs["terms"].items():
            self._window[f"kd_{name}"].append(value)
        self._window["kd_scale"].append(torch.tensor(scale, device=outputs["detection_loss"].device))
        norms = outputs.get("gradient_norms")
        if norms is not None:
            total = norms["detection"] + norms["kd"]
            for name, norm in norms.items():
                if name != "detection":
                    self._window[f"gradient_share_{name}"].append(norm / total.clamp(min=torch.finfo(total.dtype).tiny))

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over the steps and over all processes, which call this together; then nothing is kept.

        Returns:
            ``detection_loss`` and, with a teacher, ``kd_<term>``, ``kd_scale`` and, in steps that measured them,
            ``gradient_share_<term>`` and ``gradient_share_kd``.
        """
        if not self._window:
            return {}
        names = sorted(self._window)
        means = torch.stack([torch.stack(self._window[name]).float().mean() for name in names])
        means = accelerator.reduce(means, reduction="mean").tolist()
        self._window.clear()
        # Significant digits: a term with a millionth of the gradient has a share too
        return {name: float(f"{value:.6g}") for name, value in zip(names, means, strict=True)}
