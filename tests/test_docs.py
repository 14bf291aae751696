"""What the documentation says can be done: every command is parsed, the pages for users are followed, every link resolves."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import api_reference
import documents
import pytest
import test_families
import test_methods
import zoo
from documents import PAGES, ROOT, Block, blocks, commands, of_package

from hf_detrkd.progress import log_line

FOLLOWED = [
    "docs/quickstart.md",
    "docs/data.md",
    "docs/choosing.md",
    pytest.param("README.md", marks=pytest.mark.slow),  # much of it is in the quick start too
]
"""Pages that are followed from top to bottom, commands and Python alike, in a folder that has what they call by name."""

TRAINING = ["--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true"]
TRAINING += ["--per_device_train_batch_size", "2", "--sheet_images", "0"]
QUICK = {
    "inspect_data": ["--sheet_images", "1"],
    "finetune": TRAINING,
    "distill": [*TRAINING, "--with_twin", "false"],
    "make_student": ["--rounds", "0"],
    "evaluate": ["--num_workers", "0"],
    "predict": ["--device", "cpu"],
}
"""Commands that are run, by module, and flags at their end that make them quick. The others need minutes or finished runs:
here they only read their flags, and tests of their own run them."""

MAKE, PIP, PYTEST = "a target of the Makefile", "an extra of pyproject.toml", "a test file of the repository"
ELSEWHERE = {
    r"make [\w-]+": MAKE,
    r"source \.venv/bin/activate": "made by `make env`",
    r"pip install (-e \.|'?hf_detrkd\[\w+\]'?)": PIP,
    r"pytest .*|python -m pytest .*": PYTEST,
    r"(tensorboard|trackio) .*": "shows what a tracker wrote",
    r"hf auth login": "asks for a token; a token's refusals are in tests/test_publishing.py",
    r"python scripts/push_metric\.py \S+": "pushes to the Hub; tests/test_publishing.py pushes to one on loopback",
    r"python tests/\w+_table\.py|python tests/api_reference\.py": "writes a page of docs/; tests compare the page with it",
}
"""Commands that are not run here: what they are, or why not, and what covers them."""

SHELL = [block for page in PAGES for block in blocks(page, "bash")]
FLAGS_ONLY = {"USER/NAME"}
"""Names of things on the real Hub."""


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    """A folder with what the pages call by name."""
    folder = tmp_path_factory.mktemp("workspace")
    documents.make_workspace(folder)
    return folder


@pytest.fixture
def workspace(laid_out, tmp_path, monkeypatch) -> Path:
    """A copy of it as the current folder."""
    monkeypatch.setenv("HF_DETRKD_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(laid_out, tmp_path / "workspace", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def elsewhere(words: list[str]) -> str | None:
    """Why a command isn't run here, if it is one that may stand in the pages."""
    line = " ".join(words)
    return next((why for pattern, why in ELSEWHERE.items() if re.fullmatch(pattern, line)), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_understood(page, workspace):
    """By the parser of the command itself: every flag exists, every value is allowed."""
    for block in blocks(page, "bash"):
        for words in commands(block):
            called = of_package(words)
            if called is None:
                assert elsewhere(words), (
                    f"{block}: {words} is no command of hf_detrkd; ELSEWHERE doesn't know it either"
                )
                continue
            try:
                documents.parse(*called)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block}: {' '.join(words)}: {error!r}") from error


def test_what_is_not_run_here_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for block in SHELL:
        for words in commands(block):
            for word in words:
                assert not word.startswith("scripts/") or (ROOT / word).exists(), f"{block}: there is no {word}"
            why = elsewhere(words)
            if why == MAKE:
                assert words[1] in targets, f"{block}: {words}"
            elif why == PIP and "[" in words[-1]:
                assert words[-1].partition("[")[2].rstrip("]") in extras, f"{block}: {words}"
            elif why == PYTEST:
                assert all((ROOT / word.partition("::")[0]).is_file() for word in words if word.startswith("tests/")), (
                    block
                )
            elif words[0] == "python" and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), f"{block}: {words}"


@pytest.mark.parametrize("page", FOLLOWED)
def test_following_a_page(page, workspace):
    with documents.tables_restored():
        follow(page)


