"""``hf-detrkd COMMAND ...``, also ``python -m hf_detrkd`` and ``accelerate launch -m hf_detrkd``: the scripts of the repository from
an installed package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "inspect-data": "look at a data set before training on it",
    "finetune": "train a detector without a teacher",
    "make-student": "a smaller detector made from a teacher",
    "distill": "distil a teacher into a student",
    "tune": "choose a method's settings on the validation split",
    "compare": "run a grid of methods beside their twins, and report it",
    "summarize": "the same run with several seeds as one table",
    "evaluate": "COCO metrics of a detector on a split",
    "compare-models": "trained models side by side: AP, curves, cost, the images that tell them apart",
    "predict": "detect in an image, a folder or a video",
    "export": "write ONNX, and check it",
    "benchmark": "latency of detectors, cost of a training step",
    "push-metric": "the COCO metric to the Hub, as an evaluate Space",
}
"""By name, what `hf_detrkd.commands.<name>` does. They are imported when called: one takes seconds."""


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point. The first argument names the command, the others are its own.

    Raises:
        SystemExit: with code 2 for an unknown command.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] not in COMMANDS:
        print(f"hf-detrkd: unknown command {words[0]!r}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.argv[0] = f"hf-detrkd {words[0]}"  # what --help calls it
    import_module(f".commands.{words[0].replace('-', '_')}", __package__).main(words[1:])


def usage() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: hf-detrkd COMMAND [flags]", "", *lines, "", "hf-detrkd COMMAND --help lists its flags."])


if __name__ == "__main__":
    main()
