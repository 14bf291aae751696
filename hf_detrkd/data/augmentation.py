"""Augmentation for detection: one random view of the image, then a flip, then its colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from .dataset import Target

FILL = [124.0, 116.0, 104.0]
"""The ImageNet mean in 8 bits: what lies outside the image is 0 after the usual normalisation."""

BRIGHTNESS = (0.875, 1.125)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = (-0.05, 0.05)
"""Ranges of the SSD paper's photometric distortion (Liu et al. 2016), the defaults of torchvision's
`RandomPhotometricDistort`."""


@dataclass(frozen=True)
class Augmentation:
    """Random flip, scale jitter, crop and photometric distortion; boxes, labels, areas and crowd flags stay in step.

    Scale jitter and crop choose the part of the image that is seen: it reaches beyond the image where the scale is
    below 1, and is smaller than the image where it is above 1 or cropped. Resized to the model's input that is the
    jitter of Ghiasi et al. (2021), without resizing twice. Built on `torchvision.transforms.v2.functional`.
    """

    flip: float = 0.5
    """Probability of a horizontal flip."""
    scale: tuple[float, float] = (0.8, 1.25)
    """Range of the scale jitter, drawn evenly in its logarithm; 0.8 to 1.25 is the standard jitter of Ghiasi et al.
    (2021)."""
    crop: float = 0.5
    """Probability of a crop, as in DETR (facebookresearch/detr, datasets/coco.py)."""
    crop_size: tuple[float, float] = (0.6, 1.0)
    """Range of the width and, separately, of the height a crop leaves; near DETR's 384-600 pixels of 400-600."""
    photometric: float = 0.5
    """Probability of each of the changes of brightness, contrast, saturation and hue; 0.5 in SSD."""
    size: tuple[int, int] | None = None
    """(height, width) the image is resized to before its colours change. Give the model's input size where the image
    processor resizes to a fixed size: the colours of a small image cost a fraction, and the processor finds nothing to
    resize. None keeps the pixels of the view."""
    min_visible: float = 0.1
    """Objects that keep less than this share of their box are dropped: the rest hardly shows what they are."""
    min_size: float = 1.0
    """Objects narrower or lower than this many pixels are dropped, as by torchvision's `SanitizeBoundingBoxes`."""

    def __post_init__(self):
        for name in ("flip", "crop", "photometric", "min_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but a share between 0 and 1 is needed.")
        for name, highest in (("scale", float("inf")), ("crop_size", 1.0)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                raise ValueError(f"`{name}` is {(low, high)}, but a range with 0 < low <= high <= {highest} is needed.")

    def __call__(self, image: Tensor, target: Target, rng: np.random.Generator) -> tuple[Tensor, Target]:
        """A new view of ``image`` (3, H, W) uint8 and the objects seen in it, in its pixels; every choice is drawn from
        ``rng``."""
        window = self._window(*image.shape[-2:], rng)
        image, target = self._view(image, target, window)
        if rng.random() < self.flip:
            image, target = horizontal_flip(image, target)
        return self._colours(image.contiguous(), rng), target

    def _window(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part that is seen. Inside the image where it is smaller, around it where
        larger."""
        scale = np.exp(rng.uniform(*np.log(self.scale)))
        shares = rng.uniform(*self.crop_size, size=2) if rng.random() < self.crop else np.ones(2)
        spans = np.maximum(1, np.rint(np.array([height, width]) * shares / scale)).astype(int)
        slack = np.array([height, width]) - spans
        top, left = rng.integers(np.minimum(slack, 0), np.maximum(slack, 0), endpoint=True)
        return int(top), int(left), int(spans[0]), int(spans[1])

    def _view(self, image: Tensor, target: Target, window: tuple[int, int, int, int]) -> tuple[Tensor, Target]:
        """The image and its objects seen through ``window``; drops the objects of which too little is left."""
        canvas = tuple(image.shape[-2:])
        top, left, height, width = window
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas)
        before = _areas(boxes)
        if window != (0, 0, *canvas):
            image = _crop(image, top, left, height, width)
            boxes = F.crop(boxes, top, left, height, width)
        visible = _areas(boxes) / before.clamp(min=1e-12)
        area = target["area"] * visible
        if self.size is not None and self.size != (height, width):
            image, boxes = F.resize(image, list(self.size), antialias=True), F.resize(boxes, list(self.size))
            area = area * (self.size[0] * self.size[1] / (height * width))
        boxes = boxes.as_subclass(Tensor)
        keep = (visible >= self.min_visible) & ((boxes[:, 2:] - boxes[:, :2]) >= self.min_size).all(1)
        target = {**target, "boxes": boxes, "area": area}
        return image, {key: value if key == "image_id" else value[keep] for key, value in target.items()}

    def _colours(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        draws, factors = rng.random(4), rng.uniform(*zip(BRIGHTNESS, CONTRAST, SATURATION, HUE, strict=True))
        changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for change, draw, factor in zip(changes, draws, factors, strict=True):
            if draw < self.photometric:
                image = change(image, float(factor))
        return image


def horizontal_flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Image and objects mirrored left to right."""
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=tuple(image.shape[-2:]))
    return F.horizontal_flip(image), {**target, "boxes": F.horizontal_flip(boxes).as_subclass(Tensor)}


def _crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """The window of the image, `FILL` where it reaches beyond."""
    rows, columns = image.shape[-2:]
    padding = [max(0, -left), max(0, -top), max(0, left + width - columns), max(0, top + height - rows)]
    image = F.crop(image, max(0, top), max(0, left), min(height, rows), min(width, columns))
    return F.pad(image, padding, fill=FILL) if any(padding) else image


def _areas(boxes: Tensor) -> Tensor:
    return ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).as_subclass(Tensor)
