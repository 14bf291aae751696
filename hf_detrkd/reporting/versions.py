"""The versions a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

PACKAGES = ("hf_detrkd", "torch", "torchvision", "transformers", "accelerate", "datasets", "numpy", "pycocotools")


def versions() -> dict[str, str]:
    """What a result depends on besides the settings."""
    return {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}",
        **{name: version(name) for name in PACKAGES},
    }
