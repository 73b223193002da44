"""The trainer on a CUDA device does what it does on the CPU."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import distance, small_llama, timeless, trainer, weights

from clha.training.metrics import metric_rows
from clha.training.objectives import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-2),
        ({"gradient_checkpointing": True, "tokens_per_micro_batch": 300}, 1e-2),
        ({"bf16": True, "gradient_checkpointing": True}, 0.1),
        ({"torch_compile": True, "tokens_per_micro_batch": 300}, 1e-2),
        ({"bf16": True, "torch_compile": True, "gradient_checkpointing": True}, 0.1),
    ],
    ids=["float32", "checkpointing", "bf16", "compiled", "bf16 compiled"],
)
def test_a_step_on_cuda_is_that_of_the_cpu(tmp_path: Path, settings: dict[str, Any], tolerance: float):
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}  # SGD, so that the step shows the gradient itself
    on_cpu = trainer(tmp_path / "cpu", **step)
    on_cpu.train()
    made = trainer(tmp_path, use_cpu=False, **step, **settings)
    assert made.abilities.shares_prompts and made.args.device.type == "cuda"
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    start = weights(small_llama())
    assert distance(weights(made.model).cpu() - start, weights(on_cpu.model) - start) < tolerance
    assert math.isfinite(made.evaluate()["eval_loss"])


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-2), (True, 0.1)], ids=["float32", "bf16"])
def test_a_step_of_an_adapter_on_cuda_is_that_of_the_cpu(tmp_path: Path, bf16: bool, tolerance: float):
    steps = []
    for settings in ({}, {"use_cpu": False, "bf16": bf16}):
        model = small_llama(lora=True)
        adapter = [p for name, p in model.named_parameters() if "lora_" in name]
        for parameter in adapter:  # half of them are zero at first, and the others then get no gradient
            torch.nn.init.normal_(parameter, std=0.1)
        start = torch.cat([p.detach().flatten() for p in adapter])
        trainer(tmp_path, model=model, max_steps=1, optim="sgd", learning_rate=0.1, **settings).train()
        assert [p.requires_grad for p in adapter] == [True] * 8
        steps.append(torch.cat([p.detach().cpu().flatten() for p in adapter]) - start)
    assert distance(steps[1], steps[0]) < tolerance


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_its_metrics_on_cuda_are_those_of_the_cpu(tmp_path: Path, loss: str):
    """Those of the DPO family compare with log-probabilities that the same device has computed before training."""
    found = []
    for cpu in (True, False):
        made = trainer(tmp_path, loss=loss, max_steps=2, use_cpu=cpu)
        made.train()
        found.append(timeless([*metric_rows(made.state.log_history), made.evaluate()]))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-4)


def test_a_run_on_cuda_goes_on_from_its_checkpoint(tmp_path: Path):
    whole = trainer(tmp_path, use_cpu=False, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer(tmp_path, use_cpu=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert distance(weights(resumed.model), weights(whole.model)) < 1e-5
    assert [row["step"] for row in metric_rows(resumed.state.log_history)] == [1, 2, 3, 4]
