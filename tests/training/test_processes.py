"""Several processes, with copied and with sharded weights: the same as one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Prompts, distance, small_llama, timeless, trainer, two_responses, weights

from clha.training.checkpoints import is_complete
from clha.training.metrics import metric_rows
from clha.training.objectives import LOSSES
from clha.training.trainer import ClhaTrainer

HERE = Path(__file__).parent


def run_in_two_processes(
    folder: Path, cases: dict[str, dict[str, Any]], expect: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        + [str(HERE / "two_processes.py"), str(folder), json.dumps(cases)],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode == 0) == (expect == 0), done.stdout[-3000:] + done.stderr[-3000:]
    return done


def came_out(folder: Path, name: str) -> tuple[torch.Tensor, list[dict], dict, dict]:
    """Weights, rows of metrics, evaluations and facts of a case."""
    texts = (json.loads((folder / name / f"{file}.json").read_text()) for file in ("rows", "evaluated", "facts"))
    return torch.load(folder / name / "weights.pt", weights_only=True), *texts  # type: ignore[return-value]


def in_one_process(folder: Path, *, tied: bool = False, lora: bool = False, **case: Any) -> ClhaTrainer:
    """A case of `two_processes.py` as one process trains it: eight prompts a step, twice 13 of them."""
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "max_steps": -1, **case}
    data, held_out = Prompts(13, reference=True), Prompts(7, 1, reference=True)
    made = trainer(folder, model=small_llama(tied=tied, lora=lora), data=data, evaluation=held_out, **settings)
    made.train()
    return made


def assert_the_same(folder: Path, name: str, one: ClhaTrainer) -> None:
    """Two processes ended where one did: weights to 1e-5, what they measured to 1e-4."""
    two, rows, evaluated, _ = came_out(folder, name)
    assert distance(two, weights(one.model)) < 1e-5, name
    for ours, theirs in zip(rows, metric_rows(one.state.log_history), strict=True):
        for key in ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "num_tokens", "noise/kept_fraction"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)
    assert evaluated["eval_loss"] == pytest.approx(one.evaluate()["eval_loss"], rel=1e-4)
    assert evaluated["few"] == pytest.approx(one.evaluate(two_responses(5))["eval_loss"], rel=1e-4)


BUDGET = {"tokens_per_micro_batch": 80, "per_device_eval_batch_size": 2}
SHARDED = {**BUDGET, "fsdp": True, "fsdp_config": {"version": 2}}


def sharded_over_two(facts: dict, dtype: str = "torch.float32") -> bool:
    """Whether each weight was cut in two; a dimension of 99 has halves of 50 and 49."""
    return facts["sharded"] and facts["kinds"] == [f"DTensor {dtype}"] and 0.49 <= facts["held"] <= 0.51


def test_two_processes_take_the_same_steps_as_one_with_copied_and_with_sharded_weights(tmp_path: Path):
    """13 prompts, 8 a step: the second step has 5, dealt 2 and 3; token budgets differ between the processes.

    Of five held-out prompts, two at once, the second process has none left in the last round; they have two responses
    where those to train on have up to four.
    """
    assert len(Prompts(13)[0]) > 2, "the case of the second process without a prompt shows nothing"
    run_in_two_processes(tmp_path, {"copied": BUDGET, "sharded": SHARDED})
    one = in_one_process(tmp_path / "one", **BUDGET)
    copied, sharded = (came_out(tmp_path, name)[3] for name in ("copied", "sharded"))
    assert copied["held"] == 1 and not copied["sharded"] and sharded_over_two(sharded)
    for name in ("copied", "sharded"):
        assert_the_same(tmp_path, name, one)


@pytest.mark.slow
def test_every_loss_is_the_same_in_two_processes_copied_and_sharded(tmp_path: Path):
    losses = {loss: {"loss": loss} for loss in LOSSES if loss != "clha"}
    losses["dpo_robust"]["label_smoothing"] = losses["dpo_smoothed"]["label_smoothing"] = 0.1  # type: ignore[assignment]
    cases = {f"copied-{loss}": {**BUDGET, **case} for loss, case in losses.items()}
    cases |= {f"sharded-{loss}": {**SHARDED, **case} for loss, case in losses.items()}
    run_in_two_processes(tmp_path, cases)
    for loss, case in losses.items():
        one = in_one_process(tmp_path / f"one-{loss}", **BUDGET, **case)
        assert sharded_over_two(came_out(tmp_path, f"sharded-{loss}")[3])
        for how in ("copied", "sharded"):
            assert_the_same(tmp_path, f"{how}-{loss}", one)


@pytest.mark.slow
def test_sharded_too_weights_may_be_tied_adapters_train_alone_and_activations_are_computed_again(tmp_path: Path):
    cases: dict[str, dict[str, Any]] = {
        "tied": {"tied": True},
        "adapter": {"lora": True},
        "again": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    run_in_two_processes(tmp_path, {name: {**SHARDED, **case} for name, case in cases.items()})
    for name, case in cases.items():
        assert sharded_over_two(came_out(tmp_path, name)[3]), name
        whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        assert_the_same(tmp_path, name, in_one_process(tmp_path / f"one-{name}", **BUDGET, **(case | whole)))


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint_and_loads_its_best_weights(tmp_path: Path):
    """Four steps; from the second on again, and once more when all is done. Then the weights of the first evaluation:
    on other made-up prompts the loss only rises."""
    saves = {**SHARDED, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_steps": 1}
    cases = {
        "whole": saves,
        "again": {**saves, "resume": "whole/checkpoint-2"},
        "over": {**saves, "resume": "whole/checkpoint-4"},
        "best": {**saves, **best},
        "adapter": {**saves, "lora": True},
        "adapter-again": {**saves, "lora": True, "resume": "adapter/checkpoint-2"},
    }
    run_in_two_processes(tmp_path, cases)
    assert all(is_complete(tmp_path / "whole" / f"checkpoint-{step}") for step in (2, 4))
    for name, other in (("again", "whole"), ("over", "whole"), ("adapter-again", "adapter")):
        ours, theirs = came_out(tmp_path, name), came_out(tmp_path, other)
        assert torch.equal(ours[0], theirs[0]), name
        assert timeless(ours[1]) == timeless(theirs[1]) and [row["step"] for row in ours[1]] == [1, 2, 3, 4], name
        assert sharded_over_two(ours[3]), name
    _, rows, evaluated, _ = came_out(tmp_path, "best")
    measured = [row["eval_loss"] for row in rows]
    assert min(measured) < measured[-1], "the case shows nothing"
    assert evaluated["eval_loss"] == pytest.approx(min(measured), rel=1e-6)


@pytest.mark.slow
def test_in_bfloat16_sharded_weights_stay_float32_and_so_do_log_probabilities(tmp_path: Path):
    """At a small rate the losses of four steps are those of one process to 2 %, and not those of float32."""
    settings = {"bf16": True, "learning_rate": 1e-4}
    run_in_two_processes(tmp_path, {"copied": {**BUDGET, **settings}, "sharded": {**SHARDED, **settings}})
    one = in_one_process(tmp_path / "one", **BUDGET, **settings)
    exact = in_one_process(tmp_path / "exact", **BUDGET, learning_rate=1e-4)
    untrained = trainer(tmp_path / "untrained", bf16=True, **BUDGET).evaluate(Prompts(7, 1, reference=True))[
        "eval_loss"
    ]
    losses = [[row["loss"] for row in metric_rows(made.state.log_history)] for made in (one, exact)]
    for name in ("copied", "sharded"):
        _, rows, evaluated, facts = came_out(tmp_path, name)
        assert facts["logps"] == ["torch.float32"] and not facts["rounded"], name
        got = [row["loss"] for row in rows]
        assert got == pytest.approx(losses[0], rel=0.02) and got != losses[1], name
        assert evaluated["before"] == pytest.approx(untrained, rel=1e-4), name
    assert sharded_over_two(came_out(tmp_path, "sharded")[3])


@pytest.mark.slow
def test_a_step_with_a_prompt_for_the_second_process_alone_has_the_same_columns(tmp_path: Path):
    """Nine prompts, 8 a step: of the second step the first process, which writes the table, has none."""
    run_in_two_processes(tmp_path, {"nine": {**BUDGET, "prompts": 9}})
    _, rows, _, _ = came_out(tmp_path, "nine")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    trained_on = [{name for name in row if not name.startswith("eval_")} for row in rows]
    assert all(names == trained_on[0] for names in trained_on)
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss/contrastive"] + row["loss/sft"], rel=1e-5)


@pytest.mark.slow
def test_an_infinite_gradient_names_the_prompts_of_all_processes(tmp_path: Path):
    """Eight prompts in one step, four in each process."""
    done = run_in_two_processes(tmp_path, {"eight": {**BUDGET, "prompts": 8, "trouble": "infinite"}}, expect=1)
    lines = [line for line in done.stderr.splitlines() if "the gradient norm is" in line]
    named = {line.partition("prompts ")[2].partition(";")[0] for line in lines}
    assert len(named) == 1
    assert sorted(named.pop().split(", ")) == sorted(p.prompt_id for p in Prompts(8).items)


@pytest.mark.slow
def test_a_weight_that_one_process_spoilt_in_the_last_step_is_saved_by_none(tmp_path: Path):
    """13 prompts, 8 a step, twice: four steps."""
    done = run_in_two_processes(tmp_path, {"spoilt": {**SHARDED, "trouble": "spoil"}}, expect=1)
    assert "a weight is inf in step 4; prompts " in done.stderr
    assert not (tmp_path / "spoilt" / "saved").exists()


@pytest.mark.parametrize("how", [BUDGET, pytest.param(SHARDED, marks=pytest.mark.slow)], ids=["copied", "sharded"])
def test_a_killed_rank_ends_the_run_with_one_line_that_says_so_and_nothing_hangs(tmp_path: Path, how: dict):
    done = run_in_two_processes(tmp_path, {"killed": {**how, "trouble": "kill"}}, expect=1)
    said = [line for line in done.stderr.splitlines() if "SIGKILL) received by PID" in line]
    assert len(said) == 1, done.stderr[-3000:]
