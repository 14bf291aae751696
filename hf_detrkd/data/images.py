"""Reading images: sizes and orientation from the header alone, pixels in the orientation the boxes are in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

QUARTER_TURNS = frozenset({5, 6, 7, 8})
"""EXIF orientations that exchange width and height (EXIF 2.32, tag 0x0112)."""

DEEP_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "F"})
"""PIL modes with more than 8 bits a channel: ``convert("RGB")`` clips them at 255."""

DEEP_COLOUR = re.compile(r"\w+;16[BLN]\b")
"""Raw modes of 16 bits a channel end in the byte order. PIL opens colour of them as RGB and keeps the high byte;
``BGR;16`` has 16 bits a pixel."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says about itself before any pixel is decoded."""

    width: int
    """Width of the stored pixels, before any rotation."""
    height: int
    mode: str
    """PIL mode: ``RGB``, ``L``, ``P``, ``RGBA``, ...; for colour with more than 8 bits a channel the raw mode, as
    ``RGB;16B``."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 is upright and the value where there is none."""

    @property
    def is_deep(self) -> bool:
        """Whether a channel has more than 8 bits, which a conversion to RGB would clip or cut off."""
        return self.mode in DEEP_MODES or DEEP_COLOUR.search(self.mode) is not None

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as viewers show it, after the EXIF rotation."""
        return (self.height, self.width) if self.orientation in QUARTER_TURNS else (self.width, self.height)

    def is_turned(self, width: int, height: int) -> bool:
        """Whether the EXIF rotation is to be applied for boxes given in an image of ``width`` by ``height``.

        The declared size decides. Where both orientations have it (half turns, mirrored and square images), the image
        is turned upright, which is how `datasets`, browsers and labelling tools show it.
        """
        return self.orientation != 1 and self.upright == (width, height)


def open_image(source: Mapping | str) -> Image.Image:
    """The image, not yet decoded. ``source``: a path, or ``{"path", "bytes"}`` as `datasets.Image(decode=False)`
    gives. Raises `OSError` where it is missing, no image, or has more pixels than PIL opens."""
    if isinstance(source, str):
        file = source
    else:
        file = BytesIO(source["bytes"]) if source.get("bytes") is not None else source["path"]
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:  # no OSError, and it doesn't name the file
        raise OSError(
            f"{name_of(source)}: {error} If it is a picture, scale it down or cut it up, and its boxes with it."
        ) from error


def name_of(source: Mapping | str) -> str:
    """What to call the image in a message."""
    if isinstance(source, str):
        return source
    return source.get("path") or "embedded image"


def header_of(image: Image.Image) -> ImageHeader:
    """The header of an opened image. For a PNG, whose `getexif` would decode the whole image, only what stands before
    the pixels counts."""
    # the decoder's settings for the first piece of the file: its raw mode, or a tuple that has it
    deep = DEEP_COLOUR.search(str(image.tile[0][-1])) if image.tile else None
    mode = deep.group() if deep else image.mode
    if image.format == "PNG" and "exif" not in image.info:
        orientation = 1
    else:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.format == "TIFF":  # PIL turns it while it decodes, and newer ones (11.3) say the size after that
        stored = ImageHeader(
            *(image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)), mode, orientation
        )
        return ImageHeader(*stored.upright, mode, 1)
    return ImageHeader(*image.size, mode, orientation if orientation in range(1, 9) else 1)


def read_header(source: Mapping | str) -> ImageHeader:
    """The header of an image file. Raises `OSError` where `open_image` does."""
    with open_image(source) as image:
        return header_of(image)


def read_pixels(source: Mapping | str, width: int, height: int) -> Tensor:
    """(3, H, W) uint8 RGB pixels in the orientation whose size is ``width`` by ``height``.

    The memory is channels-last, as decoded: torchvision resizes that fastest. Raises `ValueError`, naming the file, for
    a missing, truncated or broken image.
    """
    try:
        with open_image(source) as image:
            turned = header_of(image).is_turned(width, height)
            image = ImageOps.exif_transpose(image) if turned else image
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(
            f"{name_of(source)} can't be decoded ({error}). Replace the file or take its row out of the data set."
        ) from error


def is_truncated(source: Mapping | str) -> bool:
    """Whether pixels are missing at the end of the file.

    JPEG and PNG end in a marker; a file that has it is whole, and only one without it is decoded to find out.
    """
    with open_image(source) as image:
        if image.format in _END_MARKERS:
            image.fp.seek(0, 2)
            size = image.fp.tell()
            image.fp.seek(max(0, size - 64))
            if _END_MARKERS[image.format] in image.fp.read():
                return False
            image.fp.seek(0)
    try:
        with open_image(source) as image:
            image.load()
    except (OSError, SyntaxError):
        return True
    return False


_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
