"""What the trainer writes and would upload: models that stop where they learned to, and no pickle."""

import logging
import pickletools
import zipfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from training_cases import Prompts, config, files, small_llama, trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, GenerationConfig

from clha import ClhaConfig, ClhaTrainer
from clha.tiny_model import tiny_tokenizer
from clha.training.export import save_model

STEPS = {"save_strategy": "steps", "save_steps": 2}


def pickled(folder: Path, names: list[str]) -> list[str]:
    """Those of the files that hold a pickle, whatever their names say."""
    return [name for name in names if _is_pickle(folder / name)]


def _is_pickle(path: Path) -> bool:
    if zipfile.is_zipfile(path):  # torch.save
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    try:
        return any(op.name == "STOP" for op, *_ in pickletools.genops(path.read_bytes()))
    except ValueError:
        return False


class Hub:
    """Stands where huggingface_hub would send: keeps which files each upload would carry, and which hold a pickle."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.uploads: list[dict[str, Any]] = []
        patch.setattr(HfApi, "create_repo", lambda _, name, **__: RepoUrl(_address(name)))
        patch.setattr(HfApi, "upload_folder", lambda _, **given: self.upload(**given))

    def upload(self, *, folder_path: Any, run_as_future: bool, ignore_patterns: Any = None, **others: Any) -> Any:
        folder = Path(folder_path)
        names = list(filter_repo_objects(files(folder), ignore_patterns=ignore_patterns))
        self.uploads.append({"names": set(names), "pickled": pickled(folder, names), "folder": folder, **others})
        done: Future[str] = Future()
        done.set_result("commit")
        return done if run_as_future else "commit"


def _address(name: str) -> str:
    return f"https://huggingface.co/{name if '/' in name else f'me/{name}'}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def on_pairs(tiny_model: Path, folder: Path, **settings: Any) -> ClhaTrainer:
    rows = [{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " nothing at all"} for i in range(8)]
    args = {"max_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return ClhaTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32"),
        args=ClhaConfig(output_dir=str(folder), learning_rate=1e-3, **(args | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )


def stops(folder: Path) -> int | list[int]:
    return GenerationConfig.from_pretrained(folder).eos_token_id


def base_model(tiny_model: Path) -> tuple[Any, Any]:
    """A model whose EOS is a token that its chat template, ChatML, never writes."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


SAID = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}


@pytest.mark.parametrize("messages", [True, False])
def test_generation_with_a_saved_model_stops_where_the_responses_that_it_learned_end(
    messages: bool, tiny_model: Path, tmp_path: Path, hub: Hub
):
    model, tokenizer = base_model(tiny_model)
    row = {"prompt": [{"role": "user", "content": "a"}]} | SAID if messages else {"chosen": "a b", "rejected": "a c"}
    made = ClhaTrainer(
        model, config(tmp_path, **STEPS), train_dataset=Dataset.from_list([row] * 8), processing_class=tokenizer
    )
    made.train()
    made.save_model(str(tmp_path / "saved"))
    made.push_to_hub()
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for folder in (tmp_path / "saved", tmp_path / "checkpoint-4", hub.uploads[0]["folder"]):
        assert stops(folder) == ([eos, end] if messages else eos)


def test_an_exported_model_stops_at_the_end_of_a_turn_and_is_left_alone_where_it_does(tiny_model: Path, tmp_path: Path):
    model, tokenizer = base_model(tiny_model)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    for _ in range(2):
        save_model(model, tokenizer, tmp_path / "base", dtype="float32", card="")
        assert stops(tmp_path / "base") == [tokenizer.eos_token_id, 7, 1]
    model.generation_config.eos_token_id = None
    save_model(model, tokenizer, tmp_path / "base", dtype="float32", card="")
    assert stops(tmp_path / "base") == 1
    for known in (1, [1, 7]):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        model.generation_config.eos_token_id = known
        model.save_pretrained(tmp_path / "plain")
        save_model(model, tiny_tokenizer(), tmp_path / "exported", dtype="float32", card="")
        name = "generation_config.json"
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


MODEL = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_the_files_that_hold_a_pickle_are_found(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    (tmp_path / "text.bin").write_text("{}")
    assert pickled(tmp_path, files(tmp_path)) == ["old.safetensors", "zip.safetensors"]


def test_what_is_pushed_is_a_model_that_loads_with_its_tokenizer_and_card(tiny_model: Path, tmp_path: Path, hub: Hub):
    made = on_pairs(tiny_model, tmp_path / "named", **STEPS)
    made.train()
    assert made.push_to_hub() == "commit"
    (upload,) = hub.uploads
    assert upload["names"] >= MODEL | {"README.md"} and upload["repo_id"] == "me/named"
    assert upload["pickled"] == [] and not any(name.startswith("checkpoint-") for name in upload["names"])
    loaded = AutoModelForCausalLM.from_pretrained(upload["folder"])
    assert torch.equal(weights(loaded), weights(made.model))
    assert "clha_shared_prompt" not in (upload["folder"] / "config.json").read_text()
    card = ModelCard.load(upload["folder"] / "README.md")
    assert card.data.model_name == "named" and "learning_rate: 0.001" in card.text


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_while_training_goes_on_states_are_pushed_only_where_the_strategy_asks_for_them(
    tiny_model: Path, tmp_path: Path, hub: Hub, strategy: str
):
    settings = {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "me/model"}
    made = on_pairs(tiny_model, tmp_path / "out", **STEPS, **settings)
    made.train()
    models = [upload for upload in hub.uploads if "path_in_repo" not in upload]
    states = [upload for upload in hub.uploads if "path_in_repo" in upload]
    assert len(models) == (0 if strategy == "end" else 2)
    for upload in models:
        assert upload["names"] >= MODEL and upload["pickled"] == []
        assert not {"trainer_state.json", "complete.json"} & upload["names"]
    wanted = {"checkpoint": ["last-checkpoint"] * 2, "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}
    assert [upload["path_in_repo"] for upload in states] == wanted.get(strategy, [])
    assert all("optimizer.pt" in upload["names"] for upload in states)
    assert torch.equal(
        weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-4")), weights(made.model)
    )


def test_the_result_folder_holds_no_pickle(tiny_model: Path, tmp_path: Path):
    made = on_pairs(tiny_model, tmp_path / "out", **STEPS)
    made.train()
    made.save_model(str(tmp_path / "saved"))
    assert set(files(tmp_path / "saved")) >= MODEL
    assert pickled(tmp_path / "saved", files(tmp_path / "saved")) == []
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert pickled(checkpoint, files(checkpoint)) == ["optimizer.pt", "rng_state.pth", "scheduler.pt"]


def test_an_adapter_is_saved_alone_and_can_be_merged_into_its_model(tmp_path: Path):
    from peft import LoraConfig

    made = ClhaTrainer(
        small_llama(), config(tmp_path), train_dataset=Prompts(8), peft_config=LoraConfig(target_modules=["q_proj"])
    )
    made.train()
    ids = torch.randint(0, 99, (1, 9))
    want = made.model.eval()(input_ids=ids).logits
    made.save_model(str(tmp_path / "adapter"))
    names = files(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names) and "model.safetensors" not in names
    assert pickled(tmp_path / "adapter", names) == []
    made.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, want, atol=1e-5, rtol=0)


def test_alone_too_an_architecture_that_cannot_share_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4))
    with caplog.at_level(logging.WARNING, logger="clha.training"):
        trainer(tmp_path, model=model)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("clha.")]
    assert line.startswith("BloomForCausalLM: prompts are not shared") and "\n" not in line
