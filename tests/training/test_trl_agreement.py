"""Our losses of the DPO family and TRL's own code, on the same tokens, the same policy and the same reference."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clha import losses
from clha.training import policy
from clha.training.batches import Layout, RankedPrompt, pack
from clha.training.logprobs import sum_by_response
from clha.training.objectives import count, objective
from clha.training.reference import with_reference

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if importlib.util.find_spec("trl") is None:
    raise ModuleNotFoundError("TRL is missing: requirements/cpu.lock has it, and without it nothing is compared here")

BETA = 0.3
PAIRS = [
    {"prompt": "Is a tomato a fruit?", "chosen": " To a botanist, yes.", "rejected": " Who cares?"},
    {"prompt": "Name a river.", "chosen": " The Rhine is one; the Nile is another.", "rejected": " Paris."},
    {"prompt": "Why is the sky blue? Be brief.", "chosen": " Scattering.", "rejected": " I will not say that again."},
]


def common(folder: Path) -> dict[str, Any]:
    settings = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    return settings | {"per_device_train_batch_size": len(PAIRS), "beta": BETA, "gradient_checkpointing": False}


def disturbed(model: Any) -> Any:
    """Another policy: all weights moved a little, in place."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.02 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
    return model


def dpo_trainer(folder: Path, tiny_model: Path, **settings: Any) -> Any:
    """TRL's trainer with a policy that is not its reference any more."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy_model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32) for _ in range(2))
    trainer = DPOTrainer(
        policy_model,
        reference,
        args=DPOConfig(**common(folder), **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    disturbed(trainer.model)
    return trainer


def pairs_of(inputs: dict[str, torch.Tensor]) -> list[RankedPrompt]:
    """The rows that TRL's collator made (all chosen, then all rejected), as prompts with two ranked responses."""
    half, rows = len(inputs["input_ids"]) // 2, []
    for ids, mask, answer in zip(
        inputs["input_ids"], inputs["attention_mask"].bool(), inputs["completion_mask"].bool(), strict=True
    ):
        rows.append((ids[mask & ~answer].numpy(), ids[mask & answer].numpy()))
    prompts = []
    for i in range(half):
        (prompt, chosen), (same, rejected) = rows[i], rows[half + i]
        assert prompt.tolist() == same.tolist()
        weights = np.array([[0, 1], [0, 0]], dtype=np.float32)
        prompts.append(RankedPrompt(str(i), prompt, [chosen, rejected], np.array([1.0, 0.0]), weights, 0, 1.0))
    return prompts


@torch.no_grad()
def trl_sums(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, 2] summed log-probabilities as TRL's own forward gives them."""
    answers = inputs["completion_mask"]
    labels = inputs["input_ids"].masked_fill(answers == 0, -100)
    out = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )
    chosen, rejected = out.log_probs[:, 1 - answers.shape[1] :].sum(1).chunk(2)
    return torch.stack([chosen, rejected], 1)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "ours"),
    [
        ("sigmoid", 0.0, lambda s, r: losses.dpo_loss(s, r, beta=BETA)),
        ("robust", 0.2, lambda s, r: losses.dpo_robust_loss(s, r, beta=BETA, label_smoothing=0.2)),
    ],
)
def test_on_the_same_log_probabilities_the_loss_is_trls(
    tmp_path: Path, tiny_model: Path, loss_type: str, smoothing: float, ours: Any
):
    made = dpo_trainer(tmp_path, tiny_model, loss_type=[loss_type], label_smoothing=smoothing)
    inputs = next(iter(made.get_train_dataloader()))
    made.model.eval()
    theirs = float(made.compute_loss(made.model, dict(inputs)).detach())
    sums, reference = trl_sums(made.model, inputs), trl_sums(made.ref_model, inputs)
    assert float((sums - reference).abs().min()) > 1e-3, "policy and reference are the same: the case shows nothing"
    assert float(ours(sums, reference)) == pytest.approx(theirs, rel=1e-6)


def test_smoothed_dpo_is_trls_smoothed_loss_of_the_log_ratios(tmp_path: Path, tiny_model: Path):
    """TRL's CPO loss knows no reference: given log-ratios in place of log-probabilities it is conservative DPO."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    made = CPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=CPOConfig(**common(tmp_path), loss_type="sigmoid", label_smoothing=0.15),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    draw = torch.Generator().manual_seed(0)
    sums, reference = (-30 * torch.rand(16, 2, dtype=torch.float64, generator=draw) for _ in range(2))
    ratios = sums - reference
    theirs = made.cpo_loss(ratios[:, 0], ratios[:, 1])[0].mean()
    ours = losses.dpo_smoothed_loss(sums, reference, beta=BETA, label_smoothing=0.15)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-9)


def test_the_whole_way_from_tokens_to_loss_and_gradient_is_trls(tmp_path: Path, tiny_model: Path):
    """Shared prompts, packed rows, chunked log-probabilities, a stored reference, all in float32.

    A response's log-probability is a sum of up to 300 nats, known to 1e-5: so near can the losses be.
    """
    made = dpo_trainer(tmp_path, tiny_model)
    inputs = next(iter(made.get_train_dataloader()))
    made.model.eval()
    theirs = made.compute_loss(made.model, dict(inputs))
    theirs.backward()
    gradients = {name: value.grad.clone() for name, value in made.model.named_parameters()}

    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert policy.attach(reference).shares_prompts
    data = with_reference(_Pairs(pairs_of(inputs)), reference, Layout(True, torch.device("cpu")), 4096, False)
    model = disturbed(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)).eval()
    policy.attach(model)
    prompts = [data[i] for i in range(len(data))]
    batch = pack(prompts)
    sums = sum_by_response(policy.response_logps(model, batch), batch.target_cell, *batch.candidate_mask.shape)
    settings = {"margin": 0.0, "sft_weight": 0.0, "sft_by": "sum", "label_smoothing": 0.0}
    ours = objective(sums, batch, count(prompts, 2), loss="dpo", beta=BETA, **settings)["total"]
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, value in model.named_parameters():
        want = gradients[name]
        assert float((value.grad - want).norm()) < 1e-4 * float(want.norm()) + 1e-9, name


class _Pairs:
    max_candidates = 2

    def __init__(self, prompts: list[RankedPrompt]) -> None:
        self._prompts = prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, i: int) -> RankedPrompt:
        return self._prompts[i]
