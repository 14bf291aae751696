"""`DistillationTrainer`: a `transformers.Trainer` whose training step has a teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from .callbacks import SetEpoch, StampSeconds, UpdateAverage
from .checkpoints import load_checkpoint, resume, training_state, write_state
from .config import DistillationConfig
from .data.collator import DetectionCollator, student_and_teacher_inputs
from .detectors import check_classes, digest, image_processor_beside, load_detector
from .ema import ExponentialMovingAverage
from .evaluation.streaming import StreamingCocoMetrics
from .evaluation.trainer import StreamingTrainer
from .families import adapter_for
from .gradient_shares import NoticeIdleTerms, measured_in
from .labels import LabelMap
from .loss_parts import LossParts
from .methods import DistillationMethod, build_methods, settled
from .model import DistillationModel
from .progress import DistillationPrinter, DistillationProgress
from .publishing_trainer import PublishingTrainer
from .reporting.card import write_card
from .reporting.versions import versions
from .sharding import shard_teacher
from .sheets import DrawSheets

logger = logging.get_logger(__name__)


class DistillationTrainer(StreamingTrainer, PublishingTrainer):
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
        teacher_processing_class: the teacher's image processor; by default the one beside its checkpoint, loaded with what
            ``teacher_model_init_kwargs`` say of the place. Where there is none the teacher gets the student's pixels, with a
            warning where it is of another family or was loaded from somewhere. Not used with a ``data_collator``.
        methods: instances of methods of your own, instead of ``args.method``.
        compute_metrics: by default COCO average precision, streamed.

    Raises:
        ValueError: at construction, where the pair, the labels or the settings can't work.
    """

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
            args = settled(args, adapter, self.teacher_adapter)
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
            if self.teacher is None:
                teacher_processing_class = None
            elif teacher_processing_class is None:
                teacher_processing_class = self._teacher_image_processor(student, args)
            data_collator = DetectionCollator(processing_class, teacher_processing_class)
        if compute_metrics is None and eval_dataset is not None:
            names = [student.config.id2label[i] for i in range(student.config.num_labels)]
            names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]  # COCO's "N/A"
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
            self.add_callback(SetEpoch(train_dataset))
        self.ema = ExponentialMovingAverage(student, args.ema_decay) if args.ema_decay else None
        if self.ema is not None:
            self.add_callback(UpdateAverage(self.ema))
        if args.sheet_steps and args.sheet_images:
            self.add_callback(self._sheets(teacher_processing_class or processing_class))
        self.add_callback(StampSeconds())
        self.add_callback(NoticeIdleTerms(methods))
        self._parts = LossParts()
        self.teacher_digest = None
        if self.teacher is not None:
            self.teacher_digest = digest(self.teacher)  # while this process has all of it
            if args.shard_teacher:
                shard_teacher(self.teacher_adapter, args.device)
            self.teacher.to(self.args.device)
            if self.is_world_process_zero():
                logger.warning(self.label_map.table())
                self._name_untaught()
        if args.compile_models:
            for its in filter(None, (adapter, self.teacher_adapter)):
                its.compile()

    @property
    def student(self) -> PreTrainedModel:
        """The plain detector in training."""
        return self._wrapper().student

    def _wrapper(self) -> DistillationModel:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _name_untaught(self) -> None:
        """Warns of the student's classes that no loss is about."""
        untaught = set(range(len(self.label_map.student_names))) - set(self.label_map.student_classes)
        if untaught and self.args.detection_weight == 0:
            names = ", ".join(self.label_map.student_names[index] for index in sorted(untaught))
            logger.warning(
                f"`detection_weight` is 0 and the teacher doesn't know {len(untaught)} of the student's classes, so nothing teaches "
                f"them: {names}. Give the task loss a weight, or the student these classes no more."
            )

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
            teacher = load_detector(teacher, **_teacher_options(args))
        elif args.shard_teacher:
            teacher = copy.deepcopy(teacher)  # the one that was given stays whole
        return load_detector(teacher).eval().requires_grad_(False)

    def _teacher_image_processor(self, student: PreTrainedModel, args: DistillationConfig) -> BaseImageProcessor | None:
        """The one beside the teacher; None, where there is none, for the student's."""
        try:
            return image_processor_beside(self.teacher, **_teacher_options(args))
        except OSError as error:
            other = self.teacher.config.model_type != student.config.model_type
            if args.process_index == 0 and (other or self.teacher.name_or_path):
                logger.warning(
                    f"The teacher gets the student's pixels, which may be of another size or normalisation than its own. {error} "
                    "Pass its image processor as `teacher_processing_class`."
                )
            return None

    def _teacher_view(self, inputs: dict[str, Any], attentions: bool):
        self.teacher.eval()
        with torch.no_grad(), self.accelerator.autocast():
            _, view = self.teacher_adapter.forward(inputs, attentions=attentions)
        return view

    # -- training ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One step: teacher's view, then everything trainable in the one wrapped forward."""
        inputs, teacher_inputs = student_and_teacher_inputs(inputs)
        if not model.training:
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        wrapper = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        step = self.state.global_step
        scale = self.args.kd_scale(step, self.state.max_steps)
        options: dict[str, Any] = {}
        if self.teacher is not None and scale > 0:
            attentions = any("teacher" in method.attentions for method in wrapper.methods.values())
            # The same numbers on every process, in every accumulation step, and after a resume.
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
            options = {
                "teacher_view": self._teacher_view(teacher_inputs, attentions),
                "kd_scale": scale,
                "generator": generator,
                "gradient_norms": measured_in(
                    step, self.state.max_steps, self.args.gradient_share_steps, self.args.kd_every
                ),
            }
        outputs = model(**inputs, **options)
        self._parts.add(outputs, None if self.teacher is None else scale)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the losses' parts since the last log, over all processes."""
        if "loss" in logs or "train_runtime" in logs:  # at the end, what came after the last log
            logs.update(self._parts.means(self.accelerator))
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
        if self.model_wrapped is self.model:
            # accelerate takes a model that `evaluate` has prepared for one in DDP: the processes would train apart
            self.model._is_accelerate_prepared = False
        result = super().train(*args, **kwargs)
        self._take_buffers_of_process_zero()
        if self.ema is not None:
            self.ema.copy_to_model()
        return result

    def _run_epoch(self, *args, **kwargs) -> None:
        """As Trainer's, which takes a step before it looks at the limit: none where a resumed run is at its end already."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args, **kwargs):
        """Evaluates the moving average where there is one."""
        self._take_buffers_of_process_zero()
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def _take_buffers_of_process_zero(self) -> None:
        """Batch norms have the running statistics of their own process's last batch, and process 0's are saved."""
        if self.args.world_size == 1:
            return
        for name, value in self.student.named_buffers():
            if value.is_floating_point():
                for its in (value,) if self.ema is None else (value, self.ema.average[name]):
                    distributed.broadcast(its, src=0)

    def _averaged(self) -> AbstractContextManager:
        """The student has the averaged weights inside, where there is an average."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def _sheets(self, teacher_processing_class: BaseImageProcessor | None) -> DrawSheets:
        if getattr(self.eval_dataset, "id2label", None) is None or self.processing_class is None:
            raise ValueError(
                f"`sheet_steps` is {self.args.sheet_steps}, but sheets are drawn on a DetectionDataset, with the student's image "
                f"processor: `eval_dataset` is a {type(self.eval_dataset).__name__} and `processing_class` a "
                f"{type(self.processing_class).__name__}. Pass both, or set sheet_steps=0."
            )
        return DrawSheets(
            self.eval_dataset,
            (self.student, self.processing_class),
            {} if self.teacher is None else {"teacher": (self.teacher, teacher_processing_class)},
            every=self.args.sheet_steps,
            number=self.args.sheet_images,
            averaged=self._averaged,
            trackers=self.callback_handler.callbacks,
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The plain student (its moving average where there is one), and beside it what a resume needs."""
        if not self.args.should_save:  # transformers 5.24 comes here on every process
            return
        output_dir = output_dir or self.args.output_dir
        wrapper = self._wrapper()
        state = training_state(wrapper, self.ema, self.teacher, self.teacher_digest)
        with self._averaged(), ExitStack() as stack:
            self.model = wrapper.student  # Trainer saves what self.model is
            stack.callback(setattr, self, "model", wrapper)
            # transformers 5.24 would write on process 0 alone, whatever `save_on_each_node` says; who comes here is to write
            wrapper.student.should_save_on_this_rank = bool
            stack.callback(delattr, wrapper.student, "should_save_on_this_rank")
            super()._save(output_dir)
        write_state(state, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        resume(resume_from_checkpoint, self._wrapper(), self.ema, self.teacher_digest)

    def _load_best_model(self) -> None:
        logger.info(f"Loading best model from {self.state.best_model_checkpoint} (score: {self.state.best_metric}).")
        load_checkpoint(self.state.best_model_checkpoint, self._wrapper(), self.ema)

    # -- the Hub -----------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        model_name: str | None = None,
        *,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset=None,
        dataset_args=None,
        tasks=None,
        **metadata,
    ) -> None:
        """Writes ``README.md`` from what this trainer has measured; see `hf_detrkd.reporting.card`.

        Args:
            model_name: id on the Hub.
            finetuned_from, dataset_tags: as with Trainer; the metadata's ``base_model`` and ``datasets``.
            dataset, dataset_args, tasks: as with Trainer; not used, as the card says what was measured.
            metadata: ``license``, ``language``, ``base_model``, ``datasets``, ``tags``.
        """
        metadata = {"base_model": finetuned_from, "datasets": dataset_tags, **metadata}
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self._results(), model_name or self.hub_model_id, **metadata)

    def _results(self) -> dict[str, Any]:
        """What this trainer knows of what a command writes to ``results.json``."""
        wrapper = self._wrapper()
        student = {
            "method": "+".join(wrapper.methods) or "none",
            "model_type": self.student.config.model_type,
            "parameters": self.student.num_parameters(),
            "steps": self.state.global_step,
        }
        for split, prefix in (("test", "test_"), ("validation", "eval_")):
            its = self._measured(f"{prefix}map")
            student[split] = {
                name.removeprefix(prefix): value for name, value in its.items() if name.startswith(prefix)
            }
        teacher = None
        if self.teacher is not None:
            teacher = {"name_or_path": self.teacher.name_or_path, "parameters": self.teacher.num_parameters()}
        settings = {"DistillationConfig": self.args.to_dict()}
        return {"student": student, "teacher": teacher, "twin": None, "settings": settings, "versions": versions()}

    def _measured(self, metric: str) -> dict[str, float]:
        """The last log with a metric, as far as it is of the student in memory: `load_best_model_at_end` brings back an earlier one."""
        history = self.state.log_history
        ended = next((place for place in reversed(range(len(history))) if "train_runtime" in history[place]), None)
        logs = [log for log in history if metric in log]
        if ended is not None and self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            best = [log for log in history[:ended] if log["step"] == self.state.best_global_step]
            logs = [log for log in (*best, *history[ended:]) if metric in log]
        return logs[-1] if logs else {}


def _teacher_options(args: DistillationConfig) -> dict[str, Any]:
    """For the teacher's `from_pretrained`."""
    revision = {} if args.teacher_model_revision is None else {"revision": args.teacher_model_revision}
    return {**(args.teacher_model_init_kwargs or {}), **revision}
