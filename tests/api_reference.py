"""The API reference from the docstrings. ``python tests/api_reference.py`` writes docs/api.md."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import hf_detrkd

PAGE = Path(__file__).parent.parent / "docs" / "api.md"

MODULES = {
    "Data": (
        "data.formats",
        "data.schema",
        "data.checks",
        "data.findings",
        "data.dataset",
        "data.augmentation",
        "data.collator",
    ),
    "Training": ("config", "trainer", "model", "detectors", "labels", "ema", "sharding"),
    "Models": ("view", "families", "families.base", "students", "inheritance", "backbones"),
    "Building blocks of methods": (
        "methods.base",
        "methods",
        "matching",
        "sampling.*",
        "projectors.*",
        "losses.*",
    ),
    "Evaluation": (
        "evaluation.coco_detection.coco_evaluator",
        "evaluation.streaming",
        "evaluation.detector",
        "evaluation.agreement",
        "evaluation.bootstrap",
        "diagnostics",
    ),
    "After training": ("export", "publishing", "reporting.card", "reporting.recorded", "reporting.report"),
}
"""By heading, modules of `hf_detrkd` in the order of the page; `.*`: a folder with all of its files. Of each everything is
shown that is defined there and begins with no underscore; of `hf_detrkd.data` what the package itself gives."""

LONGEST = 110
"""Characters of a signature that is written in one line."""
ENTRY = re.compile("#### ")
SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
ITEM = re.compile(r"    [\w*`][\w.*, `]*: ")


def render() -> str:
    """The page.

    Raises:
        ValueError: a module of `MODULES` has become a folder, or is empty.
    """
    public = ", ".join(f"[`{name}`](#{anchor(name)})" for name in hf_detrkd.__all__)
    lines = [
        "# API reference",
        "",
        "Written by `python tests/api_reference.py` from the docstrings.",
        "",
        f"`from hf_detrkd import ...`: {public}. Everything else is imported from its module.",
        "",
        "Letters in shapes: B images, L decoder layers, Q queries, K classes, D width of the decoder, S memory tokens, H heads, M",
        "pairs of a match, N targets of an image. Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image where nothing else is said.",
        "",
    ]
    modules = modules_by_heading()
    for title, of_title in modules.items():
        lines += [f"- {title}: " + ", ".join(f"[{m.__name__}](#{anchor(m.__name__)})" for m in of_title)]
    for title, of_title in modules.items():
        lines += ["", f"## {title}"]
        for module in of_title:
            entry = list(of_module(module))
            if f"{module.__name__.removeprefix('hf_detrkd.')}.*" not in MODULES[title] and not any(
                map(ENTRY.match, entry)
            ):
                raise ValueError(
                    f"{module.__name__} defines nothing that could be shown: correct MODULES in {__file__}"
                )
            lines += ["", *entry]
    return "\n".join(line.rstrip() for line in lines) + "\n"


@cache
def modules_by_heading() -> dict[str, list[ModuleType]]:
    """`MODULES` imported."""
    result: dict[str, list[ModuleType]] = {title: [] for title in MODULES}
    for title, names in MODULES.items():
        for name in names:
            module = import_module(f"hf_detrkd.{name.removesuffix('.*')}")
            result[title].append(module)
            if name.endswith(".*"):
                files = pkgutil.iter_modules(module.__path__)
                result[title] += [import_module(f"{module.__name__}.{file.name}") for file in files]
    return result


def anchor(heading: str) -> str:
    """What GitHub calls it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def of_module(module: ModuleType) -> Iterator[str]:
    """A module and what it defines, in the order of its source."""
    yield f"### {module.__name__}"
    yield ""
    yield from prose(inspect.getdoc(module))
    texts = texts_below(ast.parse(inspect.getsource(module)))
    for name, value in vars(module).items():
        if not shown(module, name):
            continue
        if getattr(value, "__module__", None) == module.__name__ and inspect.isclass(value):
            yield from ["", *of_class(value)]
        elif getattr(value, "__module__", None) == module.__name__ and inspect.isfunction(value):
            yield from ["", f"#### {name}", "", *signature(value), "", *prose(inspect.getdoc(value))]
        elif texts.get(name) or (name in texts and name in hf_detrkd.__all__):
            yield from ["", f"#### {name}"]
            if isinstance(value, dict):
                yield from ["", f"Keys: {', '.join(f'`{key}`' for key in value)}."]
            if texts[name]:
                yield from ["", *prose(texts[name])]


def shown(module: ModuleType, name: str) -> bool:
    """Whether a name is for users of the module."""
    if module.__name__.startswith("hf_detrkd.data."):
        return name in hf_detrkd.data.__all__
    return not name.startswith("_") and name != "main"


