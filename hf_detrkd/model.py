"""The one module that is trained: the student and the methods' projectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .families import FamilyAdapter
from .families.checks import enough_places
from .losses.detection import task_loss
from .methods import DistillationMethod
from .view import DetrView

FP16_SCALES = (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0)
"""By the first of these without an overflow a loss is multiplied for its gradient's norm, as `torch.amp.GradScaler` begins with
65536: fp16 ends at 6e-8, where gradients of light terms would be 0."""


class DistillationModel(nn.Module):
    """Student and distillation methods, with all trainable work in one ``forward``.

    So DDP, clipping, autocast and checkpointing treat projectors as they treat the student. The teacher is no part of
    it: its view comes in as an argument. What the student has and this module has not (``config``, ...) is the student's.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it by the accumulation steps

    def __init__(
        self,
        student: PreTrainedModel,
        adapter: FamilyAdapter,
        methods: Sequence[DistillationMethod] = (),
        *,
        detection_weight: float = 1.0,
        layer_supervision: bool = True,
    ):
        super().__init__()
        self.student = student
        names = [method.name for method in methods]
        if len(set(names)) < len(names):
            raise ValueError(f"`methods` are {names}: each name may stand once, as terms are told apart by it.")
        self.methods = nn.ModuleDict(dict(zip(names, methods, strict=True)))
        self.adapter = adapter
        self.detection_weight = detection_weight
        self.layer_supervision = layer_supervision

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("student"), name)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        teacher_view: DetrView | None = None,
        kd_scale: float = 1.0,
        generator: torch.Generator | None = None,
        gradient_norms: bool = False,
    ) -> ModelOutput:
        """The student's own output in evaluation; in training the combined loss and its parts.

        Args:
            pixel_values: (B, 3, height, width) as the student's image processor makes them.
            pixel_mask: (B, height, width), 1 = real.
            labels: per image ``class_labels`` (N,) and ``boxes`` (N, 4).
            teacher_view: the teacher's view of the same images; None: no distillation.
            kd_scale: the schedule's factor of all distillation terms.
            generator: for the methods' random draws, alike on every process.
            gradient_norms: measure the gradient norm of every part (one backward pass each).

        Returns:
            in training ``loss``, ``detection_loss``, ``terms`` (unweighted, detached, by name; without those of weight 0)
            and, where asked for, ``gradient_norms`` (of the weighted parts, with respect to the student's parameters).
        """
        inputs = {"pixel_values": pixel_values, "labels": labels}
        if pixel_mask is not None:
            inputs["pixel_mask"] = pixel_mask
        if not self.training:
            with enough_places(self.student):
                return self.student(**inputs)
        if labels is None:
            raise ValueError("`labels` is missing: training needs the targets of every image, empty ones too.")

        with task_loss(self.adapter, per_layer=self.layer_supervision):
            attentions = teacher_view is not None and any("student" in m.attentions for m in self.methods.values())
            output, view = self.adapter.forward(inputs, attentions=attentions)
        parts = {"detection": self.detection_weight * output.loss}
        terms = {}
        if teacher_view is not None:
            targets = view_targets(labels, self.adapter.classes)
            for name, method in self.methods.items():
                prefix = f"{name}_" if len(self.methods) > 1 else ""
                for term, value in method(view, teacher_view, targets, generator).items():
                    weight = method.config.weights[term]
                    if weight:
                        terms[prefix + term] = value
                    parts[prefix + term] = kd_scale * weight * value  # also at weight 0: DDP wants every gradient

        result = ModelOutput(
            loss=sum(parts.values()),
            detection_loss=output.loss.detach(),
            terms={name: value.detach() for name, value in terms.items()},
        )
        if gradient_norms:
            result["gradient_norms"] = self._gradient_norms(parts)
        return result

    def _gradient_norms(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = [parameter for parameter in self.student.parameters() if parameter.requires_grad]

        def norm(loss: Tensor) -> Tensor:
            if not loss.requires_grad:  # a term that is switched off
                return loss.new_zeros(())
            for scale in FP16_SCALES if _in_fp16(loss.device.type) else (1.0,):
                gradients = torch.autograd.grad(scale * loss, parameters, retain_graph=True, allow_unused=True)
                norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
                total = torch.stack(norms).norm() / scale if norms else loss.new_zeros(())
                if total.isfinite():
                    break
            return total

        norms = {name: norm(part) for name, part in parts.items()}
        kd = [part for name, part in parts.items() if name != "detection"]
        norms["kd"] = norm(sum(kd)) if kd else parts["detection"].new_zeros(())
        return norms


def _in_fp16(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


def view_targets(labels: Sequence[Mapping[str, Tensor]], classes: tuple[int, ...] | None) -> list[dict[str, Tensor]]:
    """The targets as the views count classes; of objects of classes that the views leave out there is the place alone.

    Args:
        labels: per image ``class_labels`` (N,) and ``boxes`` (N, 4), classes as the student's head has them.
        classes: the student's class for every class of the views; None: the same.
    """
    targets = [{name: image[name] for name in ("class_labels", "boxes")} for image in labels]
    if classes is None:
        return targets
    kept = torch.tensor(classes, device=labels[0]["class_labels"].device)
    for target in targets:
        same = target["class_labels"][:, None] == kept
        shared = same.any(-1)
        target["other_boxes"] = target["boxes"][~shared]
        target["class_labels"], target["boxes"] = same.int().argmax(-1)[shared], target["boxes"][shared]
    return targets
