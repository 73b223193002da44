"""What a trainer is given: models and adapters that it can train, and one line where it cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_cases import Prompts, config, small_llama, trainer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

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


def pairs(tiny_model: Path, folder: Path, **given: Any) -> ClhaTrainer:
    """A trainer on pairs of text, of one step."""
    rows = [{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " nothing at all"} for i in range(8)]
    given = {"args": config(folder, max_steps=1), "model": tiny_model} | given
    return ClhaTrainer(train_dataset=Dataset.from_list(rows), **given)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_given_by_its_name_or_folder_brings_its_tokenizer(tiny_model: Path, tmp_path: Path, kind: type):
    made = pairs(tiny_model, tmp_path, model=kind(tiny_model))
    made.train()
    assert made.model.dtype == torch.float32 and made.processing_class.eos_token_id is not None
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


def test_token_ids_need_no_tokenizer_and_a_line_says_why_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    small_llama().save_pretrained(tmp_path / "model")
    made = ClhaTrainer(tmp_path / "model", config(tmp_path, max_steps=1), train_dataset=Prompts(8))
    made.train()
    assert made.processing_class is None
    (told,) = [record.getMessage() for record in caplog.records if record.name == "clha.training.inputs"]
    assert told.startswith(f"{tmp_path / 'model'}: has no tokenizer that can be read (") and "\n" not in told


def test_a_processor_is_as_good_as_the_tokenizer_that_it_has(tiny_model: Path, tmp_path: Path):
    class Processor:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    by_processor = pairs(tiny_model, tmp_path, processing_class=Processor()).train_dataset[3]
    by_tokenizer = pairs(tiny_model, tmp_path, processing_class=Processor.tokenizer).train_dataset[3]
    assert by_processor.prompt.tolist() == by_tokenizer.prompt.tolist()
    with pytest.raises(UserError, match="processing_class: object is no tokenizer and has none"):
        pairs(tiny_model, tmp_path, processing_class=object())


def test_without_settings_the_defaults_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = ClhaTrainer(small_llama(), train_dataset=Prompts(8))
    assert (made.args.output_dir, made.args.margin) == ("trainer_output", 3.0)


def test_settings_of_another_trainer_are_refused_in_one_line(tmp_path: Path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(UserError, match=r"args: TrainingArguments has no settings .*give a clha\.ClhaConfig") as caught:
        ClhaTrainer(small_llama(), args, train_dataset=Prompts(8))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


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
