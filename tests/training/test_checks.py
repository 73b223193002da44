"""What stops a training run: losses, gradients and weights that are not finite, and candidates of another policy."""

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from training_cases import Prompts, small_llama, trainer, weights
from transformers import TrainerCallback

from clha.errors import StageFailure, UserError
from clha.training import checks, policy
from clha.training.batches import pack


def test_a_nan_loss_stops_with_step_prompts_and_last_good_checkpoint(tmp_path: Path):
    data = Prompts(8)
    made = trainer(tmp_path, data=data, save_strategy="steps", save_steps=1, per_device_train_batch_size=4)

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    next(model.parameters())[:] = math.nan

    made.add_callback(Break())
    with pytest.raises(StageFailure, match=r"the loss is nan in step 3; prompts prompt-0-.*checkpoint-2"):
        made.train()
    assert not (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_an_update_spoilt_never_become_a_checkpoint(tmp_path: Path, value: float):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)

    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[5, 3] = value

    made.add_callback(Spoil())
    with pytest.raises(
        StageFailure, match=rf"a weight is {'nan' if math.isnan(value) else 'inf'} in step 2; .*: checkpoint-1;"
    ):
        made.train()
    assert not (tmp_path / "checkpoint-2").exists()


class SpoilTheLastStep(TrainerCallback):
    """An infinite value in a weight that is trained, after the only step."""

    def on_optimizer_step(self, args, state, control, model=None, **_):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[3] = math.inf


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "an adapter"])
def test_weights_that_the_last_step_spoilt_are_not_saved_over_good_ones(tmp_path: Path, lora: bool):
    made = trainer(tmp_path / "out", model=small_llama(lora=lora), max_steps=1)
    made.save_model(str(tmp_path / "saved"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    made.add_callback(SpoilTheLastStep())
    made.train()
    with pytest.raises(StageFailure, match=r"a weight is inf in step 1; prompts prompt-0-.*last good checkpoint: none"):
        made.save_model(str(tmp_path / "saved"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


def test_weights_are_looked_at_once_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looked, look = [], checks.largest_weights
    monkeypatch.setattr(checks, "largest_weights", lambda model: looked.append(model) or look(model))
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model()
    assert len(looked) == 3


def test_an_infinite_gradient_stops_before_the_weights_change(tmp_path: Path):
    model = small_llama()
    before = weights(model)
    model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    made = trainer(tmp_path, model=model)
    with pytest.raises(StageFailure, match="the gradient norm is .* in step 1"):
        made.train()
    assert torch.equal(weights(model), before)


def test_an_infinite_gradient_names_all_prompts_of_the_step(tmp_path: Path):
    """Eight prompts in four pieces; the second alone is to blame, which the sum of gradients does not tell."""
    model, passes = small_llama(), []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        passes.append(grad)
        return grad * (math.inf if len(passes) == 2 else 1.0)

    model.model.norm.weight.register_hook(spoil)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    made = trainer(tmp_path, model=model, data=Prompts(8), **cut)
    with pytest.raises(StageFailure, match="the gradient norm is .* in step 1") as caught:
        made.train()
    named = str(caught.value).partition("prompts ")[2].partition(";")[0].split(", ")
    assert sorted(named) == sorted(prompt.prompt_id for prompt in Prompts(8).items) and len(passes) == 4


def generated(model, prompts: Prompts, shift: float) -> Prompts:
    """The same prompts with the model's own log-probabilities, `shift` nats off, as what a generator reported."""
    policy.attach(model)
    items = []
    for prompt in prompts.items:
        batch = pack([prompt])
        with torch.no_grad():
            logps = policy.response_logps(model, batch)
        own = [logps[batch.target_cell == k].numpy() + shift for k in range(len(prompt))]
        items.append(type(prompt)(**(vars(prompt) | {"generator_logps": own})))
    out = copy.copy(prompts)
    out.items = items
    return out


def test_the_generators_log_probabilities_are_compared_before_the_first_step(tmp_path: Path):
    model = small_llama().eval()
    made = trainer(tmp_path, model=model, data=generated(model, Prompts(8), 0.0), max_steps=1)
    made.train()
    assert any("differ from the generator's by" in note for note in made.notes)
    model = small_llama().eval()
    made = trainer(tmp_path, model=model, data=generated(model, Prompts(8), 0.3), max_steps=1)
    before = weights(model)
    with pytest.raises(UserError, match=r"differ from the generator's by 0\.3 .*logprob_tolerance"):
        made.train()
    assert torch.equal(weights(model), before)


def test_responses_that_were_not_generated_are_not_compared():
    line = checks.check_generator_logps(torch.zeros(3), torch.full((3,), math.nan), 0.05)
    assert "not compared" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_of_16_bits_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
):
    name = str(dtype).removeprefix("torch.")
    line = (
        f"the weights that are trained are {name}: small steps are lost to rounding; load the model with "
        "dtype=torch.float32, bf16=True computes in bfloat16 over them"
    )
    with caplog.at_level(logging.WARNING, logger="clha.training"):
        made = trainer(tmp_path, model=small_llama().to(dtype))
    assert made.notes == [line]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("clha.")] == [line]


def test_frozen_weights_of_16_bits_under_an_adapter_are_as_they_should_be(tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small_llama().to(torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert trainer(tmp_path, model=model).notes == []
    assert trainer(tmp_path).notes == []
