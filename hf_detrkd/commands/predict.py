"""Detect objects in an image, a folder or a video: drawn images, and one JSON with all detections.

    python scripts/predict.py --model_name_or_path runs/student --input photo.jpg --output_dir runs/predictions
    python scripts/predict.py --model_name_or_path runs/student --input folder/ --threshold 0.3 --batch_size 8
    python scripts/predict.py --model_name_or_path runs/student --input video.mp4 --every 5

A folder is searched with its subfolders, in the order of the names, but for hidden files and what this command wrote into
it; files that can't be read are left out and named at the end, with exit code 1. A video is read frame by frame (with
PyAV, or else OpenCV). predictions.json has ``images`` (id, file_name, width, height), ``categories`` (id, name) and ``annotations`` as
COCO's results: image_id, category_id, bbox (x, y, width, height in pixels), score, and the file's and class's names too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.collator import model_inputs
from ..data.images import header_of
from ..detectors import load_detector
from ..families.checks import enough_places
from ..reporting.boxes import draw_boxes
from .arguments import ModelArguments, parse
from .setup import build_image_processor, write_json

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"})
VIDEOS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})


@dataclass
class PredictArguments:
    """On what, and how."""

    input: str | None = field(default=None, metadata={"help": "An image, a folder of images, or a video."})
    output_dir: str = field(default="runs/predictions", metadata={"help": "Folder for the drawn images and the JSON."})
    threshold: float = field(default=0.5, metadata={"help": "Keep detections with at least this score."})
    batch_size: int = field(default=4, metadata={"help": "Images per forward pass."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, mps; by default the best there is."})
    draw: bool = field(default=True, metadata={"help": "Write the drawn images."})
    every: int = field(default=1, metadata={"help": "Of a video, only every so many-th frame."})


@dataclass(frozen=True)
class Picture:
    """One image, or one frame."""

    name: str
    """The file, relative to the folder; of a frame ``<video>/frame_000012.png``."""
    pixels: Tensor
    """(3, H, W) uint8."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``predictions.json``.

    Raises:
        SystemExit: with code 1, where files of the folder can't be read; the detections in the others are written.
    """
    model_arguments, arguments = parse((ModelArguments, PredictArguments), argv, __doc__)
    if model_arguments.model_name_or_path is None or arguments.input is None:
        raise ValueError("--model_name_or_path (the detector) and --input (image, folder or video) are needed.")
    model_arguments.refuse_building()
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold is {arguments.threshold}; a score is between 0 and 1.")
    if arguments.batch_size < 1 or arguments.every < 1:
        raise ValueError("--batch_size and --every must be 1 or more.")
    output, unreadable = Path(arguments.output_dir), []
    pictures = read_pictures(Path(arguments.input), arguments.every, output, unreadable)
    model = load_detector(model_arguments.model_name_or_path, **model_arguments.hub())
    processor = build_image_processor(model_arguments, model)
    model.to(arguments.device or best_device()).eval()
    results = predict(
        model,
        processor,
        pictures,
        threshold=arguments.threshold,
        batch_size=arguments.batch_size,
        output=output if arguments.draw else None,
    )
    results["info"] = {"model": model.name_or_path, "input": arguments.input, "threshold": arguments.threshold}
    write_json(results, output / "predictions.json")
    print(
        f"{len(results['annotations'])} detections in {len(results['images'])} images, written to {output}: "
        f"predictions.json{' and drawn images' if arguments.draw else ''}"
    )
    if unreadable:
        raise SystemExit("\n".join([f"{len(unreadable)} files can't be read and were left out:", *unreadable]))
    return results


def predict(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    pictures: Iterator[Picture],
    *,
    threshold: float,
    batch_size: int,
    output: Path | None = None,
) -> dict[str, Any]:
    """Detections of a stream of pictures, a batch at a time, as ``predictions.json`` has them; drawn into ``output``."""
    names = {int(index): name for index, name in model.config.id2label.items()}
    results: dict[str, Any] = {
        "images": [],
        "categories": [{"id": index, "name": name} for index, name in sorted(names.items())],
        "annotations": [],
    }
    while batch := list(islice(pictures, batch_size)):
        for picture, found in zip(batch, detections(model, processor, batch, threshold), strict=True):
            image_id = len(results["images"])
            height, width = picture.pixels.shape[1:]
            results["images"].append({"id": image_id, "file_name": picture.name, "width": width, "height": height})
            found = {name: value[found["scores"].argsort(descending=True)].tolist() for name, value in found.items()}
            for (x1, y1, x2, y2), score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
                results["annotations"].append(
                    {
                        "image_id": image_id,
                        "file_name": picture.name,
                        "category_id": label,
                        "category_name": names[label],
                        "bbox": [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)],
                        "score": round(score, 5),
                    }
                )
            if output is not None:
                best_last = {name: value[::-1] for name, value in found.items()}
                texts = [
                    f"{names[label]} {score:.2f}"
                    for label, score in zip(best_last["labels"], best_last["scores"], strict=True)
                ]
                boxes = torch.tensor(best_last["boxes"]).reshape(-1, 4)
                draw_boxes(picture.pixels, boxes, best_last["labels"], texts, _drawn(output, picture.name))
    return results


def detections(
    model: PreTrainedModel, processor: BaseImageProcessor, batch: Sequence[Picture], threshold: float
) -> list[dict[str, Tensor]]:
    """Per picture ``scores``, ``labels`` and ``boxes`` (x1, y1, x2, y2 in its pixels), on the CPU."""
    inputs = model_inputs(processor, [picture.pixels for picture in batch])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    sizes = torch.tensor([picture.pixels.shape[1:] for picture in batch], device=model.device)
    with torch.no_grad(), enough_places(model):
        output = model(**inputs)
    found = processor.post_process_object_detection(output, threshold=threshold, target_sizes=sizes)
    return [{name: value.cpu() for name, value in one.items()} for one in found]


def read_pictures(
    place: Path, every: int = 1, leave_out: Path | None = None, unreadable: list[str] | None = None
) -> Iterator[Picture]:
    """The pictures of a file or folder, one at a time; of a folder without hidden files.

    Args:
        every: of a video, only every so many-th frame.
        leave_out: an output folder, whose drawn pictures are no input where it lies in ``place`` or is it.
        unreadable: gets a line for each file of a folder that can't be read; None: it raises.

    Raises:
        FileNotFoundError: there is no such place, or no image in the folder.
        ValueError: a file that is neither image nor video, or a video that nothing installed can read.
    """
    if place.is_dir():
        made = None if leave_out is None else _made(leave_out.resolve(), place.resolve())
        files = sorted(
            path
            for path in place.rglob("*")
            if path.suffix.lower() in IMAGES
            and not any(part.startswith(".") for part in path.relative_to(place).parts)
            and not (made and path.resolve().is_relative_to(made))
        )
        if not files:
            raise FileNotFoundError(f"--input {place}: no image in the folder; known endings are {sorted(IMAGES)}.")
        return _read_all(files, place, unreadable)
    if not place.is_file():
        raise FileNotFoundError(f"--input {place}: there is no such file or folder.")
    if place.suffix.lower() in VIDEOS:
        read = _frames_reader(place)
        return (
            Picture(f"{place.stem}/frame_{index:06d}.png", frame)
            for index, frame in enumerate(read(place))
            if index % every == 0
        )
    return iter([_read(place, place.name)])


def best_device() -> str:
    """cuda or mps where there is one."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _made(output: Path, place: Path) -> Path | None:
    """Where in ``place`` the drawn pictures of an earlier call are; None: not there."""
    if output == place:
        return output / "drawn"
    return output if place in output.parents else None


