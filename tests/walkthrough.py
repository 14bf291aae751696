"""From a folder of images to a published, exported and compared student, as a new user does it, in six commands.

    python tests/walkthrough.py                      # the built-in data set, written as a COCO folder
    python tests/walkthrough.py --data ../shared/data/bccd --model MODEL.json --backbone_weights WEIGHTS.safetensors

Runs them one after the other in an empty folder, against a Hub on loopback (hub_server.py), and writes docs/walkthrough.md: each
command, what it printed last and how long it took. The `hf-detrkd` that runs is the one beside this Python, so an installed
wheel where there is one. Ends with the code of the first command that fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hub_server

ROOT = Path(__file__).resolve().parents[1]
START, STUDENT = "lab/detector", f"{hub_server.USER}/student"
"""On the Hub: what the teacher starts from, and what is published."""
BUILT_IN = (
    "shapes:train=400,validation=80,test=80,size=96,min_objects=2,max_objects=6,min_extent=0.2,max_extent=0.4,colour=1"
)
SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""Of a data set, and as COCO's files call them."""

QUICK_START = """
import re, sys
from huggingface_hub import ModelCard
exec(re.search("```python\\n(.*?)```", ModelCard.load(sys.argv[1]).text, re.DOTALL)[1])
"""
"""Runs the example on the card of a published model, in a folder with an image.jpg."""


@dataclass(frozen=True)
class Step:
    """One command of the walk."""

    title: str
    command: str
    lines: int
    """So many of the last lines it prints are shown."""
    printed: str = ""
    seconds: float = 0.0
    load: float = 0.0
    """Of the machine, over the minute before the end: above 1 for each core it does other work too."""


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder that hf_detrkd reads; default: the built-in set as a COCO folder")
    models = ROOT / "scripts" / "recipes" / "models"
    parser.add_argument(
        "--model",
        default=(models / "rt_detr_tiny_teacher.json").relative_to(ROOT).as_posix(),
        help="config of the detector on the Hub that the teacher starts from",
    )
    parser.add_argument("--backbone_weights", help="safetensors file for its backbone; default: random")
    parser.add_argument("--image_size", type=int, default=96, help="what its image processor resizes to, square")
    parser.add_argument(
        "--normalize", action="store_true", help="its image processor normalises, as ImageNet's weights want it"
    )
    parser.add_argument("--teacher_epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5, help="of student and twin")
    parser.add_argument("--learning_rate", default="6e-4")
    parser.add_argument("--folder", type=Path, help="empty folder to walk in; default: a temporary one")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "walkthrough.md", help="the page")
    return parser.parse_args(words)


def steps(arguments: argparse.Namespace) -> list[Step]:
    """What a new user types."""
    data = f"--dataset_name {name_of(arguments.data)}"
    train = f"--learning_rate {arguments.learning_rate} --warmup_steps 50 --report_to none"
    return [
        Step(
            "Look at the data before training on it",
            f"hf-detrkd inspect-data {data} --output_dir runs/data",
            30,
        ),
        Step(
            "A teacher: a detector from the Hub, fine-tuned",
            f"hf-detrkd finetune --model_name_or_path {START} {data} --output_dir runs/teacher "
            f"--num_train_epochs {arguments.teacher_epochs} {train}",
            10,
        ),
        Step(
            "The student, its twin, and the student on the Hub",
            f"hf-detrkd distill --teacher_model_name_or_path runs/teacher --student_decoder_layers 2 {data} "
            f"--output_dir runs/student --method auto --with_twin true --num_train_epochs {arguments.epochs} {train} "
            f"--push_to_hub true --hub_model_id {STUDENT}",
            12,
        ),
        Step(
            "ONNX, checked against PyTorch",
            f"hf-detrkd export --model_name_or_path runs/student --output_dir runs/onnx {data} --postprocess true",
            12,
        ),
        Step(
            "How fast it is beside its teacher",
            "hf-detrkd benchmark latency --model_name_or_path runs/student --teacher_model_name_or_path runs/teacher "
            "--batch_sizes 1 --backends torch onnx --output runs/latency.json",
            14,
        ),
        Step(
            "What the teacher gained the student, and in which images",
            "hf-detrkd compare-models --run runs/student --output_dir runs/comparison",
            40,
        ),
    ]


