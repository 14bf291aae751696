"""A `Trainer` that evaluates detectors."""

from __future__ import annotations

import torch
from transformers import Trainer

from .streaming import StreamingCocoMetrics, pack_detections, pack_references


class StreamingTrainer(Trainer):
    """Evaluation as `StreamingCocoMetrics` takes it: detections, batch by batch.

    Needs ``batch_eval_metrics=True``, and the image processor as ``processing_class``.
    """

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
        """As Trainer's, from the first image on."""
        if isinstance(self.compute_metrics, StreamingCocoMetrics):
            self.compute_metrics.reset()  # an evaluation that was broken off leaves its images behind
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