def of_class(cls: type) -> Iterator[str]:
    """A class: its signature, docstring, fields, properties and methods, those of bases without an entry of their own too."""
    yield f"#### {cls.__name__}"
    yield ""
    if not dataclasses.is_dataclass(cls) and not issubclass(cls, BaseException):
        yield from [*signature(cls), ""]
    yield from prose(inspect.getdoc(cls))
    entries = {module.__name__ for modules in modules_by_heading().values() for module in modules}
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("hf_detrkd")]
    parts = [cls, *(base for base in bases if base.__module__ not in entries)]
    fields = [field for part in parts for field in fields_of(part)]
    if fields:
        yield from ["", *fields]
    for name, value in {name: value for part in reversed(parts) for name, value in vars(part).items()}.items():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if (name.startswith("_") and name != "__call__") or not inspect.isfunction(function) or not function.__doc__:
            continue
        call = [f"`{name}`"] if isinstance(value, property) else signature(function, name)
        body = [*call, "", *prose(inspect.getdoc(function))]
        yield from ["", *(("- " if number == 0 else "  ") + line for number, line in enumerate(body))]


def signature(of, name: str | None = None) -> list[str]:
    """A call as it is written, in one line or, where it is long, as a block."""
    name = name or of.__name__
    try:
        found = inspect.signature(of)
    except ValueError:  # an enumeration's, or of C
        return [f"`{name}`"]
    parts, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind == parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        keyword_only = keyword_only or parameter.kind == parameter.VAR_POSITIONAL
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {written(parameter.annotation)}"
        equals = " = " if kind else "="
        default = getattr(parameter.default, "__name__", repr(parameter.default))
        default = "" if parameter.default is parameter.empty else equals + default
        parts.append(f"{stars}{parameter.name}{kind}{default}")
    result = "" if found.return_annotation in (found.empty, "None") else f" -> {written(found.return_annotation)}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= LONGEST:
        return [f"`{line}`"]
    return ["```text", f"{name}(", *(f"    {part}," for part in parts), f"){result}", "```"]


def written(annotation) -> str:
    """A type as the source has it."""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def fields_of(cls: type) -> Iterator[str]:
    """A list item for every class attribute that its source explains."""
    helps = {}
    if dataclasses.is_dataclass(cls):
        helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(cls)}
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    texts = texts_below(tree)
    for statement in tree.body:
        if not isinstance(statement, ast.AnnAssign) or statement.target.id.startswith("_"):
            continue
        name, text = statement.target.id, texts.get(statement.target.id) or helps.get(statement.target.id)
        default = "" if statement.value is None else default_of(statement.value)
        words = " ".join(prose(text)).strip() if text else ""
        yield f"- `{name}: {ast.unparse(statement.annotation)}{default}`" + (f": {words}" if words else "")


def default_of(value: ast.expr) -> str:
    """`` = 0.5`` of ``0.5`` and of ``field(default=0.5, ...)``; nothing where it is made by a function."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if isinstance(given.get("default_factory"), ast.Lambda):
            return f" = {ast.unparse(given['default_factory'].body)}"
        return f" = {ast.unparse(given['default'])}" if "default" in given else ""
    return f" = {ast.unparse(value)}"


def texts_below(tree: ast.AST) -> dict[str, str]:
    """By the name of an assignment the string below it, empty where there is none."""
    found = {}
    for statement, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        target = getattr(statement, "target", None) or getattr(statement, "targets", [None])[0]
        if isinstance(target, ast.Name):
            text = getattr(getattr(below, "value", None), "value", "") if isinstance(below, ast.Expr) else ""
            found[target.id] = inspect.cleandoc(str(text))
    return found


def prose(docstring: str | None) -> list[str]:
    """A docstring as Markdown: sections as lists, tables and indented code as blocks of text."""
    lines: list[str] = []
    in_section = False
    for paragraph in (docstring or "").replace("``", "`").split("\n\n"):
        first, *rest = paragraph.splitlines() or [""]
        indented = all(line.startswith("    ") for line in (first, *rest))
        in_section = bool(SECTION.match(first)) or (in_section and indented)
        if lines:
            lines.append("")
        if first.startswith("===") or (indented and not in_section):
            lines += ["```text", *textwrap.dedent(paragraph).splitlines(), "```"]
        elif in_section:
            items = [first, *rest] if indented else rest
            lines += [] if indented else [f"**{first.removesuffix(':')}**", ""]
            lines += [f"- {line.strip()}" if ITEM.match(line) else f"  {line.strip()}".rstrip() for line in items]
        else:
            lines += [first, *rest]
    return lines


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"written to {PAGE}")
