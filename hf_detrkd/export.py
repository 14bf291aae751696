"""Detectors as ONNX: exported, and called again through onnxruntime. evaluation/agreement.py compares them with PyTorch."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .data.collator import input_size
from .evaluation.agreement import Detections
from .families import adapter_for
from .view import Classification

RAW, POSTPROCESSED = ("logits", "pred_boxes"), ("scores", "labels", "boxes")
"""Outputs of the graph: as the model gives them; or detections, boxes as x1, y1, x2, y2 in [0, 1] of the image."""

MODEL, SIGNATURE = "model.onnx", "onnx.json"
OPSET = 18
"""The first that torch's exporter writes without converting; it has GridSample, which deformable attention needs."""


class _Graph(nn.Module):
    """What is exported: pixels in, tensors out."""

    def __init__(self, model: PreTrainedModel, postprocess: Classification | None, limit: int):
        super().__init__()
        self.model, self.postprocess, self.limit = model, postprocess, limit

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = self.model(pixel_values=pixel_values)
        if self.postprocess is None:
            return output.logits, output.pred_boxes
        return select(output.logits, output.pred_boxes, self.postprocess, self.limit)


def select(logits: Tensor, boxes: Tensor, classification: Classification, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, n) scores and labels and (B, n, 4) boxes x1, y1, x2, y2, as the image processors choose them.

    Softmax heads: each query's best class. Sigmoid heads: the ``limit`` best pairs of query and class.
    """
    boxes = box_convert(boxes, "cxcywh", "xyxy")
    if classification == "softmax":
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        return scores, labels, boxes
    classes = logits.shape[-1]
    scores, index = logits.sigmoid().flatten(1).topk(min(limit, logits.shape[1] * classes), dim=1)
    return scores, index % classes, boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))


def export_onnx(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    folder: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    postprocess: bool = False,
) -> Path:
    """Writes ``model.onnx``, its signature, config and image processor into a folder, which `OnnxDetector` reads.

    The graph takes images of one size without padding, as ``pixel_values``; the processor is set to make them.

    Args:
        model: any detector that hf_detrkd knows.
        processor: its image processor.
        folder: made where there is none.
        image_size: (height, width) of the input; None: what the processor resizes to.
        batch_size: images per call.
        dynamic_batch: any number of images per call; not every family can be exported so.
        postprocess: with the image processor's post-processing in the graph.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing.
        ValueError: no input size is given, and the processor doesn't say one.
        RuntimeError: the family can't be exported; the message says what torch said.
    """
    needed("onnx", "onnxscript")
    processor, size = fixed_size(processor, image_size)
    adapter = adapter_for(model)
    graph = copy.deepcopy(model).cpu().float().eval()
    limit = _limit(processor, adapter.num_queries)
    outputs = POSTPROCESSED if postprocess else RAW
    wrapped = _Graph(graph, adapter.classification if postprocess else None, limit).eval()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    example = torch.rand(max(2, batch_size) if dynamic_batch else batch_size, 3, *size)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                wrapped,
                (example,),
                input_names=["pixel_values"],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None,
                verbose=False,
            )
    except Exception as error:  # torch's exporter raises its own and whatever the traced code raises
        first = str(error).strip().splitlines()
        how = ", with any number of images per call" if dynamic_batch else ""
        raise RuntimeError(
            f"{model.config.model_type} could not be exported to ONNX{how}, by torch {torch.__version__}: "
            f"{type(error).__name__}: {first[0] if first else ''}."
            + (" Try without --dynamic_batch." if dynamic_batch else "")
        ) from error
    program.save(str(folder / MODEL), external_data=False)
    signature = {
        "outputs": list(outputs),
        "image_size": list(size),
        "batch_size": None if dynamic_batch else batch_size,
        "classification": adapter.classification,
        "opset": OPSET,
        "torch": torch.__version__,
    }
    (folder / SIGNATURE).write_text(json.dumps(signature, indent=2) + "\n", encoding="utf-8")
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder / MODEL


class OnnxDetector:
    """An exported detector, run by onnxruntime: ``detector(pixel_values, sizes)`` gives detections.

    Args:
        folder: what `export_onnx` wrote.
        providers: onnxruntime's, by default those it has, a GPU's first.
        threads: of the CPU; None: as many as torch uses.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None, threads: int | None = None):
        needed("onnxruntime")
        import onnxruntime

        self.folder = Path(folder)
        signature = self.folder / SIGNATURE
        if not signature.is_file():
            raise FileNotFoundError(f"{signature} is missing: {folder} is no folder that export.py wrote.")
        self.signature = json.loads(signature.read_text(encoding="utf-8"))
        self.config = AutoConfig.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # its warnings are about its own optimisations
        self.session = onnxruntime.InferenceSession(
            str(self.folder / MODEL), options, providers=list(providers or onnxruntime.get_available_providers())
        )

    def run(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        """The graph alone."""
        return self.session.run(None, {"pixel_values": pixel_values})

    def __call__(self, pixel_values: Tensor, sizes: Tensor) -> list[Detections]:
        """Of any number of images, in calls of as many as the graph takes; the last call is filled up."""
        batch_size = self.signature["batch_size"] or len(pixel_values)
        calls = []
        for images in pixel_values.split(batch_size):
            filler = images[-1:].expand(batch_size - len(images), -1, -1, -1)
            calls.append([value[: len(images)] for value in self.run(torch.cat([images, filler]).numpy())])
        outputs = [torch.from_numpy(np.concatenate(values)) for values in zip(*calls, strict=True)]
        if tuple(self.signature["outputs"]) == RAW:
            output = SimpleNamespace(**dict(zip(RAW, outputs, strict=True)))
            return self.processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
        scores, labels, boxes = outputs
        boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]
        return [
            {"scores": one, "labels": label, "boxes": box}
            for one, label, box in zip(scores, labels, boxes, strict=True)
        ]


def fixed_size(
    processor: BaseImageProcessor, image_size: tuple[int, int] | None = None
) -> tuple[BaseImageProcessor, tuple[int, int]]:
    """A copy of a processor that resizes every image to one (height, width), and that size."""
    size = image_size or input_size(processor)
    if size is None:
        raise ValueError(
            f"The image processor keeps the aspect ratio (its size is {dict(processor.size or {})}), but a graph has an "
            "input of one size. Pass --image_size, and distil or fine-tune at that size too: the AP of other sizes and "
            "ratios than those of the training is lower."
        )
    processor = copy.deepcopy(processor)
    processor.do_resize, processor.size = True, {"height": size[0], "width": size[1]}
    return processor, (int(size[0]), int(size[1]))


def needed(*packages: str) -> None:
    """Refuses to go on without packages of the extra ``export``."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install hf_detrkd[export]"
        )


def _limit(processor: BaseImageProcessor, queries: int) -> int:
    """How many detections the processor's own post-processing keeps: some have ``top_k``, others as many as queries."""
    parameter = inspect.signature(processor.post_process_object_detection).parameters.get("top_k")
    return queries if parameter is None or parameter.default is parameter.empty else int(parameter.default)
