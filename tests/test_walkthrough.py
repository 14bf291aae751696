"""docs/walkthrough.md: its commands are those of the script that wrote it, and the script still runs."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import tiny_datasets
import walkthrough
import zoo

PAGE = walkthrough.ROOT / "docs" / "walkthrough.md"


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)\n```", page, re.DOTALL)
    return [re.sub(r" \\\n +", " ", block) for block in blocks]


def test_the_page_is_the_scripts():
    page = PAGE.read_text(encoding="utf-8")
    words = shlex.split(re.search("<!-- (.*?) -->", page)[1])
    assert words[:2] == ["python", "tests/walkthrough.py"]
    steps = walkthrough.steps(walkthrough.read_arguments(words[2:]))
    assert commands(page) == [step.command for step in steps] and len(steps) <= 6


def test_long_commands_are_broken_before_flags():
    command = "hf-detrkd do --one 1 --two 2 3 --three 3"
    assert walkthrough.wrapped(command, 24) == "hf-detrkd do --one 1 \\\n    --two 2 3 --three 3"
    assert commands(f"```bash\n{walkthrough.wrapped(command, 10)}\n```") == [command]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_runs(tmp_path):
    tiny_datasets.write_coco(tmp_path / "cells")
    zoo.build("rt_detr").config.save_pretrained(tmp_path)
    page = tmp_path / "page.md"
    flags = ["--data", str(tmp_path / "cells"), "--model", str(tmp_path / "config.json"), "--image_size", str(zoo.SIZE)]
    flags += ["--teacher_epochs", "1", "--epochs", "1", "--folder", str(tmp_path / "walk"), "--output", str(page)]
    assert walkthrough.main(flags) == 0
    assert len(commands(page.read_text())) == 6
    assert json.loads((tmp_path / "walk" / "runs" / "onnx" / "export.json").read_text())["problems"] == []
    assert f"`{walkthrough.STUDENT}`" in page.read_text()
