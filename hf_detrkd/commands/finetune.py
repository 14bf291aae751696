"""Train a detector without a teacher: a teacher for later, or any other.

    accelerate launch scripts/finetune.py --model_name_or_path CHECKPOINT --dataset_name DATA --output_dir runs/teacher
    accelerate launch scripts/finetune.py --config_name config.json --backbone_weights backbone.safetensors ...

Same data path, metrics and settings as distill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..config import DistillationConfig
from ..evaluation.cost import environment
from ..publishing import finish, open_for
from ..reporting.fairness import METHOD_DEFAULTS
from ..reporting.live import WriteReport
from ..reporting.run import UNFINISHED
from ..reporting.versions import versions
from ..reporting.writing import Reports
from .arguments import DataArguments, ModelArguments, parse
from .records import costs_of, data_of, forget_earlier, name_run, origins, settings, write_unfinished
from .resuming import checkpoint_to_resume, found_by_all, same_settings
from .setup import augment, build_detector, build_image_processor, load_data
from .training import train, write_down


@dataclass
class FinetuneConfig(DistillationConfig):
    """`DistillationConfig` without a teacher."""

    method: list[str] = field(default_factory=lambda: ["none"], metadata={"help": "Leave it at `none`."})

    def __post_init__(self):
        ignored = METHOD_DEFAULTS.keys() | {name for name in vars(self) if name.startswith("teacher_")}
        for name in sorted(ignored):
            if getattr(self, name) != getattr(DistillationConfig, name):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: finetune has no teacher. Use distill.py.")
        super().__post_init__()
        if self.method != ["none"]:
            raise ValueError(f"`method` is {self.method}: finetune has no teacher. Use distill.py.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command. Returns what it writes to ``results.json``."""
    model_arguments, data_arguments, args = parse((ModelArguments, DataArguments, FinetuneConfig), argv, __doc__)
    say = print if args.should_log else (lambda *_: None)
    output = Path(args.output_dir)
    args.resume_from_checkpoint = found_by_all(checkpoint_to_resume(args.resume_from_checkpoint, output))
    same_settings(args.resume_from_checkpoint, settings(model_arguments, data_arguments, args))
    name_run(args)
    if args.push_to_hub and args.process_index == 0:
        args.hub_model_id = open_for(args)
    with args.main_process_first(desc="data set"):
        data = load_data(data_arguments, args.seed, say, model_arguments.cache_dir, model_arguments.token)
    set_seed(args.seed)
    model = build_detector(model_arguments, data.train.id2label)
    processor = build_image_processor(model_arguments, model)
    augment(data, data_arguments, processor)
    say(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(data.train)} training images")
    reports, costs = Reports(), {}
    results = {"model": None, "settings": settings(model_arguments, data_arguments, args), "versions": versions()}
    results |= origins(model_arguments, data_arguments) | {"data": data_of(data)}
    if args.process_index == 0:
        costs = costs_of({"model": (model, processor)}, data.test[0]["image"], args)
        results |= {"environment": environment(args.device)}
    forget_earlier(args)
    with reports.writing(UNFINISHED):
        write_unfinished(results, args)
    results["model"], history = train(model, args, data, processor, None, None, reports, WriteReport())
    results["model"] |= costs.get("model", {})
    if args.should_save:
        write_down(results, {"model": (model, processor)}, {"model": history}, data, args, reports, say)
        finish(reports, results, args, say)
    return results


if __name__ == "__main__":
    main()
