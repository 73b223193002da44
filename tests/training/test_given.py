"""What a trainer is given: models and adapters that it can train, and one line where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import Prompts, config, small_llama, trainer
from transformers import AutoModel, AutoModelForSequenceClassification, T5Config, T5ForConditionalGeneration

from clha.errors import UserError
from clha.training.trainer import ClhaTrainer


def other_kinds() -> dict[str, Any]:
    small = small_llama().config
    t5 = T5Config(vocab_size=99, d_model=32, num_layers=1, num_heads=2, d_ff=32, d_kv=16)
    return {
        "T5ForConditionalGeneration": T5ForConditionalGeneration(t5),
        "LlamaForSequenceClassification": AutoModelForSequenceClassification.from_config(small),
        "LlamaModel": AutoModel.from_config(small),
        "Linear": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("name", other_kinds())
def test_what_is_no_causal_language_model_is_refused_in_one_line(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=f"model: {name} is not a causal language model") as caught:
        trainer(tmp_path, model=other_kinds()[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["as a config", "in the model"])
def test_adapters_that_add_tokens_to_the_prompt_are_refused(tmp_path: Path, name: str, wrapped: bool):
    import peft

    adapter = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    given = {"model": peft.get_peft_model(small_llama(), adapter)} if wrapped else {"peft_config": adapter}
    with pytest.raises(UserError, match=f"{name}: adapters that add tokens to the prompt .*: use LoRA"):
        ClhaTrainer(args=config(tmp_path), train_dataset=Prompts(8), **({"model": small_llama()} | given))


def test_a_second_adapter_on_top_of_one_is_refused(tmp_path: Path):
    from peft import LoraConfig

    adapter = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UserError, match="peft_config: the model has an adapter already; .*merge_and_unload"):
        ClhaTrainer(small_llama(lora=True), config(tmp_path), train_dataset=Prompts(8), peft_config=adapter)
