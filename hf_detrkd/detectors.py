"""Detectors as a run takes them: loaded, checked and told apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModelForObjectDetection, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

PLACE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")
"""Arguments of a model's `from_pretrained` that say where it is: those that the image processor beside it needs too."""


def load_detector(model: PreTrainedModel | str, **options) -> PreTrainedModel:
    """A detector from a local folder or a Hub id, in float32 whatever the file has; a model passes through.

    Raises:
        ValueError: where its weights are in half precision, in which transformers' detection losses and several decoders fail.
    """
    if isinstance(model, str):
        model = AutoModelForObjectDetection.from_pretrained(model, **{"dtype": torch.float32, **options})
    if model.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{model.name_or_path or type(model).__name__} has weights in {model.dtype}. Load it in float32 "
            "(from_pretrained(..., dtype=torch.float32)); bf16=True in the config then computes in bfloat16."
        )
    return model


def image_processor_beside(model: PreTrainedModel, **options) -> BaseImageProcessor:
    """The image processor where a model was loaded from.

    Args:
        options: of the model's `from_pretrained`, of which those in `PLACE` are taken.

    Raises:
        OSError: there is none, or it can't be read. For a model without ``name_or_path`` nothing is looked for.
    """
    if not model.name_or_path:
        raise OSError(f"This {type(model).__name__} has no `name_or_path`.")
    place = {name: options[name] for name in PLACE if name in options}
    try:
        return AutoImageProcessor.from_pretrained(model.name_or_path, **place)
    except (OSError, ValueError) as error:
        raise OSError(f"No image processor was loaded from {model.name_or_path} ({error}).") from error


def check_classes(student: PreTrainedModel, *datasets) -> None:
    """Refuses a data set whose class list is not the student's; data sets without ``id2label`` can't be checked."""
    for dataset in datasets:
        names = getattr(dataset, "id2label", None)
        if names is not None and dict(names) != dict(student.config.id2label):
            raise ValueError(
                f"The data set's classes {list(names.values())} are not the student's "
                f"{list(student.config.id2label.values())}. Build the student with id2label and label2id of the data set: "
                "from_pretrained(..., id2label=dataset.id2label, label2id=dataset.label2id, ignore_mismatched_sizes=True)."
            )


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and values of all tensors of a model."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if value.dim()
            else str(value.item()).encode()
        )
    return sha.hexdigest()
