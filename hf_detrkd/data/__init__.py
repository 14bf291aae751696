"""Detection data: every usual format in one schema, checked, augmented, batched; and the built-in set ``shapes``."""

from .augmentation import Augmentation
from .checks import check_dataset
from .collator import DetectionCollator, input_size
from .dataset import DetectionDataset
from .findings import DatasetError, Finding, Report
from .formats import FORMATS, load_detection_dataset, split_off_validation
from .schema import BOX_FORMATS, keep_classes

__all__ = [
    "BOX_FORMATS",
    "FORMATS",
    "Augmentation",
    "DatasetError",
    "DetectionCollator",
    "DetectionDataset",
    "Finding",
    "Report",
    "check_dataset",
    "input_size",
    "keep_classes",
    "load_detection_dataset",
    "split_off_validation",
]
