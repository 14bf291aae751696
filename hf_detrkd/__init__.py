"""Knowledge distillation between DETR detectors from Hugging Face transformers."""

from .config import DistillationConfig
from .data import Augmentation, DetectionCollator, DetectionDataset, load_detection_dataset
from .families import FAMILIES, adapter_for
from .methods import METHODS, DistillationMethod
from .model import DistillationModel
from .trainer import DistillationTrainer
from .view import DetrView, Queries

__version__ = "0.1.0"

__all__ = [
    "FAMILIES",
    "METHODS",
    "Augmentation",
    "DetectionCollator",
    "DetectionDataset",
    "DetrView",
    "DistillationConfig",
    "DistillationMethod",
    "DistillationModel",
    "DistillationTrainer",
    "Queries",
    "adapter_for",
    "load_detection_dataset",
]
