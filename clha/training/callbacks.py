"""What watches a training run from outside."""

from typing import Any

from transformers import TrainerCallback

from clha.progress import Progress


class ReportProgress(TrainerCallback):
    """Tells a `Progress` about steps and metrics."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        note = "" if loss is None else f"loss {loss:.3f}"
        self._progress.update(state.global_step, state.max_steps, "steps", note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "train_runtime" not in numbers:
            self._progress.metrics(state.global_step, numbers)
