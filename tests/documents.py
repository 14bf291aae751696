"""The documentation as tests read it: its code blocks, its shell commands, its links, and a folder in which it can be followed.

for block in blocks(ROOT / "docs" / "data.md"):
    for words in commands(block):
        parse(words)                 # by the command's own parser
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny_datasets
import torch
import yaml
import zoo
from accelerate.commands.launch import launch_command_parser
from scenes import processor
from transformers import HfArgumentParser

from hf_detrkd.__main__ import COMMANDS
from hf_detrkd.config import DistillationConfig
from hf_detrkd.methods import METHODS, configure

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """Where its text begins, counted from 1."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, all of them or those of some languages."""
    text = page.read_text(encoding="utf-8")
    found = [Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a bash block as words. Assignments (``common="..."``) are put in where they are used."""
    variables: dict[str, str] = {}
    for line in block.text.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            name, equals, value = words[0].partition("=") if words else ("", "", "")
            if len(words) == 1 and equals and name.isidentifier():
                variables[name] = value
            elif words:
                yield words


# ------------------------------------------------------------------------------------------------------------- parsing


class Parsed(Exception):
    """Raised in the place of what a command does after it has read its flags."""


def of_package(words: list[str]) -> tuple[str, list[str]] | None:
    """The module whose ``main`` a command calls, and its flags; None where it is no command of this package."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        module = ["-m"] if launched.module else []
        return of_package(["python", *module, launched.training_script, *launched.training_script_args])
    if words[0] == "hf-detrkd" or words[:3] == ["python", "-m", "hf_detrkd"]:
        name, *flags = words[1:] if words[0] == "hf-detrkd" else words[3:]
        if name not in COMMANDS:
            raise ValueError(f"hf-detrkd has no command {name!r}; it has {', '.join(COMMANDS)}")
        return f"hf_detrkd.commands.{name.replace('-', '_')}", flags
    if words[:2] == ["python", "-m"] and words[2].startswith("hf_detrkd"):
        return words[2], words[3:]
    script = re.fullmatch(r"scripts/(\w+)\.py", words[1]) if words[0] == "python" and len(words) > 1 else None
    if script and script[1].replace("_", "-") in COMMANDS:
        return f"hf_detrkd.commands.{script[1]}", words[2:]
    return None


def parse(module: str, flags: list[str]) -> None:
    """Have a command read its flags with its own parser, and do nothing else.

    Raises:
        Exception: whatever it says of flags it doesn't know and of values that it refuses.
    """
    if flags[-1:] == ["..."]:  # "and what else you need"
        flags = flags[:-1]

    def then_stop(read):
        def reading(*args, **kwargs):
            _check_methods(read(*args, **kwargs))
            raise Parsed

        return reading

    with pytest.MonkeyPatch.context() as patch:
        for parser, name in (
            (argparse.ArgumentParser, "parse_args"),
            (HfArgumentParser, "parse_args_into_dataclasses"),
        ):
            patch.setattr(parser, name, then_stop(getattr(parser, name)))
        try:
            import_module(module).main(flags)
        except Parsed:
            return
    raise AssertionError(f"{module} read no flags")


def _check_methods(arguments: Any) -> None:
    """Methods and their settings are read later than flags, when the pair is known."""
    for config in arguments if isinstance(arguments, tuple) else ():
        if isinstance(config, DistillationConfig) and config.method not in (["none"], ["auto"]):
            settings = config.method_config or {}
            for name in config.method:
                configure(METHODS[name].config_class, settings if len(config.method) == 1 else settings.get(name))


# ----------------------------------------------------------------------------------------------------------- following


def make_workspace(folder: Path) -> None:
    """Lays out what the pages call by name: data sets, checkpoints, images, a recipe and the repository's scripts.

    So commands and examples run there as they are written; `PekingU/rtdetr_r50vd` is a local folder of a tiny model.
    """
    tiny_datasets.write_coco(folder / "path" / "to" / "data")
    for name, layers in (("path/to/teacher", 3), ("path/to/student", 2), ("PekingU/rtdetr_r50vd", 3)):
        save_detector(folder / name, decoder_layers=layers)
    save_detector(folder / "PekingU" / "rtdetr_r18vd", decoder_layers=2)
    pictures = folder / "images"
    pictures.mkdir()
    for index in range(2):
        tiny_datasets.picture((40, 30), index).save(pictures / f"{index}.jpg")
    tiny_datasets.picture((40, 30)).save(folder / "image.jpg")
    for name, place in (("DATA", "path/to/data"), ("TEACHER", "path/to/teacher"), ("STUDENT", "path/to/student")):
        (folder / name).symlink_to(place)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"teacher_model_name_or_path": "path/to/teacher"}))


def save_detector(folder: Path, **overrides) -> None:
    """A tiny RT-DETR of the tiny data set's classes with its image processor."""
    names = tiny_datasets.NAMES
    model = zoo.build("rt_detr", classes=len(names), **overrides)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


@contextmanager
def tables_restored():
    """What examples add to `METHODS` and other tables is gone afterwards."""
    from hf_detrkd.families import FAMILIES
    from hf_detrkd.families.architecture import ARCHITECTURES

    tables = (METHODS, FAMILIES, ARCHITECTURES, zoo.CONFIGS)
    before = [dict(table) for table in tables]
    random_state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


# --------------------------------------------------------------------------------------------------------------- links


def links(page: Path) -> list[str]:
    """Targets of a page's links, those in code blocks left out."""
    return LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What ``#...`` can point to: GitHub's names of the headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}
