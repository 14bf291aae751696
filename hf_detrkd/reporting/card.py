"""The model card of a run, from what is in its ``results.json``.

    python -m hf_detrkd.reporting.card runs/student --repo_id USER/NAME

writes ``runs/student/README.md`` anew. Nothing is measured here: what ``results.json`` doesn't have, the card doesn't
have either, or says so.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..methods import METHODS
from .recorded import (
    MADE,
    class_names,
    dataset_of,
    hub_id,
    measured,
    part_measured,
    setting,
    settings_rows,
    student_row,
)
from .table import comparison_table, points, text_table
from .writing import whole

TEMPLATE = Path(__file__).with_name("card_template.md")
TAGS = ("object-detection", "vision", "generated_from_trainer", "hf_detrkd")
INDEXED = {"map": "AP", "map_50": "AP50", "map_75": "AP75"}
"""The metrics of the model-index, and their names."""
PICTURES = {"curves.png": "Training curves", "sheet.png": "Detections on images of the test split"}


def model_card(
    results: Mapping[str, Any], repo_id: str, pictures: Sequence[str] = (), **metadata: str | Sequence[str] | None
) -> ModelCard:
    """The card of the student of a run; of the one model of a run without a teacher.

    Args:
        results: what a command writes to ``results.json``. ``teacher``, ``twin``, ``data``, ``start`` and ``versions``
            may be missing, and so may ``flops`` and ``latency_ms`` of a row; ``environment`` is where that was measured.
        repo_id: what users give to `from_pretrained`.
        pictures: files beside the card, of `PICTURES`.
        metadata: over what the run says: ``license``, ``language``, ``base_model``, ``datasets``, ``tags`` (added).
    """
    row = student_row(results)
    split, metrics = measured(results, row)
    dataset, dataset_id = dataset_of(results)
    name = repo_id.rstrip("/").split("/")[-1]
    methods = [method for method in row["method"].split("+") if method != "none"]
    license = metadata.pop("license", None) or setting(results, "DistillArguments", "license")
    more_tags = metadata.pop("tags", None) or ()
    tags = [*TAGS, *(["knowledge-distillation"] if methods else []), *methods, *_list(row.get("model_type"))]
    datasets = _list(metadata.pop("datasets", None) or dataset_id)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=license,
        tags=list(dict.fromkeys([*tags, *_list(more_tags)])),
        metrics=["map"],
        **{
            "base_model": hub_id(results.get("start")),
            "datasets": datasets or None,
            **{key: value for key, value in metadata.items() if value},
        },
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="object-detection",
                dataset_type=dataset_id or dataset,
                dataset_name=dataset,
                dataset_split=split,
                metric_type=metric,
                metric_name=f"{title} (COCO)",
                metric_value=metrics[metric],
            )
            for metric, title in INDEXED.items()
            if metric in metrics and not math.isnan(metrics[metric])
        ],
    )
    rows = {"teacher": results.get("teacher"), "twin": results.get("twin"), "student" if methods else "model": row}
    shown = {role: measured(results, its)[1] for role, its in rows.items() if its}
    shown = {role: its for role, its in shown.items() if its}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        summary=_summary(results, row, methods),
        classes=", ".join(class_names(metrics)) or "see `config.id2label`",
        split=split,
        dataset=_code_or_link(dataset, dataset_id, "datasets/"),
        images=_images(results),
        comparison=comparison_table(shown, markdown=True) if shown else "Nothing was measured.",
        twin=_twin(results, methods, shown),
        recall=", and AR with 100 detections per image of this model",
        per_class=_class_comparison(shown, metrics),
        size=_size_table({role: its for role, its in rows.items() if its and role != "twin"}),
        latency=_latency(results, row),
        pictures=[(PICTURES[file], file) for file in pictures],
        data=_data(results, row),
        settings=text_table(["setting", "value"], settings_rows(results), markdown=True),
        method_config=_method_config(results) if methods else None,
        methods=[_method(method) for method in methods] or [{"text": "None: trained without a teacher."}],
        versions="\n".join(f"- {package}: {its}" for package, its in results.get("versions", {}).items()),
    )


def write_card(
    folder: str | Path,
    results: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    output: str | Path | None = None,
    **metadata: str | Sequence[str] | None,
) -> Path:
    """Write a run's card, whole or not at all, and return its path.

    Args:
        folder: of the run, or its ``results.json`` under whatever name.
        results: instead of those in the folder.
        repo_id: what users give to `from_pretrained`; by default ``hub_model_id`` of the run, or its folder.
        output: file to write; by default ``README.md`` in the folder. Pictures are shown that lie beside it.
        metadata: see `model_card`.

    Raises:
        ValueError: the folder has no ``results.json``, or that is not one of a training.
    """
    folder = Path(folder)
    if results is None:
        file = folder if folder.is_file() else folder / "results.json"
        if not file.is_file():
            raise ValueError(f"{folder} has no results.json, from which a card is written. Name the folder of a run.")
        results = json.loads(file.read_text(encoding="utf-8"))
        if output is None and folder.is_file():
            output = folder.with_suffix(".md")
    if "student" not in results and "model" not in results:
        raise ValueError(f"The results of {folder} are of no training: they have {sorted(results)}, and no student.")
    output = folder / "README.md" if output is None else Path(output)
    repo_id = repo_id or setting(results, "DistillationConfig", "hub_model_id") or folder.as_posix()
    pictures = [file for file in PICTURES if (output.parent / file).is_file()]
    card = model_card(results, repo_id, pictures, **metadata)
    with whole(output) as part:
        part.write_text(card.content, encoding="utf-8")
    return output


def _summary(results: Mapping[str, Any], row: Mapping[str, Any], methods: Sequence[str]) -> str:
    what = f"A {row.get('model_type', 'DETR-like')} object detector of {row['parameters'] / 1e6:.2f} M parameters"
    teacher = results.get("teacher")
    if not methods or not teacher:
        return f"{what}, trained with `hf_detrkd` without a teacher."
    metrics = measured(results, teacher)[1]
    ap = f" (AP {points(metrics['map'])})" if metrics else " (its AP was not measured)"
    its = "a teacher"  # passed to the trainer as a model in memory, without a name
    if teacher["name_or_path"]:
        its = f"the teacher {_code_or_link(teacher['name_or_path'], hub_id(teacher))}"
    revision = f" at revision `{teacher['revision']}`" if teacher.get("revision") else ""
    return (
        f"{what}, distilled with `hf_detrkd` by {' and '.join(f'`{method}`' for method in methods)} from "
        f"{its}{revision}{ap}."
    )


def _twin(results: Mapping[str, Any], methods: Sequence[str], shown: Mapping[str, Any]) -> str:
    if not methods:
        return ""
    if "twin" not in shown:
        return (
            "**No twin was trained**, which would be the same student without the teacher. So these numbers don't say what "
            "distillation added. `--with_twin true` trains it."
        )
    seed = setting(results, "DistillationConfig", "seed")
    return (
        "The twin is the same student with the same first weights, data and schedule, trained without the teacher: what "
        f"distillation added is the last row. It is one run{'' if seed is None else f', of seed {seed}'}; another seed "
        "gives another difference."
    )


def _class_comparison(shown: Mapping[str, Mapping[str, float]], metrics: Mapping[str, float]) -> str:
    rows = [
        [name, *(points(its.get(f"map_{name}")) for its in shown.values()), points(metrics[f"mar_100_{name}"])]
        for name in class_names(metrics)
    ]
    return text_table(["class", *shown, "AR100"], rows, markdown=True) if rows else "Not measured."


def _size_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [["parameters (M)", *(f"{row['parameters'] / 1e6:.2f}" for row in rows.values())]]
    for key, title, factor in (("flops", "FLOPs (G)", 1e-9), ("latency_ms", "latency (ms)", 1)):
        if any(row.get(key) is not None for row in rows.values()):
            cells = ["-" if row.get(key) is None else f"{factor * row[key]:.2f}" for row in rows.values()]
            lines.append([title, *cells])
    return text_table(["", *rows], lines, markdown=True)


def _latency(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    if row.get("latency_ms") is None or not results.get("environment"):
        return ""
    where = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    return (
        "FLOPs and latency are those of a forward pass of one image, the model alone; a multiply-add is two operations. The "
        f"latency is a median, measured in turn before the training ({where}). On a machine that does other work it says little."
    )


def _data(results: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    parts = []
    images = results.get("data", {}).get("images")
    if images:
        chosen = setting(results, "DistillationConfig", "load_best_model_at_end")
        purpose = "choose the best step" if chosen else "validate"
        parts.append(f"{images['train']} images to train, {images['validation']} to {purpose}.")
    inherited = setting(results, "DistillArguments", "inherit_from_teacher")
    more = " and the teacher's weights wherever name and shape agree" if inherited else ""
    start = results.get("start")
    if start:
        place = _code_or_link(start["name_or_path"], hub_id(start))
        revision = f" at revision `{start['revision']}`" if start.get("revision") else ""
        parts.append(f"Started from {place}{revision}{more}.")
    elif setting(results, "ModelArguments", "config_name"):
        backbone = setting(results, "ModelArguments", "backbone_weights")
        trained = f" with the backbone of `{Path(backbone).name}`" if backbone else ""
        parts.append(f"Started from random weights{trained}{more}.")
    elif any(setting(results, "DistillArguments", name) is not None for name in MADE):
        parts.append("Made from the teacher, with its weights wherever they fit.")
    if row.get("steps") and row.get("train_seconds") and not row.get("resumed_from"):
        machine = results.get("versions", {}).get("machine")
        where = f" on {machine}" if machine else ""
        parts.append(f"{row['steps']} steps in {row['train_seconds']:.0f} s{where}.")
    elif row.get("steps"):
        parts.append(f"{row['steps']} steps.")
    return " ".join(parts)


def _method_config(results: Mapping[str, Any]) -> str | None:
    config = setting(results, "DistillationConfig", "method_config")
    return json.dumps(config, indent=2) if config else None


def _method(name: str) -> dict[str, str | None]:
    """A method in a sentence, with the citation of its paper; a method of the user's own has none."""
    paper = METHODS[name].paper if name in METHODS else None
    if paper is None:
        return {"text": f"`{name}`.", "bibtex": None}
    return {"text": f"`{name}`: [{paper.title}](https://arxiv.org/abs/{paper.arxiv}).", "bibtex": paper.bibtex}


def _images(results: Mapping[str, Any]) -> str:
    images = results.get("data", {}).get("images")
    return f" ({images[part_measured(results)]} images)" if images else ""


def _code_or_link(name: str, on_hub: str | None, kind: str = "") -> str:
    return f"[{on_hub}](https://huggingface.co/{kind}{on_hub})" if on_hub else f"`{name}`"


def _list(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def main(argv: Sequence[str] | None = None) -> Path:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run, or a file like its results.json")
    parser.add_argument("--repo_id", help="where the student is on the Hub; default: as the run says, or the folder")
    parser.add_argument("--output", help="file to write; default: README.md in the folder")
    parser.add_argument("--license", help="such as apache-2.0; default: as the run says")
    arguments = parser.parse_args(argv)
    path = write_card(arguments.run, None, arguments.repo_id, arguments.output, license=arguments.license)
    print(path)
    return path


if __name__ == "__main__":
    main()
