"""The file of a grid: data sets x pairs x methods x seeds, from YAML to the recipe of every cell.

common:                    # flags of distill.py for every cell
  num_train_epochs: 20
data:                      # by name, the flags of a data set
  bccd: {dataset_name: ../shared/data/bccd, image_size: 160}
pairs:                     # by name, the teacher and the student's flags; "{data}" is the data set's name
  rt_detr: {teacher: "runs/{data}/teacher", config_name: student.json}
  drawn: {teacher: "runs/teachers/seed{seed}", config_name: student.json}   # a teacher of its own for every seed
methods:                   # by name, the fields of a method; the twin `none` is always there
  kd_detr: {kd_weight: 3}
  heavy: {method: kd_detr, kd_weight: 9}
  longer_twin: {time_of: kd_detr}      # the twin, trained as long in time as the runs of kd_detr
seeds: [0, 1, 2]
overrides:                 # by pattern of data/pair/method, more flags; a mapping or the file that tune.py wrote
  "bccd/rt_detr/kd_detr": {kd_weight: 2}
skip: ["*/detr/heavy", "*/drawn/*/seed2"]   # patterns of data/pair/method that aren't run, or of single seeds
split: test                # what is reported; `validation` for grids that choose settings: these never see test
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..reporting.fairness import METHOD_FIELDS
from ..reporting.summary import TWIN
from .distill import ARGUMENTS
from .grid import OF_THE_HARNESS, TEACHER, Cell, Grid

FLAGS = frozenset(name for group in ARGUMENTS for name in group.__dataclass_fields__)
"""Those of distill.py."""
SECTIONS = ("common", "data", "pairs", "methods", "seeds", "overrides", "skip", "split")


def read_grid(path: str | Path, runs: str | Path = "runs", *, to_be_tuned: bool = False) -> Grid:
    """The grid in a YAML file, whose cells lie in ``runs``/<name of the file>/.

    Args:
        to_be_tuned: the file named by ``overrides`` need not be there yet.

    Raises:
        ValueError: for unknown sections, fields and flags; sections that aren't what they have to be; patterns that fit nothing;
            cells without the ones they need; and where a method's cells would differ from the twin's in more than the
            method's own fields.
    """
    path = Path(path)
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is {content!r}; a grid is a mapping with {', '.join(SECTIONS)}.")
    unknown = sorted(map(str, set(content) - set(SECTIONS)))
    lacking = [name for name in ("data", "pairs", "methods", "seeds") if not content.get(name)]
    if unknown or lacking:
        raise ValueError(f"{path}: unknown sections {unknown}, missing {lacking}; a grid has {', '.join(SECTIONS)}.")
    split = content.get("split", "test")
    if split not in ("test", "validation"):
        raise ValueError(f"{path}: `split` is {split!r}; allowed are test, validation.")
    overrides = content.get("overrides") or {}
    if isinstance(overrides, str):
        overrides = _read_overrides(path, Path(overrides), to_be_tuned)
    skip = content.get("skip") or []
    _check_sections(path, {**content, "overrides": overrides})
    methods = {TWIN: {}} | {name: dict(fields or {}) for name, fields in content["methods"].items()}
    names = [f"{data}/{pair}/{method}" for data in content["data"] for pair in content["pairs"] for method in methods]
    seeded = [f"{name}/seed{seed}" for name in names for seed in content["seeds"]]
    idle = [pattern for pattern in overrides if not any(fnmatchcase(name, pattern) for name in names)]
    idle += [pattern for pattern in skip if not any(_skips(pattern, name) for name in seeded)]
    if idle:
        raise ValueError(f"{path}: {idle} in `skip` or `overrides` fit no cell; cells are {', '.join(names)}.")
    distilled = [name for name, fields in methods.items() if name != TWIN and "time_of" not in fields]
    for name, fields in methods.items():
        strange = sorted(set(fields) - METHOD_FIELDS - {"time_of"})
        if strange or name == TEACHER or (fields.get("time_of", name) == name and "time_of" in fields):
            raise ValueError(
                f"{path}: method {name!r} sets {strange or fields}. A method may set {', '.join(sorted(METHOD_FIELDS))}, "
                "or `time_of` another method (the longer twin): in everything else it must be like its twin."
            )
        if "time_of" in fields and fields["time_of"] not in distilled:
            raise ValueError(f"{path}: `time_of` of {name!r} is {fields['time_of']!r}; methods are {distilled}.")
        if len(fields) > ("time_of" in fields) and (name == TWIN or "time_of" in fields):
            raise ValueError(
                f"{path}: {name!r} is a twin, without a teacher, and sets {sorted(fields)}: leave out the method's."
            )
    cells, measured = [], set()
    for seed in content["seeds"]:
        for data, data_flags in content["data"].items():
            for pair, pair_flags in content["pairs"].items():
                base = {**(content.get("common") or {}), **(data_flags or {}), **_named(pair_flags or {}, data, seed)}
                drawn = "{seed}" in str(pair_flags)
                folder = Path(runs) / path.stem / data / pair
                group = [
                    _cell(folder, base, overrides, data, pair, method, seed, split, fields)
                    for method, fields in methods.items()
                    if not any(_skips(pattern, f"{data}/{pair}/{method}/seed{seed}") for pattern in skip)
                ]
                _check_whole(path, group)
                _check_alike(path, group)
                if group and (drawn or folder not in measured):
                    cells.append(_teacher(folder, group[0], seed if drawn else None))
                    measured.add(folder)
                cells += group
    return Grid(path.stem, split, tuple(cells))


def _check_sections(path: Path, content: Mapping[str, Any]) -> None:
    """Whether every section is what it has to be, in words: YAML makes a mapping, a list or a text of few letters more or less."""

    def check(section: str, value: Any, right: bool, wanted: str) -> None:
        if not right:
            raise ValueError(f"{path}: `{section}` is {value!r}; it must be {wanted}.")

    for section in ("common", "data", "pairs", "methods", "overrides"):
        value = content.get(section) or {}
        check(section, value, isinstance(value, dict), "a mapping")
        for name, flags in value.items() if section != "common" else ():
            check(f"{section}: {name}", flags, isinstance(flags, dict | None), "a mapping of flags")
            check(section, name, isinstance(name, str), "a mapping from names; put this one in quotation marks")
            check(section, name, section == "overrides" or "/" not in name, "a mapping from names without /")
    seeds, skip = content["seeds"], content.get("skip") or []
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds) and len(set(seeds)) == len(seeds)
    check("seeds", seeds, whole, "a list of whole numbers, each once")
    check("skip", skip, isinstance(skip, list) and all(isinstance(one, str) for one in skip), "a list of patterns")


def _read_overrides(grid: Path, path: Path, to_be_tuned: bool) -> dict[str, Any]:
    if path.is_file():
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if to_be_tuned:
        return {}
    raise ValueError(
        f"{grid}: `overrides` names {path}, which is not there. Write it first: "
        f"python scripts/tune.py --config {grid} --output {path}"
    )


def _skips(pattern: str, name: str) -> bool:
    """Whether a pattern fits data/pair/method/seed0, or all seeds of it where its last part is no seed."""
    of_seeds = pattern.rpartition("/")[2].startswith("seed")
    return fnmatchcase(name if of_seeds else name.rpartition("/")[0], pattern)


def _named(flags: Mapping[str, Any], data: str, seed: int) -> dict[str, Any]:
    flags = {
        name: value.replace("{data}", data).replace("{seed}", str(seed)) if isinstance(value, str) else value
        for name, value in flags.items()
    }
    if not flags.get("teacher"):
        raise ValueError(f"A pair needs a `teacher`, a folder or a Hub id; it has {sorted(flags)}.")
    return {"teacher_model_name_or_path": flags.pop("teacher"), **flags}


def _cell(folder: Path, base, overrides, data, pair, method, seed, split, fields) -> Cell:
    recipe = {"report_to": "none", "disable_tqdm": True, "sheet_images": 0, **base}
    recipe |= {"method": method, **fields}
    time_of = recipe.pop("time_of", None)
    for pattern, flags in overrides.items():
        if fnmatchcase(f"{data}/{pair}/{method}", pattern):
            recipe |= flags or {}
    managed, unknown = sorted(OF_THE_HARNESS & recipe.keys()), sorted(map(str, recipe.keys() - FLAGS))
    if managed:
        raise ValueError(f"The grid sets {managed}, which the harness sets itself.")
    if unknown:
        raise ValueError(f"The grid sets {unknown}, which are no flags of distill.py: its --help lists them.")
    if recipe["method"] in (TWIN, [TWIN]) and method != TWIN and not time_of:
        raise ValueError(
            f"Method {method!r} is {TWIN!r}, the twin, which is always there: leave it out, or give it `time_of` (a longer twin)."
        )
    if method == TWIN or time_of:
        recipe = {name: value for name, value in recipe.items() if name not in METHOD_FIELDS} | {"method": TWIN}
    if split == "validation":
        recipe["dataset_test_split"] = recipe.get("dataset_validation_split", "validation")
    folder = folder / method / f"seed{seed}"
    recipe |= {"seed": seed, "output_dir": str(folder), "evaluate_teacher": False, "resume_from_checkpoint": True}
    return Cell(data, pair, method, seed, recipe, folder, time_of)


def _teacher(folder: Path, cell: Cell, seed: int | None) -> Cell:
    """The measurement of the teacher, through the data and settings of the student's runs."""
    folder = folder / TEACHER if seed is None else folder / TEACHER / f"seed{seed}"
    recipe = {name: value for name, value in cell.recipe.items() if name not in METHOD_FIELDS}
    recipe |= {"method": TWIN, "output_dir": str(folder), "only_teacher": True}
    return Cell(cell.data, cell.pair, TEACHER, seed, recipe, folder)


def _check_whole(path: Path, group: list[Cell]) -> None:
    """What a cell needs must not be skipped."""
    there = {cell.method for cell in group}
    for cell in group:
        lacking = {TWIN, cell.time_of} - {None} - there
        if lacking:
            raise ValueError(
                f"{path}: `skip` leaves out {', '.join(sorted(lacking))} of {cell.data}/{cell.pair} and not {cell.method}, which "
                "needs it: skip both or none."
            )


def _check_alike(path: Path, group: list[Cell]) -> None:
    """The cells of one seed may differ in the fields of their methods only."""
    for cell in group[1:]:
        different = sorted(
            name
            for name in (cell.recipe.keys() | group[0].recipe.keys()) - METHOD_FIELDS - {"output_dir"}
            if cell.recipe.get(name) != group[0].recipe.get(name)
        )
        if different:
            raise ValueError(
                f"{path}: {cell.name} and {group[0].name} differ in {different}. Only the fields of a method may differ, "
                f"{', '.join(sorted(METHOD_FIELDS))}: give the others to the data set, the pair or all."
            )
