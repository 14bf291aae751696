"""Flags of the commands, and recipes under them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hf_detrkd import DistillationConfig
from hf_detrkd.commands.arguments import DataArguments, ModelArguments, parse, read_recipe


@dataclass
class Few:
    """Enough to see how each type is read."""

    name: str = "default"
    number: int = 1
    rate: float = field(default=0.5, metadata={"help": "How fast."})
    disabled: bool = False
    enabled: bool = True
    maybe: bool | None = None
    several: list[str] = field(default_factory=lambda: ["a"])
    limits: list[float] = field(default_factory=lambda: [0.8, 1.25])
    settings: dict | str | None = None


@dataclass
class Other:
    more: int | None = None


def recipe(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_no_recipe():
    few, other = parse((Few, Other), ["--number", "3", "--more", "4"])
    assert few == Few(number=3)
    assert other == Other(4)


def test_everything_in_a_recipe(tmp_path):
    text = """
        name: a name with spaces
        number: 3
        rate: 1e-4          # YAML reads this as a string
        disabled: true
        enabled: no
        maybe: false
        several: [b, c]
        limits: [1, 1.5]
        settings: {temperature: 2, weights: {class: 1.5, l1: 0}, name: kd}
        more: 7
    """
    few, other = parse((Few, Other), ["--config", recipe(tmp_path, text)])
    assert few == Few(
        name="a name with spaces",
        number=3,
        rate=1e-4,
        disabled=True,
        enabled=False,
        maybe=False,
        several=["b", "c"],
        limits=[1.0, 1.5],
        settings='{"temperature": 2, "weights": {"class": 1.5, "l1": 0}, "name": "kd"}',
    )
    assert other == Other(7)


@pytest.mark.parametrize("position", ["before", "after"])
def test_flags_override_the_recipe(tmp_path, position):
    text = "{name: recipe, number: 3, disabled: true, enabled: true, several: [b, c], settings: {a: 1}, rate: 0.1}"
    flags = ["--name", "flag", "--disabled", "false", "--no_enabled", "--several", "d", "--settings", '{"b": 2}']
    config = ["--config", recipe(tmp_path, text)]
    (few,) = parse((Few,), [*flags, *config] if position == "before" else [*config, *flags])
    assert few == Few(
        name="flag", number=3, rate=0.1, disabled=False, enabled=False, several=["d"], settings='{"b": 2}'
    )


def test_recipe_with_an_equals_sign(tmp_path):
    (few,) = parse((Few,), [f"--config={recipe(tmp_path, 'number: 3')}"])
    assert few.number == 3


@pytest.mark.parametrize("value", ["-1e-4", "--name", "-x", "a=b", "[1]"])
def test_values_that_look_like_flags(tmp_path, value):
    (few,) = parse((Few,), ["--config", recipe(tmp_path, f"name: '{value}'")])
    assert few.name == value


def test_negative_numbers(tmp_path):
    (few,) = parse((Few,), ["--config", recipe(tmp_path, "{number: -3, rate: -1.0e-4, limits: [-1, 2]}")])
    assert (few.number, few.rate, few.limits) == (-3, -1e-4, [-1.0, 2.0])


def test_null_is_the_default(tmp_path):
    (few,) = parse((Few,), ["--config", recipe(tmp_path, "{name: null, number: 3}")])
    assert few == Few(number=3)


@pytest.mark.parametrize("key", ["nmae", "no_enabled", "help", "config", "some-name"])
def test_unknown_settings_of_a_recipe(tmp_path, key):
    path = recipe(tmp_path, f"{{{key}: 1, number: 3}}")
    with pytest.raises(ValueError, match=rf"recipe.yaml: unknown settings \['{key}'\]. `--help` lists the known ones"):
        parse((Few,), ["--config", path])


def test_keys_that_are_no_words(tmp_path):
    """YAML reads them as a boolean and a number."""
    with pytest.raises(ValueError, match=r"unknown settings \['7', 'True', 'x'\]"):
        parse((Few,), ["--config", recipe(tmp_path, "{on: 1, 7: 2, x: 3}")])


def test_unknown_flags():
    with pytest.raises(ValueError, match="nmae"):
        parse((Few,), ["--nmae", "x"])


def test_flags_are_not_abbreviated(tmp_path):
    """``--conf`` or ``--num`` would otherwise be something else in the next version."""
    with pytest.raises(ValueError, match="--num"):
        parse((Few,), ["--num", "3"])


def test_wrong_type_names_the_flag(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse((Few,), ["--config", recipe(tmp_path, "number: many")])
    assert "--number: invalid int value: 'many'" in capsys.readouterr().err


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config nowhere.yaml: there is no such file"):
        parse((Few,), ["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match=r"recipe.yaml: a recipe is a mapping of flag names to values, this is a list"):
        read_recipe(recipe(tmp_path, "[1, 2]"))
    with pytest.raises(ValueError, match="this is a NoneType"):
        read_recipe(recipe(tmp_path, ""))


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse((Few,), ["--help"], "What it does")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "What it does" in text
    assert "--config FILE" in text
    assert "How fast. (default: 0.5)" in text


def test_the_commands_dataclasses(tmp_path):
    """No two of them have a field of one name, and a recipe reaches each of them."""
    text = """
        model_name_or_path: student
        dataset_name: data
        scale: [1, 1]
        output_dir: out
        method: [logit_kd, kd_detr]
        method_config: {kd_detr: {temperature: 2}}
        teacher_model_init_kwargs: {dtype: bfloat16}
        layer_supervision: false
        learning_rate: 2e-4
        max_steps: 10
        use_cpu: true
        bf16: false
    """
    argv = ["--config", recipe(tmp_path, text), "--max_steps", "5", "--flip", "0"]
    model, data, args = parse((ModelArguments, DataArguments, DistillationConfig), argv)
    assert model == ModelArguments(model_name_or_path="student")
    assert data == DataArguments(dataset_name="data", scale=[1.0, 1.0], flip=0.0)
    assert args.method == ["logit_kd", "kd_detr"]
    assert args.method_config == {"kd_detr": {"temperature": 2}}
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert (args.layer_supervision, args.learning_rate, args.max_steps) == (False, 2e-4, 5)
