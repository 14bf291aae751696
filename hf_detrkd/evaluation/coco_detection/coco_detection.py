"""COCO average precision of detected boxes, as an `evaluate.Metric`."""

# `evaluate.load` reads the imports of this file line by line: one module per line.
import datasets
import evaluate
import numpy as np

from .coco_evaluator import CocoEvaluator

_DESCRIPTION = """
COCO's average precision (AP) and average recall (AR) of detected boxes, as pycocotools computes them, with the names
that torchmetrics and the Hugging Face examples use.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one dict per image: `boxes` (x1, y1, x2, y2 in pixels), `scores`, `labels` (integers). What
        `image_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=...)` returns.
    references: one dict per image: `boxes` and `labels` likewise; optionally `iscrowd` (0 or 1; default 0) and
        `area` (pixels; default that of the box).
    class_names: names by label, a list or a dict such as `model.config.id2label`. Default: the numbers themselves.
    backend: "faster_coco_eval", "pycocotools", or "auto" (the first that is installed).

Returns:
    `map`, `map_50`, `map_75`, `map_small`, `map_medium`, `map_large`, `mar_1`, `mar_10`, `mar_100`: floats in [0, 1];
    `map_per_class`, `mar_100_per_class`: dicts by class name. NaN where there is nothing to find.

Examples:
    >>> metric = evaluate.load("hf_detrkd/evaluation/coco_detection")
    >>> metric.add_batch(
    ...     predictions=[{"boxes": [[10, 10, 50, 50]], "scores": [0.9], "labels": [0]}],
    ...     references=[{"boxes": [[10, 10, 50, 50]], "labels": [0]}],
    ... )
    >>> metric.compute(class_names=["cat"])["map"]
    1.0
"""

_CITATION = """
@inproceedings{lin2014microsoft,
  title = {Microsoft {COCO}: Common Objects in Context},
  author = {Lin, Tsung-Yi and Maire, Michael and Belongie, Serge and Hays, James and Perona, Pietro and Ramanan, Deva
            and Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
  booktitle = {ECCV},
  year = {2014},
}
"""

_BOXES = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
_NUMBERS = datasets.Sequence(datasets.Value("float64"))
_INTEGERS = datasets.Sequence(datasets.Value("int64"))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CocoDetection(evaluate.Metric):
    """COCO average precision of boxes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": {"boxes": _BOXES, "scores": _NUMBERS, "labels": _INTEGERS},
                    "references": {"boxes": _BOXES, "labels": _INTEGERS, "iscrowd": _INTEGERS, "area": _NUMBERS},
                }
            ),
            codebase_urls=["https://github.com/cocodataset/cocoapi"],
            reference_urls=["https://cocodataset.org/#detection-eval"],
        )

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one image."""
        super().add(prediction=_prediction(prediction), reference=_reference(reference), **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds the images of a batch; those of `predictions` and `references` in the same order."""
        if len(predictions) != len(references):
            raise ValueError(
                f"There are {len(predictions)} `predictions` and {len(references)} `references`; each image needs both."
            )
        super().add_batch(
            predictions=[_prediction(prediction) for prediction in predictions],
            references=[_reference(reference) for reference in references],
            **kwargs,
        )

    def _compute(self, predictions, references, class_names=None, backend="auto"):
        evaluator = CocoEvaluator(class_names, backend)
        for image_id, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            evaluator.add(image_id, prediction, reference)
        return evaluator.compute()


def _prediction(prediction):
    return {key: _values(prediction, key) for key in ("boxes", "scores", "labels")}


def _reference(reference):
    """The reference with its optional fields; a table of them has the same columns for every image."""
    filled = {key: _values(reference, key) for key in ("boxes", "labels")}
    optional = {key for key in ("iscrowd", "area") if reference.get(key) is not None}
    boxes = np.asarray(filled["boxes"], dtype=np.float64).reshape(-1, 4)
    filled["iscrowd"] = _values(reference, "iscrowd") if "iscrowd" in optional else [0] * len(boxes)
    filled["area"] = (
        _values(reference, "area") if "area" in optional else (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).tolist()
    )
    return filled


def _values(image, key):
    """Lists of plain numbers from lists, arrays and tensors."""
    if key not in image:
        raise ValueError(f"An image has no `{key}`, only {sorted(image)}.")
    return image[key].tolist() if hasattr(image[key], "tolist") else image[key]
