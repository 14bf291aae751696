"""The flags of the commands, and their reading from ``--config recipe.yaml`` with flags on top."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


@dataclass
class ModelArguments:
    """Which detector is trained or evaluated."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from (the student): a local folder or a Hub id."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Instead of a checkpoint: a config.json (or its folder or Hub id), weights random."},
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, where it is not beside the model: a folder or a Hub id."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Resize images to this many pixels square; by default what the processor says."}
    )
    do_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Normalise pixels with the processor's mean and standard deviation; by default what it says."
        },
    )
    backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Weights for the backbone, used with `config_name`: a safetensors file under the backbone's own names, "
            "or the folder or Hub id of a detector with the same backbone."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    token: str | None = field(default=None, metadata={"help": "Hub token; by default the one you logged in with."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow model code from the Hub."})

    def refuse_building(self) -> None:
        """Refuses the flags that build a detector, in commands that take a trained one and would ignore them.

        Raises:
            ValueError: naming these flags.
        """
        given = [f"--{name}" for name in ("config_name", "backbone_weights") if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{' and '.join(given)} would be ignored: this command takes a trained detector as it is, by "
                "--model_name_or_path."
            )

    def hub(self) -> dict[str, str | bool | None]:
        """What every ``from_pretrained`` of this detector is given."""
        return {
            "cache_dir": self.cache_dir,
            "token": self.token,
            "revision": self.model_revision,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class StudentArguments:
    """A student made from the teacher (`make_student`): what is other than in the teacher."""

    student_backbone: str | None = field(
        default=None,
        metadata={
            "help": "Make the student from the teacher, with this backbone: a timm model (resnet18), a preset "
            "(resnet18vd), or a folder or Hub id of a transformers backbone or detector."
        },
    )
    student_backbone_weights: str | None = field(
        default=None,
        metadata={
            "help": "Its weights: `pretrained` (those of that name), a safetensors file, or the folder or Hub id of a "
            "detector with the same backbone; else random."
        },
    )
    student_d_model: int | None = field(default=None, metadata={"help": "Make the student this wide."})
    student_encoder_layers: int | None = field(default=None, metadata={"help": "With so many encoder layers."})
    student_decoder_layers: int | None = field(default=None, metadata={"help": "With so many decoder layers."})
    student_num_queries: int | None = field(default=None, metadata={"help": "With so many queries."})

    def keywords(self) -> dict[str, str | int]:
        """Those that are set, as `make_student` calls them; none: the student isn't made from the teacher."""
        values = {f.name.removeprefix("student_"): getattr(self, f.name) for f in fields(StudentArguments)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class DatasetArguments:
    """A data set, and how it is read."""

    dataset_name: str = field(
        default="shapes",
        metadata={
            "help": "A folder (COCO, YOLO, Pascal VOC, imagefolder), a Hub id, or `shapes`, the built-in synthetic set."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_format: str = field(default="auto", metadata={"help": "Format of a folder, if it should not be detected."})
    bbox_format: str | None = field(
        default=None, metadata={"help": "What the boxes are, to say it outright: xywh, xyxy, cxcywh, and so on."}
    )
    classes: list[str] | None = field(
        default=None, metadata={"help": "Keep only these classes of the data set, in this order; by default all."}
    )


@dataclass
class DataArguments(DatasetArguments):
    """Which images and boxes."""

    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_validation_split: str = field(
        default="validation",
        metadata={"help": "Split that chooses the best step; the training split's name: a share of that is held out."},
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split for the final numbers; the validation split where there is none."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training split held out for validation where there is no such split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first so many images."})
    strict: bool = field(
        default=False, metadata={"help": "Stop on every finding in the data, also on repairable ones."}
    )
    flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    scale: list[float] = field(
        default_factory=lambda: [0.8, 1.25], metadata={"help": "Range of the scale jitter; `1 1` for none."}
    )
    crop: float = field(default=0.5, metadata={"help": "Probability of a random crop."})
    photometric: float = field(
        default=0.5, metadata={"help": "Probability of each change of brightness, contrast, saturation and hue."}
    )


def parse(
    dataclasses: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> tuple:
    """The dataclasses filled from ``argv``; ``--config FILE.yaml`` gives defaults that flags override.

    A recipe is a flat YAML mapping of flag names to values. Unknown keys are refused with the file's name.

    Args:
        defaults: values by name of the flag, which the recipe overrides.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    recipe, argv = first.parse_known_args(argv)
    parser = HfArgumentParser(
        dataclasses, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML recipe with any of these flags; flags override it.")
    values = {} if recipe.config is None else read_recipe(recipe.config)
    known = {action.dest for action in parser._actions} - {"help", "config"}
    unknown = sorted(map(str, values.keys() - known))  # YAML reads `on:` as a key True
    if unknown:
        raise ValueError(f"{recipe.config}: unknown settings {unknown}. `--help` lists the known ones.")
    # Flags of the recipe come first, so that those typed by the user override them.
    argv = [word for name, value in {**(defaults or {}), **values}.items() for word in _flag(name, value)] + argv
    return tuple(parser.parse_args_into_dataclasses(argv)[: len(dataclasses)])  # the rest is --config


def read_recipe(path: str) -> dict:
    """A YAML mapping; paths in it are as the user would type them in the current folder."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of flag names to values, this is a {type(values).__name__}.")
    return values


def _flag(name: str, value) -> list[str]:
    """As the user would type it; nothing for null."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # In one word, so that a value may begin with a hyphen
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
