"""A tiny detection data set in memory, and the image processors that read it."""

from __future__ import annotations

import torch
import zoo
from torch.utils.data import Dataset
from transformers import RTDetrImageProcessor

from hf_detrkd.commands.setup import family_image_processor


class Scenes(Dataset):
    """Noise images with coloured boxes; image 0 has no object. Items as `DetectionDataset` gives them."""

    def __init__(self, number: int = 9, classes: int = zoo.CLASSES, seed: int = 0):
        self.number, self.classes, self.seed = number, classes, seed
        self.id2label = {i: f"class {i}" for i in range(classes)}

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        image = torch.randint(0, 80, (3, zoo.SIZE, zoo.SIZE), dtype=torch.uint8, generator=generator)
        objects = index % 3
        corner = torch.randint(0, zoo.SIZE // 2, (objects, 2), generator=generator)
        size = torch.randint(8, zoo.SIZE // 2, (objects, 2), generator=generator)
        labels = torch.randint(0, self.classes, (objects,), generator=generator)
        boxes = torch.cat([corner, corner + size], dim=1).float()
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            image[label % 3, y1:y2, x1:x2] = 150 + 20 * label
        return {
            "image": image,
            "target": {
                "boxes": boxes,
                "labels": labels,
                "area": size.prod(1).float(),
                "iscrowd": torch.zeros(objects, dtype=torch.int64),
                "image_id": torch.tensor([index]),
            },
        }


def processor(model=None):
    """The image processor of a model's family at the zoo's size; RT-DETR's without a model."""
    result = RTDetrImageProcessor() if model is None else family_image_processor(model)
    result.size = {"height": zoo.SIZE, "width": zoo.SIZE}
    return result
