"""What each family provides to methods, asked of the adapters. ``python tests/families_table.py`` writes docs/families.md."""

from __future__ import annotations

import inspect
from pathlib import Path

import zoo

from hf_detrkd.families import FAMILIES, FamilyAdapter, adapter_for

TABLE = Path(__file__).parent.parent / "docs" / "families.md"
CAPABILITIES = {
    "replay": "the decoder decodes other queries on the memory it has",
    "query_mask": "a replay takes groups of queries in one call, and queries of which some are padding",
    "queries_from_boxes": "queries can be placed on given boxes",
    "label_content": "and take a label into their content",
    "content": "queries start from embeddings, not from zeros",
    "position": "queries take position embeddings",
    "reference": "queries carry a box (4) or a centre (2)",
    "self_attentions": "attention maps among the queries",
    "cross_attentions": "attention maps over all of the memory",
    "sampled_attentions": "weights and places of the sampling points of deformable attention",
    "padding": "pixel masks are read, and views have a mask of their memory",
    "proposals": "class and box at every token of the memory, among which the queries are selected",
    "quality_scores": "training makes a score the IoU of the box (varifocal loss and its kin)",
    "edge_distributions": "boxes are the expectation of distributions of their edges",
}
"""What methods can ask of an adapter (`FamilyAdapter.provides`), in the order of the table."""


def row(name: str) -> str:
    """Of one tiny model."""
    adapter = adapter_for(zoo.build(name))
    unknown = adapter.provides - CAPABILITIES.keys()
    if unknown:
        raise KeyError(f"{name} provides {sorted(unknown)}, which CAPABILITIES of {__file__} doesn't explain")
    marks = ["✓" if capability in adapter.provides else "" for capability in CAPABILITIES]
    if "reference" in adapter.provides:
        marks[list(CAPABILITIES).index("reference")] = str(adapter.reference_size)
    model_type = zoo.CONFIGS[name][0]
    variant = name.removeprefix(model_type).strip("_").replace("_", "-")
    family = f"`{model_type}`" + (f", {variant.replace('refine', 'box refinement')}" if variant else "")
    return f"| {family} | {adapter.classification} | " + " | ".join(marks) + " |"


def notes(adapter: type[FamilyAdapter]) -> str:
    """The first sentences of an adapter's docstring as one paragraph each."""
    return "\n\n".join(paragraph.replace("\n", " ") for paragraph in inspect.getdoc(adapter).split("\n\n"))


def render() -> str:
    """The page."""
    lines = [
        "# Families",
        "",
        "Written by `python tests/families_table.py`, which asks the adapters. Every family gives its views logits, boxes and",
        "hidden states, the memory and the backbone's maps; what else a method can count on differs. A method says what it",
        "needs, and a pair that lacks it is refused before training; [pairs.md](pairs.md) has all pairs.",
        "",
        "| family | classes | " + " | ".join(name.replace("_", " ") for name in CAPABILITIES) + " |",
        "| --- | --- |" + " :-: |" * len(CAPABILITIES),
        *(row(name) for name in zoo.NAMES),
        "",
        *(f"- **{name.replace('_', ' ')}**: {meaning}" for name, meaning in CAPABILITIES.items()),
        "",
        "With other attention than `eager` and `sdpa` no family takes a query mask. DAB-DETR with `num_patterns` has content,",
        "and RT-DETR-like models with `num_denoising=0` no label content.",
        "",
        "## Notes",
    ]
    for name, adapter in FAMILIES.items():
        lines += ["", f"### `{name}`", "", notes(adapter)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(render(), encoding="utf-8")
    print(f"written to {TABLE}")
