"""A run that was killed goes on from its last whole checkpoint to the same weights and the same metrics."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Prompts, small_llama, timeless, trainer, weights
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback

from clha.training import saving
from clha.training.checkpoints import is_complete, last_checkpoint
from clha.training.metrics import metric_rows
from clha.training.trainer import ClhaTrainer

HERE = Path(__file__).parent


class KillAt(TrainerCallback):
    """SIGKILL in the middle of a step's end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            kill_this_process()


RESUMABLE = {
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 3,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def killed_run(folder: Path, how: str) -> str | None:
    """Train in a process of its own that `how` kills; returns the name of its last whole checkpoint."""
    code = (
        "import sys; from pathlib import Path; from training_cases import *; from test_resume import *\n"
        f"made = trainer(Path(sys.argv[1]), **RESUMABLE); {how}; made.train()"
    )
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    script = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    killed = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    found = last_checkpoint(folder, print)
    return found.name if found else None


def assert_goes_on(tmp_path: Path, checkpoint: str | None) -> None:
    """The run resumed from its checkpoint has the weights, bit for bit, and the metrics of one that was not killed."""
    resumed = trainer(tmp_path / "run", **RESUMABLE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / checkpoint) if checkpoint else None)
    whole = trainer(tmp_path / "whole", **RESUMABLE)
    whole.train()
    assert torch.equal(weights(resumed.model), weights(whole.model))
    rows, want = metric_rows(resumed.state.log_history), metric_rows(whole.state.log_history)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert timeless(rows) == timeless(want)


@pytest.mark.parametrize("killed_at", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 8))])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit_and_the_same_metrics(tmp_path: Path, killed_at: int):
    checkpoint = killed_run(tmp_path / "run", f"made.add_callback(KillAt({killed_at}))")
    assert checkpoint == {2: None, 4: "checkpoint-3", 8: "checkpoint-6"}[killed_at]
    assert_goes_on(tmp_path, checkpoint)


@pytest.mark.parametrize(
    "how",
    ["kill_when_weights_are_written(made, 6)", pytest.param("kill_before_the_list(made, 6)", marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tmp_path: Path, how: str):
    checkpoint = killed_run(tmp_path / "run", how)
    assert checkpoint == "checkpoint-3" and (tmp_path / "run" / "checkpoint-6" / "model.safetensors").is_file()
    assert_goes_on(tmp_path, checkpoint)


def kill_when_weights_are_written(made: Any, step: int) -> None:
    """SIGKILL after the weights of a checkpoint, before its optimizer."""
    save = made._save_optimizer_and_scheduler
    made._save_optimizer_and_scheduler = lambda folder: (
        save(folder) if made.state.global_step < step else kill_this_process()
    )


def kill_before_the_list(made: Any, step: int) -> None:
    """SIGKILL when all files of a checkpoint are there but the list of them."""
    mark = saving.mark_complete
    saving.mark_complete = lambda folder: mark(folder) if made.state.global_step < step else kill_this_process()


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_that_was_killed_after_its_last_step_is_over(tmp_path: Path):
    """Nine steps of the sixteen that two epochs have, at a constant rate; checkpoint-9 holds all of them."""
    settings = RESUMABLE | {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = trainer(tmp_path, **settings)
    whole.train()
    resumed = trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.state.global_step == 9
    assert torch.equal(weights(resumed.model), weights(whole.model))
    rows, want = metric_rows(resumed.state.log_history), metric_rows(whole.state.log_history)
    assert timeless(rows) == timeless(want) and rows[-1]["step"] == 9
    longer = trainer(tmp_path, **(settings | {"max_steps": 11}))
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert longer.state.global_step == 11, "who asks for more steps gets them"


@pytest.mark.parametrize("on_start", [False, True])
def test_a_run_that_was_killed_after_an_early_stop_is_over(tmp_path: Path, on_start: bool):
    """Learning nothing, no evaluation is better than the first: two more, and training ends after step 3."""
    settings = {
        "max_steps": 8,
        "learning_rate": 1e-12,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/accuracies",
        "eval_on_start": on_start,
    }

    def made() -> ClhaTrainer:
        one = trainer(tmp_path, **settings)
        one.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
        return one

    whole = made()
    whole.train()
    rows = timeless(metric_rows(whole.state.log_history))
    assert [row["step"] for row in rows] == [0, 1, 2, 3][not on_start :]
    for step in (2, 3):
        resumed = made()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert timeless(metric_rows(resumed.state.log_history)) == rows, step
        assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_resumed_in_the_second_epoch_goes_on_bit_for_bit_with_dropout_and_accumulation(tmp_path: Path, step: int):
    """Ten prompts, two at once, two of those a step: three steps an epoch. After 3 the second begins, 4 is within."""
    settings = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "data": Prompts(10),
    }

    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**small_llama().config.to_diff_dict(), "attention_dropout": 0.2}))

    whole = trainer(tmp_path, model=model(), **settings)
    whole.train()
    want, steps = metric_rows(whole.state.log_history), list(range(1, 8))
    resumed = trainer(tmp_path, model=model(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    rows = metric_rows(resumed.state.log_history)
    assert [row["step"] for row in rows] == steps and timeless(rows) == timeless(want)
    plain = trainer(tmp_path / "plain", **settings)
    plain.train()
    assert not torch.equal(weights(plain.model), weights(whole.model)), "nothing was dropped"


def test_a_half_written_checkpoint_is_recognised_and_the_one_before_is_taken(tmp_path: Path):
    trainer(tmp_path, **RESUMABLE).train()
    assert all(is_complete(p) for p in tmp_path.glob("checkpoint-*"))
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"half")
    said: list[str] = []
    found = last_checkpoint(tmp_path, said.append)
    assert found is not None and found.name == "checkpoint-6"
    assert said == ["checkpoint-9 is half-written; the one before it is taken"]
    (tmp_path / "checkpoint-6" / "complete.json").unlink()
    found = last_checkpoint(tmp_path, said.append)
    assert found is not None and found.name == "checkpoint-3"
    assert said[1:] == [said[0], "checkpoint-6 is half-written or another trainer's; the one before it is taken"]
    assert (tmp_path / "checkpoint-9").is_dir() and (tmp_path / "checkpoint-6").is_dir()