def test_extending(workspace, monkeypatch):
    """The page's method and family, and the contracts they are said to keep."""
    monkeypatch.setitem(test_methods.ZERO, "centres", {"class", "centre", "state"})
    with documents.tables_restored():
        follow("docs/extending.md")
        zoo.CONFIGS["my_detr"] = ("my_detr", zoo.CONFIGS["detr"][1])
        for mode in test_families.MODES:
            test_families.test_forward_leaves_output_and_model_as_they_are("my_detr", mode)
            test_families.test_last_layer_is_the_models_output("my_detr", mode)
            test_families.test_shapes_are_what_the_adapter_says("my_detr", mode)
            test_families.test_replaying_own_queries_gives_every_layer("my_detr", mode)
            test_families.test_groups_do_not_see_each_other("my_detr", mode)
        pair = ("my_detr", "conditional_detr", {}, {"decoder_layers": 2})
        test_methods.test_step("centres", pair)
        test_methods.test_batch_doubling_changes_nothing("centres", pair)
        test_methods.test_identical_student("centres", "my_detr")
        test_methods.test_images_without_targets("centres", "my_detr", (3, 0))


def follow(page: str) -> None:
    """All of a page's commands and examples, in their order."""
    names: dict = {"__name__": "__main__"}
    for block in blocks(ROOT / page, "bash", "python"):
        if block.language == "bash":
            for words in commands(block):
                run(words, block)
        else:
            run_python(block, names)


def run(words: list[str], block: Block) -> None:
    """A command of the package, in this process, where it is cheap."""
    called = of_package(words)
    if called is None or FLAGS_ONLY & set(words):
        return
    module, flags = called
    name = module.rpartition(".")[2]
    if name not in QUICK:
        return
    main: Callable = __import__(module, fromlist=["main"]).main
    try:
        main([*flags, *QUICK[name]])
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{block}: {' '.join(words)}: {error!r}") from error


def run_python(block: Block, names: dict) -> None:
    """Its lines have the numbers they have in the page, so that tracebacks point there."""
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for link in documents.links(page):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link} leads nowhere"
        if anchor:
            assert anchor in documents.anchors(target), f"{page.relative_to(ROOT)}: {link} names no heading"


def test_the_index_has_every_page():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in documents.links(index)}
    missing = [page.name for page in PAGES if page.parent == index.parent and page not in linked | {index}]
    assert not missing


def test_the_api_reference_is_of_this_code():
    assert api_reference.PAGE.read_text(encoding="utf-8") == api_reference.render(), (
        "docs/api.md is not what the docstrings say; run `python tests/api_reference.py`"
    )


def test_the_log_line_is_the_trainers():
    """The one in docs/choosing.md."""
    logs = {"loss": 1.0, "detection_loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "gradient_share_kd": 0.3}
    logs |= {"kd_scale": 1.0, "kd_specific_class": 1.0, "kd_specific_l1": 1.0}
    (block,) = blocks(ROOT / "docs" / "choosing.md", "text")
    pattern = re.escape(block.text.strip()).replace(re.escape("..."), r"[\d.e-]+")
    assert re.fullmatch(pattern, log_line(logs, 50, 1000))


def test_the_checks_of_data_are_the_codes():
    """docs/data.md has a line for every problem that a check can name, and for no other."""
    written = re.findall(r"^\| ([^|`]+?) \| [^|]*\|$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert sorted(set(written) - {"format"}) == sorted(problems_in_the_code())


def problems_in_the_code() -> set[str]:
    """The first words of every `Finding`: given to it, to a helper that makes one, or by the name ``problem``."""
    found = set()
    for path in (ROOT / "hf_detrkd" / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                given = node.args[{"Finding": 0, "_whole": 0, "_found": 1}[name]] if name in MAKERS else None
                found.add(getattr(given, "value", None))
            elif isinstance(node, ast.Assign):
                targets, values = node.targets[0], node.value
                pairs = (
                    zip(targets.elts, values.elts, strict=True)
                    if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple)
                    else [(targets, values)]
                )
                found |= {value.value for name, value in pairs if getattr(name, "id", "") == "problem"}
    return {problem for problem in found if isinstance(problem, str)}


MAKERS = ("Finding", "_whole", "_found")
