"""Rewards of models in bfloat16 keep more than its 8 bits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_cases import Loader, classifier_of, inputs, neox_folder
from peft import LoraConfig, get_peft_model
from reward_cases import write_bert
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from clha.rewards.adapters import Folders
from clha.rewards.gpt_neox import load_gpt_neox
from clha.rewards.precision import head_in_float32


def folder_of(kind: str, tiny_model: Path, folder: Path) -> tuple[Folders, str]:
    """A random reward model with large rewards, and its type."""
    if kind == "gpt_neox":
        return neox_folder(tiny_model, folder, "mean"), "gpt_neox_reward_model"
    if kind == "bert":
        encoder = write_bert(folder / "bert")
        config = BertConfig.from_pretrained(encoder, num_labels=1, initializer_range=0.3)
        return classifier_of(config, encoder, folder / "judge"), "sequence_classification"
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=1, initializer_range=0.3)
    return classifier_of(config, tiny_model, folder / "llama"), "sequence_classification"


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt_neox"])
def test_rewards_are_no_bfloat16_numbers_and_near_those_of_float32(kind: str, tiny_model: Path, tmp_path: Path):
    folder, type_ = folder_of(kind, tiny_model, tmp_path)
    exact, rounded = (
        Loader(folder, None, tmp_path / dtype, type=type_, model="m", dtype=dtype)(4000).score(inputs(24)).rewards
        for dtype in ("float32", "bfloat16")
    )
    as_bfloat16 = torch.tensor(rounded).bfloat16().double().numpy()
    assert (rounded != as_bfloat16).mean() > 0.9
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.ptp(exact)


def test_the_head_of_a_tuned_model_is_computed_in_float32_under_autocast(tiny_model: Path):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig.from_pretrained(tiny_model, num_labels=1))
    model.config.pad_token_id = 1
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2))
    ids = torch.arange(5, 17)[None]
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
        head_in_float32(model)
        logits = model(input_ids=ids).logits
    assert logits.dtype == torch.float32
    logits.sum().backward()
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert head and all(p.grad is not None and p.grad.abs().sum() > 0 for p in head)


def test_rotary_frequencies_of_gpt_neox_are_those_of_float32(tiny_model: Path, tmp_path: Path):
    """Rounded to bfloat16 they would be off by up to 0.2%: 1,000 tokens apart that is a turn of up to two radians."""
    folder = neox_folder(tiny_model, tmp_path / "neox", "last")
    exact, rounded = (load_gpt_neox(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    assert torch.equal(exact.gpt_neox.rotary_emb.inv_freq, rounded.gpt_neox.rotary_emb.inv_freq)
    assert rounded.gpt_neox.rotary_emb.inv_freq.dtype == torch.float32
