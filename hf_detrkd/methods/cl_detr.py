"""CL-DETR's distillation by pseudo labels (arXiv 2304.03110, CVPR 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..losses.boxes import inside_image, iou
from ..losses.set_prediction import set_loss
from ..matching import ground_truth_matches
from .base import DistillationMethod, Paper


@dataclass(frozen=True)
class CLDetrConfig:
    """Settings of `CLDetr`."""

    weights: dict[str, float] = field(default_factory=lambda: {"class": 2.0, "l1": 5.0, "giou": 2.0})
    """Deformable DETR's (its main.py), on which yaoyao-liu/CL-DETR is built. DETR's class weight is 1."""
    top_k: int = 10
    """Highest scores of the teacher, over queries x classes, that may become objects (yaoyao-liu/CL-DETR)."""
    max_overlap: float = 0.7
    """One with an IoU of this or more with any target is that target (from there too)."""
    min_score: float = 0.0
    """Least score; the source has none. Where the targets name all objects, or images hold fewer than `top_k`, what is
    left over is noise: .3 to .5 keeps what the teacher is sure of."""

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"`top_k` is {self.top_k}; it must be 1 or more.")
        for name in ("max_overlap", "min_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it is between 0 and 1.")


@torch.no_grad()
def pseudo_targets(
    scores: Tensor,
    boxes: Tensor,
    targets: Sequence[Mapping[str, Tensor]],
    *,
    top_k: int = 10,
    max_overlap: float = 0.7,
    min_score: float = 0.0,
) -> list[dict[str, Tensor]]:
    """The targets of every image, and after them the teacher's best predictions that are none of them.

    Args:
        scores: (B, Q, K) foreground probabilities.
        boxes: (B, Q, 4); the part inside the image counts.
        targets: per image ``class_labels`` (N,) and ``boxes`` (N, 4), and where there are any ``other_boxes`` (M, 4) of objects
            of classes that the teacher doesn't know.
        top_k: per image, predictions considered: pairs of a query and a class.
        max_overlap: those with an IoU of this or more with a target of any class are left out.
        min_score: those with a lower score are left out.
    """
    classes = scores.shape[-1]
    best, index = scores.float().flatten(1).topk(min(top_k, scores[0].numel()))
    inside = inside_image(boxes)
    extended = []
    for image, target in enumerate(targets):
        places, labels = inside[image, index[image] // classes], index[image] % classes
        kept = (best[image] >= min_score) & (places[:, 2:] > 0).all(-1)
        objects = torch.cat([target[name] for name in ("boxes", "other_boxes") if name in target])
        if len(objects):
            kept &= iou(places[:, None], objects[None]).amax(1) < max_overlap
        extended.append(
            {
                "class_labels": torch.cat([target["class_labels"], labels[kept].to(target["class_labels"])]),
                "boxes": torch.cat([target["boxes"], places[kept].to(target["boxes"])]),
            }
        )
    return extended


class CLDetr(DistillationMethod):
    """The teacher's best predictions join the targets, and the student learns them by DETR's ordinary set loss.

    Needs nothing but predictions, so it works between all families, and on images without labels (all targets empty),
    where it is training by pseudo labels. Made for teachers that know classes which the labels don't name.

    The task loss, which the total loss has beside these terms, calls every pseudo object background. With labels that
    don't name all objects, or none, give `detection_weight=0`: the terms hold the true targets too, of the classes that both
    models know, and are then the paper's whole loss. Classes that the teacher doesn't know the task loss alone teaches.

    **Terms**, summed over the student's layers, each matched on its own with ``targets + pseudo`` as the family trains:

    - ``class``: focal loss, or cross-entropy with no-object, of all queries (`set_loss`)
    - ``l1``: sum over pairs of ||b - b*||_1 / number of targets
    - ``giou``: sum over pairs of (1 - GIoU(b, b*)) / number of targets

    **Differs from the paper**: only its distillation; choosing exemplars and the two stages are a matter of data sets.
    The loss is over the decoder's layers: the query selection of two-stage families and denoising queries learn from
    the task loss alone, so with `detection_weight=0` they stay as they were.
    """

    name = "cl_detr"
    paper = Paper(
        title="Continual Detection Transformer for Incremental Object Detection",
        arxiv="2304.03110",
        bibtex="""@inproceedings{liu2023cldetr,
  title = {Continual Detection Transformer for Incremental Object Detection},
  author = {Liu, Yaoyao and Schiele, Bernt and Vedaldi, Andrea and Rupprecht, Christian},
  booktitle = {CVPR},
  year = {2023}
}""",
    )
    config_class = CLDetrConfig

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        self.quality = "quality_scores" in student.provides

    def forward(self, student, teacher, targets, generator):
        config = self.config
        settings = {"top_k": config.top_k, "max_overlap": config.max_overlap, "min_score": config.min_score}
        extended = pseudo_targets(teacher.class_probs()[-1], teacher.boxes[-1], targets, **settings)
        matches = ground_truth_matches(student, extended)
        layers = [
            set_loss(*layer, student.classification, match, extended, quality=self.quality)
            for *layer, match in zip(student.logits, student.boxes, matches, strict=True)
        ]
        return {name: sum(layer[name] for layer in layers) for name in config.weights}
