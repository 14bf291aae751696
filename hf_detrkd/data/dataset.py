"""The data set as the training loop reads it: decoded, augmented, the same for everybody who asks again."""

from __future__ import annotations

from collections.abc import Callable

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .images import read_pixels
from .schema import class_names_of

Target = dict[str, Tensor]
"""The objects of one image: ``boxes`` (N, 4) xyxy in pixels of the item's image, ``labels`` (N,), ``area`` (N,) in its
square pixels, ``iscrowd`` (N,) 0 or 1, and ``image_id`` (1,)."""

Transform = Callable[[Tensor, Target, np.random.Generator], tuple[Tensor, Target]]


class DetectionDataset(Dataset):
    """Items ``{"image": (3, H, W) uint8, "target": Target}`` of a split in the schema of `load_detection_dataset`.

    An item depends on (seed, epoch, index) alone: any number of workers, and a run resumed in mid-epoch, see the same
    pixels. The epoch lies in shared memory, so that `set_epoch` reaches persistent workers; call it before the
    loader's iterator is made. Without augmentation an item has the original pixels, boxes and areas.

    Args:
        split: one split; images are decoded in `__getitem__`, in the orientation its width and height declare.
        augmentation: called as ``augmentation(image, target, rng)`` with a NumPy generator of the item's own; None
            leaves items as they are.
        seed: of the augmentation.
    """

    def __init__(self, split: datasets.Dataset, augmentation: Transform | None = None, seed: int = 0):
        names = class_names_of(split)
        self.split = split.cast_column("image", datasets.Image(decode=False))
        self.augmentation = augmentation
        self.seed = seed
        self.id2label: dict[int, str] = dict(enumerate(names))
        self.label2id: dict[str, int] = {name: index for index, name in self.id2label.items()}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their ids."""
        return list(self.id2label.values())

    @property
    def epoch(self) -> int:
        """The epoch whose augmentation items have."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Have the augmentation of ``epoch``, in workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor | Target]:
        index = range(len(self))[index]
        row = self.split[index]
        image = read_pixels(row["image"], row["width"], row["height"])
        target = target_of(row)
        if self.augmentation is not None:
            rng = np.random.default_rng((self.seed, self.epoch, index))
            image, target = self.augmentation(image, target, rng)
        return {"image": image, "target": target}


def target_of(row: dict) -> Target:
    """The objects of one row as tensors, boxes as xyxy in pixels of the original image."""
    objects = row["objects"]
    boxes = torch.tensor(objects["bbox"], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "labels": torch.tensor(objects["category"], dtype=torch.int64),
        "area": torch.tensor(objects["area"], dtype=torch.float32),
        "iscrowd": torch.tensor(objects["iscrowd"], dtype=torch.int64),
        "image_id": torch.tensor([row["image_id"]], dtype=torch.int64),
    }