def name_of(data: str | None) -> str:
    """The data's folder as the user has it."""
    return "shapes_coco" if data is None else Path(data).resolve().name


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    arguments = read_arguments(words)
    with tempfile.TemporaryDirectory() as temporary, hub_server.HubServer() as hub:
        folder = arguments.folder or Path(temporary) / "walk"
        folder.mkdir(parents=True)
        prepare(arguments, folder, hub)
        environment = surroundings(folder, hub)
        walked = []
        for step in steps(arguments):
            print(f"$ {step.command}", flush=True)
            start = time.perf_counter()
            done = subprocess.run(
                shlex.split(step.command), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
            )
            lines = done.stdout.rstrip().splitlines()[-step.lines :]
            print("\n".join(lines), flush=True)
            if done.returncode:
                return done.returncode
            seconds, load = time.perf_counter() - start, os.getloadavg()[0]
            walked.append(replace(step, printed="\n".join(lines), seconds=seconds, load=load))
        example = subprocess.run(
            [sys.executable, "-c", QUICK_START, STUDENT],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        page = render(
            words, arguments, walked, folder, sorted(hub.repositories["models", STUDENT].files), example.stdout
        )
    arguments.output.write_text(page, encoding="utf-8")
    print(f"written to {arguments.output}")
    return 0


# ------------------------------------------------------------------------------------------------------- what is there


def prepare(arguments: argparse.Namespace, folder: Path, hub: hub_server.HubServer) -> None:
    """What a user has before the first command: the data, some images, and a detector on the Hub to start from."""
    from hf_detrkd import load_detection_dataset

    place = folder / name_of(arguments.data)
    if arguments.data is None:
        write_coco(place)
    else:
        place.symlink_to(Path(arguments.data).resolve())
    (folder / "images").mkdir()
    splits = load_detection_dataset(str(place))
    held_out = splits["test" if "test" in splits else "validation"]
    for index in range(min(4, len(held_out))):
        held_out[index]["image"].convert("RGB").save(folder / "images" / f"{index}.jpg")
    (folder / "image.jpg").write_bytes((folder / "images" / "0.jpg").read_bytes())
    with tempfile.TemporaryDirectory() as temporary:
        save_start(arguments, Path(temporary))
        hub.add(START, files={path.name: path.read_bytes() for path in Path(temporary).iterdir()})


def write_coco(folder: Path) -> None:
    """The built-in set as a COCO folder."""
    from hf_detrkd import load_detection_dataset

    (folder / "annotations").mkdir(parents=True)
    for name, split in load_detection_dataset(BUILT_IN, cache_dir=str(folder.parent / "cache")).items():
        short = SPLITS[name]
        (folder / "images" / short).mkdir(parents=True)
        classes = split.features["objects"]["category"].feature.names
        images, annotations = [], []
        for row in split:
            file, image = f"{row['image_id']:06d}.jpg", row["image"].convert("RGB")
            image.save(folder / "images" / short / file, quality=95)
            images.append({"id": row["image_id"], "file_name": file, "width": image.width, "height": image.height})
            objects = row["objects"]
            for values in zip(*(objects[key] for key in ("bbox", "category", "area", "iscrowd")), strict=True):
                annotation = dict(zip(("bbox", "category_id", "area", "iscrowd"), values, strict=True))
                annotations.append({**annotation, "id": len(annotations) + 1, "image_id": row["image_id"]})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": number, "name": one} for number, one in enumerate(classes)]
        (folder / "annotations" / f"instances_{short}.json").write_text(json.dumps(content))


def save_start(arguments: argparse.Namespace, folder: Path) -> None:
    """The detector that the teacher starts from, with its image processor."""
    from transformers import AutoConfig, AutoModelForObjectDetection, set_seed

    from hf_detrkd.backbones import load_backbone_weights
    from hf_detrkd.commands.setup import family_image_processor

    set_seed(0)
    model = AutoModelForObjectDetection.from_config(AutoConfig.from_pretrained(arguments.model))
    if arguments.backbone_weights:
        load_backbone_weights(model, arguments.backbone_weights)
    processor = family_image_processor(model)
    processor.size = {"height": arguments.image_size, "width": arguments.image_size}
    processor.do_normalize = arguments.normalize
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def surroundings(folder: Path, hub: hub_server.HubServer) -> dict[str, str]:
    """The environment of the commands: nothing of the repository, a Hub of their own and its token."""
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub_server.WRITE_TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    ours |= {
        "HF_HOME": str(folder / "cache"),
        "HF_DETRKD_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    ours |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ours


# --------------------------------------------------------------------------------------------------------------- the page


def render(
    words: Sequence[str],
    arguments: argparse.Namespace,
    walked: Sequence[Step],
    folder: Path,
    published: Sequence[str],
    example: str,
) -> str:
    """The page."""
    import hf_detrkd
    from hf_detrkd.evaluation.cost import environment

    machine = environment()
    installed = "site-packages" in Path(hf_detrkd.__file__).parts
    start = "with an ImageNet backbone" if arguments.backbone_weights else "with random weights"
    parts = [
        "# From images to a published student",
        f"<!-- {shlex.join(['python', 'tests/walkthrough.py', *words])} -->",
        "Six commands, run one after the other and written down by `python tests/walkthrough.py`: what is shown is what they printed "
        f"last. They began in a folder with the data, `{name_of(arguments.data)}/`, and four images, `images/`, with hf_detrkd "
        f"{hf_detrkd.__version__} {'installed from its wheel' if installed else 'of a checkout'}. The Hub is a server on this "
        f"machine that speaks the Hub's protocol; `{START}` is on it, `{arguments.model}` {start}. Data, models and schedules are "
        "small, so that everything ends within minutes: the commands are those of a real run, the accuracies are not.",
        f"{machine['device']}, {machine['threads']} threads of {machine['cores']} cores; {machine['system']}, torch "
        f"{machine['torch']}, transformers {machine['transformers']}. {sum(step.seconds for step in walked) / 60:.0f} minutes "
        "in all; the load says how much else the machine did.",
    ]
    for number, step in enumerate(walked, start=1):
        parts += [
            f"## {number}. {step.title}",
            fenced(wrapped(step.command), "bash"),
            fenced(step.printed, "text"),
            f"{step.seconds:.0f} s, load {step.load:.1f}.",
        ]
    parts += [
        "## What there is now",
        f"On the Hub, in `{STUDENT}`: {', '.join(f'`{name}`' for name in published)}. The example of its card, run as it stands there:",
        fenced(example.strip() or "(no detection above the example's threshold)", "text"),
        "In `runs/`:",
        fenced("\n".join(written(folder / "runs")), "text"),
    ]
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def wrapped(command: str, width: int = 110) -> str:
    """A command on several lines, broken before flags."""
    lines = [""]
    for part in command.split(" --"):
        word = part if not lines[0] else f"--{part}"
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(f"    {word}")
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return " \\\n".join(lines)


def written(folder: Path) -> list[str]:
    """Files below a folder and their sizes, but for what only a resume or Trainer itself reads."""
    internal = ("checkpoint-*/*", "distillation_state.pt", "training_args.bin", "trainer_state.json")
    return [
        f"{path.relative_to(folder).as_posix():<50} {path.stat().st_size / 1000:>9.1f} kB"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(path.match(pattern) for pattern in internal)
    ]


if __name__ == "__main__":
    sys.exit(main())
