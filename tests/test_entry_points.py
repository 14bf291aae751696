"""hf-detrkd: every command of the package is reachable. tests/test_wheel.py has what an installed wheel does."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from hf_detrkd import __main__ as entry

ROOT = Path(__file__).parents[1]


def test_every_script_has_a_command_and_every_command_a_main():
    scripts = {path.stem.replace("_", "-") for path in (ROOT / "scripts").glob("*.py")}
    assert entry.COMMANDS.keys() == scripts
    for name in entry.COMMANDS:
        assert callable(import_module(f"hf_detrkd.commands.{name.replace('-', '_')}").main), name


def test_words_go_to_the_command(monkeypatch):
    calls = []
    for name in entry.COMMANDS:
        module = import_module(f"hf_detrkd.commands.{name.replace('-', '_')}")
        monkeypatch.setattr(module, "main", lambda words, name=name: calls.append((name, words)))
        monkeypatch.setattr(sys, "argv", ["hf-detrkd"])
        entry.main([name, "--flag", "1"])
        assert sys.argv[0] == f"hf-detrkd {name}"
    assert calls == [(name, ["--flag", "1"]) for name in entry.COMMANDS]


def test_the_grid_s_commands_on_windows(monkeypatch):
    """Which has no fcntl; nor do tune's weights need it."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    file = ROOT / "hf_detrkd" / "commands" / "compare.py"
    spec = spec_from_file_location("hf_detrkd.commands.compare_on_windows", file)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.fcntl is None


def test_text_files_have_their_encoding_named():
    """Windows' default isn't UTF-8."""
    for path in (ROOT / "hf_detrkd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("read_text", "write_text"):
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def test_help_and_unknown(capsys):
    for words in ([], ["--help"]):
        entry.main(words)
        printed = capsys.readouterr().out
        assert all(name in printed for name in entry.COMMANDS)
    with pytest.raises(SystemExit) as ended:
        entry.main(["distil"])
    assert ended.value.code == 2
    assert "unknown command 'distil'" in capsys.readouterr().err


def test_installed_entry_point():
    declared = [point for point in entry_points(group="console_scripts") if point.name == "hf-detrkd"]
    if not declared:
        pytest.skip("installed before it had an entry point; pip install -e . again")
    assert declared[0].value == "hf_detrkd.__main__:main"
