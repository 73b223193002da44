"""The trainer: one step however it is cut, in any normalisation and precision, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import Prompts, config, distance, small_llama, trainer, weights

from clha.errors import UserError
from clha.training import policy
from clha.training.batches import pack
from clha.training.logprobs import sum_by_response
from clha.training.metrics import metric_rows
from clha.training.objectives import LOSSES, count, objective
from clha.training.trainer import ClhaTrainer

HERE = Path(__file__).parent


def trained(folder: Path, **settings) -> torch.Tensor:
    made = trainer(folder, **settings)
    made.train()
    return weights(made.model)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Weights after one step of eight prompts in one piece. SGD, so that the step shows the gradient itself."""
    return trained(tmp_path_factory.mktemp("whole"), max_steps=1, optim="sgd", learning_rate=0.1)


@pytest.mark.parametrize(
    "cut",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"tokens_per_micro_batch": 60},
        {"tokens_per_micro_batch": 1},
        {"share_prompts": False},
        {"logits_megabytes": 0},
        {"gradient_checkpointing": True},
    ],
    ids=lambda cut: ", ".join(f"{k}={v}" for k, v in cut.items()),
)
def test_a_step_is_the_same_however_the_batch_is_cut(tmp_path: Path, one_step: torch.Tensor, cut: dict):
    got = trained(tmp_path, max_steps=1, optim="sgd", learning_rate=0.1, **cut)
    start = weights(small_llama())
    assert distance(got, one_step) < 1e-5
    assert distance(got - start, one_step - start) < 1e-4


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "clha"])
def test_a_step_of_every_loss_is_the_same_however_the_batch_is_cut(tmp_path: Path, loss: str):
    """Eight prompts: in one piece, and as four times two within 60 tokens."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "loss": loss, "data": Prompts(30, reference=True)}
    settings["label_smoothing"] = 0.1 if loss in ("dpo_smoothed", "dpo_robust") else 0.0
    one = trained(tmp_path, **settings)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "tokens_per_micro_batch": 60}
    got = trained(tmp_path, **settings, **cut)
    start = weights(small_llama())
    assert distance(got, one) < 1e-5
    assert distance(got - start, one - start) < 1e-4


def test_reference_normalisation_is_per_micro_batch_and_does_depend_on_the_cut(tmp_path: Path, one_step: torch.Tensor):
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "normalization": "reference"}
    assert distance(trained(tmp_path, **settings), one_step) < 1e-6
    cut = trained(tmp_path, **settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert distance(cut, one_step) > 1e-4


def test_reference_normalisation_is_the_mean_of_the_micro_batches_own_losses(tmp_path: Path):
    """Four micro-batches of two: w - 0.1 * the mean of the gradients of their losses, each taken by itself."""
    from clha.training.loader import PromptSampler

    cut = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
    }
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "normalization": "reference", **cut}
    made = trainer(tmp_path, **settings)
    made.train()

    model, data = small_llama(), Prompts(30)
    start = weights(model)
    policy.attach(model)
    for indices in list(PromptSampler.of(made.args, len(data)))[:4]:
        prompts = [data[i] for i in indices]
        batch = pack(prompts)
        sums = sum_by_response(policy.response_logps(model, batch), batch.target_cell, *batch.candidate_mask.shape)
        parts = objective(sums, batch, count(prompts, data.max_candidates), **made.args.objective_settings())
        (parts["total"] / 4).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(weights(made.model) - start, -0.1 * gradient) < 1e-4
    (row,) = metric_rows(made.state.log_history)
    assert row["loss"] == pytest.approx(row["loss/contrastive"] + row["loss/sft"], rel=1e-5)


def test_reference_normalisation_meets_the_goldens(shared: Path):
    """The objective over one golden case as a micro-batch: mask by the gap rule, lambda by the sign."""
    cases = json.loads((shared / "golden" / "clha_loss.json").read_text())["cases"]
    for case in cases:
        rewards = np.array(case["rewards"])
        size, n = rewards.shape
        prompts = Prompts(size).items
        made = []
        for b in range(size):
            gap = np.abs(rewards[b][:, None] - rewards[b][None, :]) > case["margin"]
            index = case["sft_index"][b]
            made.append(
                type(prompts[b])(
                    f"golden-{b}",
                    np.arange(3),
                    [np.zeros(length, dtype=np.int32) for length in case["response_lengths"][b]],
                    rewards[b],
                    np.triu(gap, 1).astype(np.float32),
                    index,
                    float(rewards[b][index] > 0),
                )
            )
        settings = {"loss": "clha", "margin": case["margin"], "sft_weight": case["sft_weight"], "sft_by": "sum"}
        sums = torch.tensor(case["sum_logps"], dtype=torch.float64)
        parts = objective(sums, pack(made), count(made, n), beta=0.1, label_smoothing=0.0, **settings)
        assert float(parts["total"]) == pytest.approx(case["total"], abs=1e-6)


def golden_cases() -> list[dict[str, Any]]:
    path = HERE.parents[2] / "shared" / "golden" / "clha_loss.json"
    return json.loads(path.read_text())["cases"] if path.is_file() else []


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_a_step_of_the_trainer_with_reference_normalisation_has_the_goldens_loss_and_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
):
    """A golden case as the rows of a dataset that one micro-batch takes; the model's own forward alone is replaced.

    What is added to each log-probability sum is zero, and its gradient is d total / d sum.
    """
    from datasets import Dataset

    n, sums = len(case["rewards"][0]), torch.tensor(case["sum_logps"], dtype=torch.float64)
    added = torch.zeros_like(sums, requires_grad=True)

    def response_logps(model: Any, batch: Any) -> torch.Tensor:
        places = torch.tensor([int(name) for name in batch.prompt_ids])
        mean = (sums + added)[places].flatten() / batch.response_lengths.flatten()
        return mean[batch.target_cell]

    rows = [
        {"prompt_id": str(b), "prompt_token_ids": [1, 2], "response_token_ids": [[3] * length for length in lengths]}
        | {"rewards": case["rewards"][b], "sft_index": case["sft_index"][b]}
        for b, lengths in enumerate(case["response_lengths"])
    ]
    monkeypatch.setattr(policy, "response_logps", response_logps)
    settings = {"margin": case["margin"], "reward_gap": case["margin"], "sft_weight": case["sft_weight"]}
    settings |= {"per_device_train_batch_size": len(rows), "tokens_per_micro_batch": 100_000, "max_steps": 1}
    made = trainer(tmp_path, data=Dataset.from_list(rows), normalization="reference", **settings)
    assert made.train_dataset.max_candidates == n
    made.train()
    (row,) = metric_rows(made.state.log_history)
    assert row["loss/contrastive"] == pytest.approx(case["contrastive"], abs=1e-9)
    assert row["loss/sft"] == pytest.approx(case["sft"], abs=1e-9)
    assert row["loss"] == pytest.approx(case["total"], rel=1e-6)
    torch.testing.assert_close(added.grad, torch.tensor(case["grad_sum_logps"], dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_goldens_are_there(shared: Path):
    assert len(golden_cases()) == 7


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_on_the_same_prompts(tmp_path: Path, loss: str):
    made = trainer(tmp_path, data=Prompts(30, reference=True), evaluation=Prompts(7, 1, reference=True), loss=loss)
    made.train()
    rows = metric_rows(made.state.log_history)
    assert len(rows) == 4 and all(math.isfinite(row["loss"]) for row in rows)
    assert math.isfinite(made.evaluate()["eval_loss"])


def test_bf16_computes_in_bfloat16_over_float32_master_weights(tmp_path: Path):
    losses, seen = [], set()
    for bf16 in (False, True):
        made = trainer(tmp_path, max_steps=2, bf16=bf16)
        if bf16:
            made.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *given: seen.add(given[-1].dtype))
        made.train()
        losses.append([row["loss"] for row in metric_rows(made.state.log_history)])
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in made.optimizer.state.values()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_in_bfloat16_an_evaluation_before_training_computes_as_training_does(tmp_path: Path):
    """Policy and reference are one: the DPO loss is log 2, to what sums of float32 numbers are known to."""
    made = trainer(tmp_path, loss="dpo", bf16=True)
    assert made.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert made.evaluate()["eval_logps/chosen"] != trainer(tmp_path, loss="dpo").evaluate()["eval_logps/chosen"]


@pytest.mark.parametrize("setting", ["fp16", "fp16_full_eval", "bf16_full_eval"])
def test_what_would_end_in_an_infinite_gradient_or_change_the_evaluation_is_refused(tmp_path: Path, setting: str):
    with pytest.raises(ValueError, match="fp16.* not supported: .*; use bf16=True") as caught:
        config(tmp_path, **{setting: True})
    assert "\n" not in str(caught.value)


def test_compiled_blocks_on_a_cpu_without_a_compiler_are_refused_in_one_line(tmp_path: Path):
    from torch._inductor import config as inductor

    with (
        inductor.patch("cpp.cxx", ("no-such-compiler",)),
        pytest.raises(
            UserError, match=r"torch_compile: a CPU needs a C\+\+ compiler .*or leave torch_compile out"
        ) as caught,
    ):
        trainer(tmp_path, torch_compile=True)
    assert "\n" not in str(caught.value)


def test_the_first_form_of_sharding_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="fsdp_config version 1 is not supported: use 2"):
        config(tmp_path, fsdp=True, fsdp_config={"version": 1})


@pytest.mark.parametrize(
    "name", ["model_init", "data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"]
)
def test_what_the_trainer_would_leave_aside_is_refused_in_one_line(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=f"ClhaTrainer takes no {name}: ") as caught:
        ClhaTrainer(small_llama(), config(tmp_path), train_dataset=Prompts(4), **{name: lambda *_: None})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no predictions, only metrics; use evaluate"):
        trainer(tmp_path).predict(Prompts(4))


def test_an_epoch_shows_every_prompt_once_in_an_order_of_its_own(tmp_path: Path):
    from clha.training.loader import PromptSampler

    for processes in (1, 2, 3):
        samplers = [PromptSampler(23, 4, seed=5, process=p, processes=processes) for p in range(processes)]
        steps = [list(sampler) for sampler in samplers]
        assert {len(s) for s in steps} == {len(samplers[0])}
        assert sorted(i for s in steps for unit in s for i in unit) == list(range(23))
    for sampler in samplers:
        sampler.set_epoch(1)
    assert [list(sampler) for sampler in samplers] != steps


def test_where_batches_must_stay_whole_they_do_not_depend_on_the_processes():
    """Eleven prompts, batches of two: with two processes the last unit has three prompts, a full batch and one more."""
    from clha.training.loader import PromptSampler

    one = list(PromptSampler(11, 2, seed=5, whole=True))
    two = [list(PromptSampler(11, 2, seed=5, process=p, processes=2, whole=True)) for p in range(2)]
    assert [unit for step in zip(*two, strict=True) for unit in step] == one
    assert [len(unit) for unit in one] == [2, 2, 2, 2, 2, 1]
