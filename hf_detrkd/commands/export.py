"""Export a detector to ONNX, and check what was exported.

    python scripts/export.py --model_name_or_path runs/student --output_dir runs/onnx --dataset_name DATA
    python scripts/export.py --model_name_or_path runs/student --output_dir runs/onnx --postprocess true

The folder then has model.onnx, its signature (onnx.json), config, image processor and export.json. With --dataset_name both
models detect in the same images: their detections are compared as sets, and COCO AP is computed of each. The command ends
with code 1 where AP differs by more than --max_difference points, or more than 1 % of the detections have no partner.
Needs pip install hf_detrkd[export].
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..detectors import load_detector
from ..evaluation.agreement import measure, torch_detector
from ..evaluation.cost import environment
from ..export import OnnxDetector, export_onnx
from ..labels import LabelMap
from ..reporting.table import comparison_table
from .arguments import DataArguments, ModelArguments, parse
from .setup import build_image_processor, check_part, load_part, write_json

UNMATCHED = 0.01
"""Share of detections that may lack a partner: queries selected at nearly equal scores may be others."""


@dataclass
class CheckArguments(DataArguments):
    """In which images the two are compared."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Compare the two in the images of this data set; without one nothing is checked."},
    )


@dataclass
class ExportArguments:
    """What is exported, and how it is checked."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for the exported model."})
    batch_size: int = field(default=1, metadata={"help": "Images per call of the exported model."})
    dynamic_batch: bool = field(default=False, metadata={"help": "Any number of images per call."})
    postprocess: bool = field(
        default=False, metadata={"help": "Put scores, labels and boxes (x1 y1 x2 y2 in [0, 1]) into the graph."}
    )
    split: str = field(default="test", metadata={"help": "train, validation or test."})
    max_difference: float = field(default=0.1, metadata={"help": "AP points that the two may differ by."})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``export.json``.

    Raises:
        SystemExit: with code 1, where the exported model doesn't detect the same.
    """
    model_arguments, data_arguments, extra = parse((ModelArguments, CheckArguments, ExportArguments), argv, __doc__)
    if model_arguments.model_name_or_path is None or extra.output_dir is None:
        raise ValueError("--model_name_or_path and --output_dir are needed.")
    model_arguments.refuse_building()
    check_part(extra.split)
    model = load_detector(model_arguments.model_name_or_path, **model_arguments.hub())
    dataset = None
    if data_arguments.dataset_name is not None:  # before the export, which takes minutes: a wrong folder shows now
        dataset, split = load_part(
            extra.split, data_arguments, cache_dir=model_arguments.cache_dir, token=model_arguments.token
        )
        LabelMap.between(model.config.id2label, dataset.id2label)
    processor = build_image_processor(model_arguments, model)
    output = Path(extra.output_dir)
    path = export_onnx(
        model,
        processor,
        output,
        batch_size=extra.batch_size,
        dynamic_batch=extra.dynamic_batch,
        postprocess=extra.postprocess,
    )
    onnx = OnnxDetector(output)
    results: dict[str, Any] = {
        "model": model.name_or_path,
        "model_type": model.config.model_type,
        "MiB": round(path.stat().st_size / 2**20, 2),
        **onnx.signature,
        "environment": environment(),
    }
    print(f"written to {output}: model.onnx ({results['MiB']} MiB), onnx.json, config and image processor")
    if dataset is None:
        print("not compared with PyTorch: name images with --dataset_name")
    else:
        detectors = {"pytorch": torch_detector(model, onnx.processor), "onnx": onnx}
        metrics, difference = measure(detectors, model, onnx.processor, dataset, extra.batch_size)
        results |= {"dataset": data_arguments.dataset_name, "split": split, "images": len(dataset)}
        results |= {"metrics": metrics, "difference": asdict(difference)}
        problems = differences(metrics, asdict(difference), extra.max_difference)
        results["problems"] = problems
        print(f"\nCOCO AP on {split} ({len(dataset)} images), in points\n{comparison_table(metrics)}")
        print(
            f"\n{difference.detections} detections compared: {difference.unmatched} without a partner, largest difference "
            f"of scores {difference.score:.1e}, of corners {difference.box:.1e} of the image's side"
        )
    write_json(results, output / "export.json")
    if results.get("problems"):
        print("\nThe exported model doesn't detect the same: " + "; ".join(results["problems"]))
        sys.exit(1)
    return results


def differences(metrics: dict[str, dict[str, float]], difference: dict[str, Any], most: float) -> list[str]:
    """What is wrong with an exported model, in words."""
    problems = []
    points = 100 * (metrics["onnx"].get("map", 0.0) - metrics["pytorch"].get("map", 0.0))
    if abs(points) > most + 1e-6:
        problems.append(f"AP differs by {points:+.2f} points, more than {most:g}")
    if difference["unmatched"] > UNMATCHED * difference["detections"]:
        problems.append(f"{difference['unmatched']} of {difference['detections']} detections have no partner")
    return problems


if __name__ == "__main__":
    main()
