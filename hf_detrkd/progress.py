"""What a run prints: a bar with ETA, and one readable line per log."""

from __future__ import annotations

from transformers.trainer_callback import ProgressCallback


class DistillationProgress(ProgressCallback):
    """Trainer's progress bar, with log lines that show the detection and the distillation parts."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if state.is_world_process_zero and line:
            if self.training_bar is not None:
                self.training_bar.write(line)
            else:
                print(line, flush=True)


class DistillationPrinter(DistillationProgress):
    """The lines without the bar (``disable_tqdm=True``)."""

    def on_train_begin(self, args, state, control, **kwargs):
        pass

    on_step_end = on_prediction_step = on_train_end = on_evaluate = on_predict = on_train_begin


def log_line(logs: dict[str, float], step: int, max_steps: int) -> str:
    """One line for a training log or an evaluation; empty for logs that need none."""
    if "loss" in logs:
        terms = [f"{name.removeprefix('kd_')} {value:.4g}" for name, value in logs.items() if name.startswith("kd_")]
        parts = [
            f"step {step}/{max_steps}",
            f"loss {logs['loss']:.4g}",
            f"detection {logs.get('detection_loss', logs['loss']):.4g}",
        ]
        if terms:
            parts.append("kd: " + "  ".join(terms))
        if "gradient_share_kd" in logs:
            parts.append(f"kd share of gradient {100 * logs['gradient_share_kd']:.0f} %")
        if "grad_norm" in logs:
            parts.append(f"grad {float(logs['grad_norm']):.3g}")
        return " | ".join([*parts, f"lr {logs.get('learning_rate', 0):.2g}"])
    if "eval_map" in logs:
        names = (("AP", "eval_map"), ("AP50", "eval_map_50"), ("AP75", "eval_map_75"))
        parts = [f"step {step}/{max_steps}", "evaluation"]
        parts.append("  ".join(f"{name} {100 * logs[key]:.1f}" for name, key in names if key in logs))
        if "eval_loss" in logs:
            parts.append(f"loss {logs['eval_loss']:.4g}")
        return " | ".join(parts)
    return ""
