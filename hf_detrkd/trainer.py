"""`DistillationTrainer`: a `transformers.Trainer` whose training step has a teacher."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, PreTrainedModel, Trainer
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from .config import DistillationConfig
from .data.collator import DetectionCollator
from .ema import ExponentialMovingAverage
from .evaluation.streaming import StreamingCocoMetrics, pack_detections, pack_references
from .families import adapter_for
from .labels import LabelMap
from .methods import DistillationMethod, build_methods
from .model import DistillationModel
from .progress import DistillationPrinter, DistillationProgress
from .publishing import open_repository, push_folder, repository_of
from .reporting.card import write_card
from .reporting.versions import versions
from .sharding import shard_teacher

logger = logging.get_logger(__name__)

STATE_NAME = "distillation_state.pt"
"""In every checkpoint, beside the plain student: projectors, raw weights under the moving average, the teacher's digest."""


class DistillationTrainer(Trainer):
    """Distils a teacher detector into a student detector.

    Everything a `Trainer` does works as usual: resume, best checkpoint, accumulation, mixed precision, several
    processes, trackers, the Hub. The folder it saves is the plain student; `from_pretrained` loads it without this
    package. The teacher is never trained, wrapped, averaged or saved.

    Args:
        model: the student, or its name or path.
        teacher_model: the teacher, or its name or path; not needed with ``method="none"``.
        args: the settings.
        data_collator: makes batches of ``pixel_values``, ``labels`` and, where the teacher needs other pixels,
            ``teacher_pixel_values``; by default `DetectionCollator` over the image processors.
        train_dataset, eval_dataset: items as `DetectionDataset` gives them, or as your collator takes them.
        processing_class: the student's image processor, which also post-processes its outputs in evaluation.
        teacher_processing_class: the teacher's image processor; by default the student's pixels are shared.
        methods: instances of methods of your own, instead of ``args.method``.
        compute_metrics: by default COCO average precision, streamed.

    Raises:
        ValueError: at construction, where the pair, the labels or the settings can't work.
    """

    _tag_names = ("object-detection", "vision", "knowledge-distillation", "hf_detrkd")
    loss_is_scaled_for_ga = False  # our loss is a mean over its batch

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: DistillationConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class: BaseImageProcessor | None = None,
        teacher_processing_class: BaseImageProcessor | None = None,
        methods: Sequence[DistillationMethod] | None = None,
        compute_metrics=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ):
        args = DistillationConfig(output_dir="tmp_trainer") if args is None else args
        if not isinstance(args, DistillationConfig):
            raise TypeError(
                f"`args` is a {type(args).__name__}; DistillationTrainer needs a DistillationConfig "
                "(it takes the same arguments): from hf_detrkd import DistillationConfig."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, which would mean nn.DataParallel; its replicas lose the teacher's "
                f"view. Start one process per GPU: accelerate launch --num_processes {args.n_gpu} ..."
            )
        student = load_detector(model)
        self.teacher = None
        if args.method != ["none"] or methods:
            self.teacher = self._load_teacher(teacher_model, args)
        check_classes(student, train_dataset, eval_dataset)

        self.label_map, classes = None, (None, None)
        if self.teacher is not None:
            self.label_map = LabelMap.between(self.teacher.config.id2label, student.config.id2label)
            classes = self.label_map.teacher_classes, self.label_map.student_classes
        self.teacher_adapter = None if self.teacher is None else adapter_for(self.teacher, classes=classes[0])
        adapter = adapter_for(student, classes=classes[1])
        if self.teacher is None:
            methods = []
        elif methods is None:
            methods = build_methods(args.method, args.method_config, adapter, self.teacher_adapter)
        wrapper = DistillationModel(
            student,
            adapter,
            methods,
            detection_weight=args.detection_weight,
            layer_supervision=args.layer_supervision,
        )

        if data_collator is None:
            if processing_class is None:
                raise ValueError(
                    "`processing_class` is missing: it turns images into the student's pixels and the student's outputs "
                    "into detections. Pass AutoImageProcessor.from_pretrained(<student>), or your own `data_collator`."
                )
            data_collator = DetectionCollator(
                processing_class, teacher_processing_class if self.teacher is not None else None
            )
        if compute_metrics is None and eval_dataset is not None:
            names = [student.config.id2label[i] for i in range(student.config.num_labels)]
            compute_metrics = StreamingCocoMetrics(names)
        super().__init__(
            model=wrapper,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(DistillationPrinter if args.disable_tqdm else DistillationProgress)

        if hasattr(train_dataset, "set_epoch"):
            self.add_callback(_SetEpoch(train_dataset))
        self.ema = ExponentialMovingAverage(student, args.ema_decay) if args.ema_decay else None
        if self.ema is not None:
            self.add_callback(_UpdateAverage(self.ema))
        self._window: dict[str, list[Tensor]] = defaultdict(list)
        if self.teacher is not None:
            self.teacher_digest = digest(self.teacher)  # while this process has all of it
            if args.shard_teacher:
                shard_teacher(self.teacher_adapter, args.device)
            self.teacher.to(self.args.device)
            if self.is_world_process_zero():
                logger.warning(self.label_map.table())
        if args.compile_models:
            for its in filter(None, (adapter, self.teacher_adapter)):
                its.compile()

    @property
    def student(self) -> PreTrainedModel:
        """The plain detector in training."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False).student

    # -- the teacher -------------------------------------------------------------------------------------------------

    @staticmethod
    def _load_teacher(teacher: PreTrainedModel | str | None, args: DistillationConfig) -> PreTrainedModel:
        teacher = args.teacher_model_name_or_path if teacher is None else teacher
        if teacher is None:
            raise ValueError(
                f"method {args.method} needs a teacher: pass `teacher_model` or `teacher_model_name_or_path`, "
                'or choose method="none".'
            )
        if isinstance(teacher, str):
            options = dict(args.teacher_model_init_kwargs or {})
            if args.teacher_model_revision is not None:
                options["revision"] = args.teacher_model_revision
            teacher = load_detector(teacher, **options)
        elif args.shard_teacher:
            teacher = copy.deepcopy(teacher)  # the one that was given stays whole
        return load_detector(teacher).eval().requires_grad_(False)

    def _teacher_view(self, inputs: dict[str, Any], attentions: bool):
        self.teacher.eval()
        with torch.no_grad(), self.accelerator.autocast():
            _, view = self.teacher_adapter.forward(inputs, attentions=attentions)
        return view

    # -- training ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One step: teacher's view, then everything trainable in the one wrapped forward."""
        teacher_inputs = {name.removeprefix("teacher_"): inputs[name] for name in inputs if name.startswith("teacher_")}
        inputs = {name: value for name, value in inputs.items() if not name.startswith("teacher_")}
        if not model.training:
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        wrapper = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        step = self.state.global_step
        scale = self.args.kd_scale(step, self.state.max_steps)
        options: dict[str, Any] = {}
        if self.teacher is not None and scale > 0:
            if not teacher_inputs:
                teacher_inputs = {name: value for name, value in inputs.items() if name != "labels"}
            attentions = any("teacher" in method.attentions for method in wrapper.methods.values())
            # The same numbers on every process, in every accumulation step, and after a resume.
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
            options = {
                "teacher_view": self._teacher_view(teacher_inputs, attentions),
                "kd_scale": scale,
                "generator": generator,
                "gradient_norms": self._measures_gradients(step),
            }
        outputs = model(**inputs, **options)
        self._record(outputs, scale)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _measures_gradients(self, step: int) -> bool:
        every = self.args.gradient_share_steps
        return every > 0 and (step < 3 or step % every == 0)

    def _record(self, outputs: Mapping[str, Any], scale: float) -> None:
        """Keeps this step's parts until the next log, on the device: no synchronisation per step."""
        self._window["detection_loss"].append(outputs["detection_loss"])
        if self.teacher is None:
            return
        for name, value in outputs["terms"].items():
            self._window[f"kd_{name}"].append(value)
        self._window["kd_scale"].append(torch.tensor(scale, device=self.args.device))
        norms = outputs.get("gradient_norms")
        if norms is not None:
            total = norms["detection"] + norms["kd"]
            for name, norm in norms.items():
                if name != "detection":
                    self._window[f"gradient_share_{name}"].append(norm / total.clamp(min=torch.finfo(total.dtype).tiny))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the losses' parts since the last log, over all processes."""
        if "loss" in logs and self._window:
            names = sorted(self._window)
            means = torch.stack([torch.stack(self._window[name]).float().mean() for name in names])
            means = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update({name: round(value, 6) for name, value in zip(names, means, strict=True)})
            self._window.clear()
        super().log(logs, start_time)

    def create_optimizer(self, model=None):
        """As Trainer's, with the backbone in groups of its own at ``backbone_lr_factor``."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        factor = self.args.backbone_lr_factor
        if factor == 1:
            return optimizer
        backbone = {id(parameter) for parameter in self.model.adapter.feature_module.parameters()}
        for group in list(optimizer.param_groups):
            inside = [parameter for parameter in group["params"] if id(parameter) in backbone]
            if inside:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in backbone]
                optimizer.add_param_group({**group, "params": inside, "lr": group["lr"] * factor})
        return optimizer

    def train(self, *args, **kwargs):
        """As Trainer's; afterwards the student in memory is the one that was evaluated: the moving average."""
        result = super().train(*args, **kwargs)
        if self.ema is not None:
            self.ema.copy_to_model()
        return result

    # -- evaluation --------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset=None):
        """As Trainer's, whose cache for persistent workers would give one data set's loader for any other."""
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        cache = self.__dict__.pop("_eval_dataloaders", None)
        loader = super().get_eval_dataloader(eval_dataset)
        self.__dict__.pop("_eval_dataloaders", None)
        if cache is not None:
            self._eval_dataloaders = cache
        return loader

    def evaluation_loop(self, *args, **kwargs):
        """Evaluates the moving average where there is one."""
        if isinstance(self.compute_metrics, StreamingCocoMetrics):
            self.compute_metrics.reset()  # an evaluation that was broken off leaves its images behind
        with ExitStack() as stack:
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Detections and references of a batch as padded tensors, which Trainer's own gathering handles right."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        loss = loss.detach().float().mean()
        if prediction_loss_only:
            return loss, None, None
        if self.processing_class is None:
            raise ValueError(
                "Evaluation needs `processing_class`, the student's image processor: it turns outputs into detections."
            )
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        sizes = torch.stack([label["orig_size"] for label in inputs["labels"]])
        results = self.processing_class.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        return loss, pack_detections(results), pack_references(inputs["labels"])

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The plain student (its moving average where there is one), and beside it what a resume needs."""
        if not self.args.should_save:  # transformers 5.24 comes here on every process
            return
        output_dir = output_dir or self.args.output_dir
        wrapper = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        state: dict[str, Any] = {"methods": wrapper.methods.state_dict()}
        if self.teacher is not None:
            state["teacher"] = {"digest": self.teacher_digest, "name_or_path": self.teacher.name_or_path}
        with ExitStack() as stack:
            if self.ema is not None:
                raw = {name: value.detach().clone() for name, value in wrapper.student.state_dict().items()}
                state |= {"student": raw, "ema_updates": self.ema.updates}
                stack.enter_context(self.ema.applied())
            self.model = wrapper.student  # Trainer saves what self.model is
            stack.callback(setattr, self, "model", wrapper)
            super()._save(output_dir)
        torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _load_student(self, folder: str) -> None:
        """Every tensor of a checkpoint. Not by `load_state_dict(file)`: files have legacy names, which it would skip."""
        wrapper = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        saved = type(wrapper.student).from_pretrained(folder)
        wrapper.student.load_state_dict(saved.state_dict())
        if self.ema is not None:
            self.ema.copy_from_model()
        wrapper.methods.load_state_dict(read_state(folder)["methods"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = read_state(resume_from_checkpoint)
        if (self.ema is not None) != ("student" in state):
            raise ValueError(
                f"{resume_from_checkpoint} was written {'with' if 'student' in state else 'without'} a moving average, "
                f"and this run has `ema_decay={self.args.ema_decay}`. Resume with the settings of the first run."
            )
        recorded = state.get("teacher")
        if (recorded is None) != (self.teacher is None):
            raise ValueError(
                f"{resume_from_checkpoint} was written {'without' if recorded is None else 'with'} a teacher. "
                "Resume with the method of the first run."
            )
        if recorded is not None and recorded["digest"] != self.teacher_digest:
            raise ValueError(
                f"The teacher's weights are not those of the run that wrote {resume_from_checkpoint} "
                f"(teacher {recorded['name_or_path']!r}). Resume with that teacher, or start a new run."
            )
        self._load_student(resume_from_checkpoint)
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
            self.student.load_state_dict(state["student"])

    def _load_best_model(self) -> None:
        logger.info(f"Loading best model from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        self._load_student(self.state.best_model_checkpoint)

    # -- the Hub -----------------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As Trainer's, with an error that says what to do; a repository of another kind of model is refused."""
        if self.is_world_process_zero():
            token, private = token or self.args.hub_token, self.args.hub_private_repo if private is None else private
            self.hub_model_id = open_repository(repository_of(self.args), token=token, private=private)
            self.push_in_progress = None

    def create_model_card(self, model_name: str | None = None, **metadata) -> None:
        """Writes ``README.md`` from what this trainer has measured; see `hf_detrkd.reporting.card`.

        Args:
            model_name: id on the Hub.
            metadata: ``license``, ``language``, ``base_model``, ``datasets``, ``tags``.
        """
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self._results(), model_name or self.hub_model_id, **metadata)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **metadata,
    ):
        """Saves the plain student, its image processor and a card, and pushes them. Always waits for the end.

        Raises:
            PushError: the student is on disk; the message has the command that pushes it again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(**metadata)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return push_folder(
            self.args.output_dir,
            self.hub_model_id or repository_of(self.args),
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            write=lambda name: self.create_model_card(**{**metadata, "model_name": name}),
        )

    def _results(self) -> dict[str, Any]:
        """What this trainer knows of what a command writes to ``results.json``."""
        wrapper = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        student = {
            "method": "+".join(wrapper.methods) or "none",
            "model_type": self.student.config.model_type,
            "parameters": self.student.num_parameters(),
            "steps": self.state.global_step,
        }
        for split, prefix in (("test", "test_"), ("validation", "eval_")):
            last = next((log for log in reversed(self.state.log_history) if f"{prefix}map" in log), {})
            student[split] = {
                name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)
            }
        teacher = None
        if self.teacher is not None:
            teacher = {"name_or_path": self.teacher.name_or_path, "parameters": self.teacher.num_parameters()}
        settings = {"DistillationConfig": self.args.to_dict()}
        return {"student": student, "teacher": teacher, "twin": None, "settings": settings, "versions": versions()}


def read_state(folder: str) -> dict[str, Any]:
    """What a checkpoint holds beside the plain student."""
    path = os.path.join(folder, STATE_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"{folder} has no {STATE_NAME}: it is no checkpoint of DistillationTrainer, or an unfinished one."
        )
    return torch.load(path, map_location="cpu", weights_only=True)


class _UpdateAverage(TrainerCallback):
    """After every optimiser step."""

    def __init__(self, ema: ExponentialMovingAverage):
        self.ema = ema

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.update()


class _SetEpoch(TrainerCallback):
    """Tells the data set the epoch before its loader starts. accelerate does so only for some samplers."""

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int((state.epoch or 0) + 1e-6))


def load_detector(model: PreTrainedModel | str, **options) -> PreTrainedModel:
    """A detector from a local folder or a Hub id, in float32 whatever the file has; a model passes through.

    Raises:
        ValueError: where its weights are in half precision, in which transformers' detection losses and several decoders fail.
    """
    if isinstance(model, str):
        model = AutoModelForObjectDetection.from_pretrained(model, **{"dtype": torch.float32, **options})
    if model.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"{model.name_or_path or type(model).__name__} has weights in {model.dtype}. Load it in float32 "
            "(from_pretrained(..., dtype=torch.float32)); bf16=True in the config then computes in bfloat16."
        )
    return model


def check_classes(student: PreTrainedModel, *datasets) -> None:
    """Refuses a data set whose class list is not the student's; data sets without ``id2label`` can't be checked."""
    for dataset in datasets:
        names = getattr(dataset, "id2label", None)
        if names is not None and dict(names) != dict(student.config.id2label):
            raise ValueError(
                f"The data set's classes {list(names.values())} are not the student's "
                f"{list(student.config.id2label.values())}. Build the student with id2label and label2id of the data set: "
                "from_pretrained(..., id2label=dataset.id2label, label2id=dataset.label2id, ignore_mismatched_sizes=True)."
            )


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and values of all tensors of a model."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if value.dim()
            else str(value.item()).encode()
        )
    return sha.hexdigest()
