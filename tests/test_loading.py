"""Models are whole: no weight that counts is drawn at random because the files lack it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clha.errors import UserError
from clha.loading import load_policy, load_whole
from clha.rewards.adapters import load_scorer
from clha.rewards.features import FrozenEncoder
from clha.rewards.texts import RewardInput
from clha.settings_rewards import RewardFit, RewardModel
from clha.training.arguments import ClhaConfig
from clha.training.trainer import ClhaTrainer

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
RANDOM = "which would be drawn at random"


def saved(auto: str, tiny_model: Path, folder: Path, **config: Any) -> Path:
    """A random Llama of that class of transformers, on the tiny model's tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=1, **SIZE, **config)
    getattr(transformers, auto)(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The folder, its weights changed."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def scorer(folder: Path) -> Any:
    return load_scorer(RewardModel(type="sequence_classification", model="m", max_tokens=200), folder, None, "cpu")


def encoder(folder: Path) -> FrozenEncoder:
    return FrozenEncoder(folder, layer=1, pooling="response_mean", max_tokens=200)


def test_a_reward_model_without_its_head_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    headless = saved("LlamaModel", tiny_model, tmp_path / "headless", num_labels=1)
    with pytest.raises(UserError, match=f"reward model .*headless: has no score.weight, {RANDOM}; give a sequence"):
        scorer(headless)
    renamed = saved("LlamaForSequenceClassification", tiny_model, tmp_path / "renamed", num_labels=1)
    assert scorer(renamed).score([RewardInput([{"role": "user", "content": "tea"}], "gladly")]).rewards.shape == (1,)
    changed(renamed, lambda state: state.update({"reward_head.weight": state.pop("score.weight")}))
    with pytest.raises(UserError, match=f"renamed: has no score.weight, {RANDOM}"):
        scorer(renamed)


def test_a_reward_model_whose_weights_have_another_shape_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved("LlamaForSequenceClassification", tiny_model, tmp_path, num_labels=1)
    changed(folder, lambda state: state.update({"score.weight": torch.ones(1, 16)}))
    with pytest.raises(UserError, match=r"its score.weight has shape \[1, 16\], \[1, 32\] is needed; give"):
        scorer(folder)


def test_several_weights_that_are_not_there_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved("LlamaForSequenceClassification", tiny_model, tmp_path, num_labels=1)
    changed(folder, lambda state: [state.pop(n) for n in list(state) if n.startswith("model.layers.1.")])
    with pytest.raises(UserError, match=f"has no model.layers.1.input_layernorm.weight and 8 more, {RANDOM}"):
        scorer(folder)


def test_a_policy_without_its_output_is_refused_unless_that_is_its_input(tiny_model: Path, tmp_path: Path) -> None:
    body = saved("LlamaModel", tiny_model, tmp_path / "body", tie_word_embeddings=False)
    with pytest.raises(UserError, match=f"policy .*body: has no lm_head.weight, {RANDOM}; give a causal"):
        load_policy(body)
    with pytest.raises(UserError, match=f"has no lm_head.weight, {RANDOM}"):
        ClhaTrainer(str(body), ClhaConfig(output_dir=str(tmp_path), report_to=[]))
    tied = load_policy(saved("LlamaForCausalLM", tiny_model, tmp_path / "tied", tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and tied.dtype == torch.float32


def test_an_encoder_needs_its_body_alone(tiny_model: Path, tmp_path: Path) -> None:
    for auto in ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"):
        encoder(saved(auto, tiny_model, tmp_path / auto))
    broken = saved("LlamaForCausalLM", tiny_model, tmp_path / "broken")
    changed(broken, lambda state: state.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=f"encoder .*broken: has no layers.0.mlp.up_proj.weight, {RANDOM}"):
        encoder(broken)


def test_an_encoder_needs_no_pooler(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(vocab_size=99, num_labels=1, **SIZE)).save_pretrained(tmp_path)
    assert load_whole(AutoModel, tmp_path, "encoder", "", new_head=True).pooler is not None
    with pytest.raises(UserError, match="has no bert.pooler.dense.bias and 3 more"):
        load_whole(AutoModelForSequenceClassification, tmp_path, "reward model", "")


def test_an_adapter_needs_the_body_and_makes_its_head(tiny_model: Path, tmp_path: Path) -> None:
    from clha.rewards.tuning import _with_adapter

    fit = RewardFit.model_validate({"encoder": "e", "method": "lora"})
    _with_adapter(saved("LlamaForCausalLM", tiny_model, tmp_path / "whole"), fit)
    broken = saved("LlamaForCausalLM", tiny_model, tmp_path / "broken")
    changed(broken, lambda state: state.pop("model.embed_tokens.weight"))
    with pytest.raises(UserError, match=f"encoder .*broken: has no model.embed_tokens.weight, {RANDOM}; take another"):
        _with_adapter(broken, fit)


def test_a_config_with_more_layers_than_the_files_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved("LlamaForCausalLM", tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=f"has no model.layers.2.input_layernorm.weight and 8 more, {RANDOM}"):
        load_policy(folder)
