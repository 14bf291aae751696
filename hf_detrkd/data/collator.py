"""Batches: the image processors' pixels and the labels the models take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from .dataset import Target

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

NOT_ABOUT_PIXELS = frozenset(
    {"image_processor_type", "processor_class", "_processor_class", "format", "do_convert_annotations", "data_format"}
)
"""Settings of image processors that leave the pixels as they are."""

PROBES = ((48, 64), (80, 24))
"""(height, width) of the images on which two processors are compared: landscape and tall."""


@dataclass(frozen=True)
class DetectionCollator:
    """A list of `DetectionDataset` items -> one batch.

    The batch has ``pixel_values`` (B, 3, H, W); ``pixel_mask`` (B, H, W) where the processor gives one; ``labels``, B
    dicts (`label_of`); and, only where the teacher's processor gives other pixels, ``teacher_pixel_values`` and
    ``teacher_pixel_mask``. The same augmented images go through both processors. Boxes are in [0, 1] of the unpadded
    image, so neither resizing nor padding touches them.
    """

    image_processor: BaseImageProcessor
    teacher_image_processor: BaseImageProcessor | None = None
    teacher_pixels_differ: bool = field(init=False)
    """Whether the teacher gets pixels of its own."""

    def __post_init__(self):
        teacher = self.teacher_image_processor
        differ = teacher is not None and not same_pixels(self.image_processor, teacher)
        object.__setattr__(self, "teacher_pixels_differ", differ)

    def __call__(self, items: Sequence[dict]) -> dict:
        images = [item["image"] for item in items]
        batch = model_inputs(self.image_processor, images)
        if self.teacher_pixels_differ:
            pixels = model_inputs(self.teacher_image_processor, images)
            batch |= {f"teacher_{name}": value for name, value in pixels.items()}
        return {**batch, "labels": [label_of(item["target"], *item["image"].shape[-2:]) for item in items]}


def student_and_teacher_inputs(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a batch goes into the student, ``labels`` too, and what into the teacher: its own pixels, else the student's."""
    student = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    teacher = {name.removeprefix("teacher_"): batch[name] for name in batch.keys() - student.keys()}
    return student, teacher or {name: value for name, value in student.items() if name != "labels"}


def label_of(target: Target, height: int, width: int) -> dict[str, Tensor]:
    """One image's objects as transformers' detection losses take them, and its crowds beside them.

    Returns:
        ``class_labels`` (N,) int64; ``boxes`` (N, 4) cxcywh in [0, 1]; ``area`` (N,) square pixels of the image before
        the processor; ``orig_size`` (2,) its (height, width); ``image_id`` (1,); and ``crowd_boxes`` (C, 4),
        ``crowd_labels`` (C,), ``crowd_area`` (C,) in the same units. Crowds are regions, not objects: never among the
        training targets.
    """
    unit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / unit
    crowd = target["iscrowd"].bool()
    return {
        "class_labels": target["labels"][~crowd],
        "boxes": boxes[~crowd],
        "area": target["area"][~crowd],
        "orig_size": torch.tensor([height, width], dtype=torch.int64),
        "image_id": target["image_id"],
        "crowd_boxes": boxes[crowd],
        "crowd_labels": target["labels"][crowd],
        "crowd_area": target["area"][crowd],
    }


def same_pixels(one: BaseImageProcessor, other: BaseImageProcessor) -> bool:
    """Whether two processors make the same model inputs: no setting about pixels differs, and two images of different
    shape come out equal, masks included."""
    settings = [
        {key: value for key, value in processor.to_dict().items() if key not in NOT_ABOUT_PIXELS}
        for processor in (one, other)
    ]
    shared = settings[0].keys() & settings[1].keys()
    if any(settings[0][key] != settings[1][key] for key in shared):
        return False
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in PROBES]
    pixels = [model_inputs(processor, images) for processor in (one, other)]
    return pixels[0].keys() == pixels[1].keys() and all(
        torch.equal(pixels[0][key], pixels[1][key]) for key in pixels[0]
    )


def input_size(*processors: BaseImageProcessor | None) -> tuple[int, int] | None:
    """(height, width) every image is resized to, the largest over the processors; None where one of them keeps the
    aspect ratio or doesn't resize. What `Augmentation.size` wants; processors that are None don't count."""
    sizes = []
    for processor in filter(None, processors):
        size = dict(processor.size or {})
        if not (processor.do_resize and size.get("height") and size.get("width")):
            return None
        sizes.append((size["height"], size["width"]))
    return tuple(map(max, zip(*sizes, strict=True))) if sizes else None


def model_inputs(processor: BaseImageProcessor, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """What goes into a model of images (3, H, W): ``pixel_values``, and ``pixel_mask`` where the processor makes one."""
    encoded = processor(images=images, return_tensors="pt")
    return {name: encoded[name] for name in ("pixel_values", "pixel_mask") if name in encoded}