def _read_all(files: Sequence[Path], place: Path, unreadable: list[str] | None) -> Iterator[Picture]:
    for path in files:
        try:
            yield _read(path, str(path.relative_to(place)))
        except ValueError as error:
            if unreadable is None:
                raise
            unreadable.append(str(error))


def _read(path: Path, name: str) -> Picture:
    """An image as viewers show it: upright, RGB."""
    try:
        with Image.open(path) as image:
            header = header_of(image)
            if header.is_deep:
                raise ValueError(
                    f"--input {path} has more than 8 bits a channel ({header.mode}), which RGB would cut off. Convert it to 8 bits, as "
                    "the images were that the detector has learned from."
                )
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"--input {path} is neither an image nor a video that can be read: {error}") from error
    return Picture(name, torch.from_numpy(pixels).permute(2, 0, 1))


def _frames_reader(place: Path):
    if find_spec("av") is not None:
        return _frames_of_av
    if find_spec("cv2") is not None:
        return _frames_of_opencv
    raise ValueError(
        f"--input {place} is a video, which needs PyAV (pip install av) or OpenCV (pip install opencv-python-headless), "
        f"and neither is installed. Or make a folder of frames: ffmpeg -i {place.name} frames/%06d.png"
    )


def _frames_of_av(place: Path) -> Iterator[Tensor]:
    import av

    with av.open(str(place)) as container:
        for frame in container.decode(video=0):
            # Counterclockwise, as viewers show it; PyAV has it since version 14
            turns = round(getattr(frame, "rotation", 0) / 90)
            pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            yield torch.from_numpy(pixels).permute(2, 0, 1)


def _frames_of_opencv(place: Path) -> Iterator[Tensor]:
    import cv2

    capture = cv2.VideoCapture(str(place))
    try:
        while (read := capture.read())[0]:
            yield torch.from_numpy(np.ascontiguousarray(read[1][:, :, ::-1])).permute(2, 0, 1)  # BGR
    finally:
        capture.release()


def _drawn(output: Path, name: str) -> Path:
    """In ``drawn/``, under the picture's own name with .png after it: photo.jpg and photo.png stay two files."""
    return output / "drawn" / (name if name.lower().endswith(".png") else f"{name}.png")


if __name__ == "__main__":
    main()
