"""What the trainer writes and would upload: whole checkpoints, and no pickle but a checkpoint's own states."""

import logging
import pickletools
import shutil
import zipfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from training_cases import Prompts, config, small_llama, trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, GenerationConfig

from clha import ClhaConfig, ClhaTrainer
from clha.errors import TransientFailure, UserError
from clha.tiny_model import tiny_tokenizer
from clha.training import checkpoints
from clha.training.checkpoints import is_complete, last_checkpoint, mark_complete
from clha.training.export import save_model
from clha.training.metrics import metric_rows

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


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


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


# -- half-written checkpoints ------------------------------------------------------------------------------------


def zero_tail(path: Path, kept: int) -> None:
    """The right size, but zeros from byte `kept` on: what a crash leaves where nothing was flushed."""
    size = path.stat().st_size
    with open(path, "rb+") as f:
        f.truncate(kept)
        f.truncate(size)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_file_of_the_right_size_whose_end_is_zeros_is_half_written(tmp_path: Path, name: str):
    made = trainer(tmp_path, **STEPS)
    made.train()
    path = tmp_path / "checkpoint-4" / name
    zero_tail(path, path.stat().st_size - 200)
    said: list[str] = []
    found = last_checkpoint(tmp_path, said.append)
    assert found == tmp_path / "checkpoint-2"
    assert said == ["checkpoint-4 is half-written; the one before it is taken"]


def test_of_a_large_file_samples_are_looked_at_its_end_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """64 pieces of 16 bytes out of 10,000: starts 0, 158, 316, ... 9984. Between two of them nothing is seen."""
    monkeypatch.setattr(checkpoints, "_PIECE", 16)
    path = tmp_path / "large"
    for changed_at, whole in ((0, False), (158, False), (9983, True), (9984, False), (9999, False), (100, True)):
        data = bytearray(b"x" * 10_000)
        path.write_bytes(data)
        mark_complete(tmp_path)
        data[changed_at] = 0
        path.write_bytes(data)
        assert is_complete(tmp_path) is whole, changed_at


def test_resuming_alone_passes_over_a_half_written_checkpoint_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = trainer(tmp_path / "whole", **STEPS)
    whole.train()
    trainer(tmp_path / "run", **STEPS).train()
    zero_tail(tmp_path / "run" / "checkpoint-4" / "model.safetensors", 5000)
    with caplog.at_level(logging.WARNING, logger="clha.training"):
        again = trainer(tmp_path / "run", **STEPS)
        again.train(resume_from_checkpoint=True)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("clha.")] == [
        "checkpoint-4 is half-written; the one before it is taken"
    ]
    assert torch.equal(weights(again.model), weights(whole.model))
    assert is_complete(tmp_path / "run" / "checkpoint-4")


def test_what_another_trainer_wrote_is_passed_over_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A plain Trainer's checkpoints have no list of their files: none is resumed from, none is removed."""
    trainer(tmp_path, **STEPS).train()
    for path in tmp_path.glob("checkpoint-*"):
        (path / "complete.json").unlink()
    before = files(tmp_path)
    with caplog.at_level(logging.WARNING, logger="clha.training"), pytest.raises(ValueError, match="give it the path"):
        trainer(tmp_path, **STEPS).train(resume_from_checkpoint=True)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("clha.")] == [
        f"checkpoint-{step} is half-written or another trainer's; the one before it is taken" for step in (4, 2)
    ]
    assert files(tmp_path) == before
    again = trainer(tmp_path, **STEPS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_a_checkpoint_that_cannot_be_read_is_no_half_written_one(tmp_path: Path):
    """A disk that fails for a moment must not cost work: a link to itself is an error of the system, too."""
    trainer(tmp_path, **STEPS).train()
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    path.rename(tmp_path / "aside")
    path.symlink_to(path.name)
    with pytest.raises(TransientFailure, match=r"checkpoint-4 cannot be read \(.*; nothing was changed"):
        last_checkpoint(tmp_path, print)
    path.unlink()
    (tmp_path / "aside").rename(path)
    assert last_checkpoint(tmp_path, print) == tmp_path / "checkpoint-4"


def test_the_last_whole_checkpoint_goes_only_when_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two are kept: 2 and what another trainer left. The run that goes on from 2 breaks off while it saves 4."""
    trainer(tmp_path, **STEPS).train()
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-99")
    (tmp_path / "checkpoint-99" / "complete.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("clha.training.saving.mark_complete", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, **STEPS, save_total_limit=2).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path, print) == tmp_path / "checkpoint-2"
    again = trainer(tmp_path, **STEPS, save_total_limit=2)
    again.train(resume_from_checkpoint=True)
    assert again.args.save_total_limit == 2
    assert is_complete(tmp_path / "checkpoint-4") and len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_checkpoint_between_two_logs_loses_no_metrics(tmp_path: Path):
    """Logs every 2 steps, a checkpoint after 3: the steps are logged there as well, so that the table is the same."""
    settings = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "run", **settings)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=True)
    ours, theirs = (metric_rows(made.state.log_history) for made in (again, whole))
    assert [row["step"] for row in ours] == [2, 3, 4, 6]
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if "perf/" not in k} == {
            k: v for k, v in other.items() if "perf/" not in k
        }


def test_where_only_the_best_are_saved_nothing_measured_is_lost_either(tmp_path: Path):
    """Logs every 4 steps; the first evaluation is the best until then, so that checkpoint-1 cuts an interval."""
    settings = {"max_steps": 4, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    settings["metric_for_best_model"] = "rewards/accuracies"
    whole = trainer(tmp_path, **settings)
    whole.train()
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    ours, theirs = (metric_rows(made.state.log_history) for made in (again, whole))
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "loss/sft", "rewards/margins", "num_tokens", "eval_loss"):
            assert mine[name] == other[name], name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two of four steps."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, **STEPS).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("listed", [True, False], ids=["ours", "another trainer's"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_given_by_its_path_with_a_file_cut_off_is_refused(
    saved: Path, tmp_path: Path, name: str, listed: bool
):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(saved, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    if not listed:
        (folder / "complete.json").unlink()
    what = "it is half-written, or was changed since it was saved" if listed else f"{name} cannot be read: half-written"
    made = trainer(tmp_path)
    with pytest.raises(UserError, match=rf"{folder}: {what}; resume_from_checkpoint=True takes the newest") as caught:
        made.train(resume_from_checkpoint=folder)
    assert "\n" not in str(caught.value) and made.state.global_step == 0


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_a_checkpoint_given_by_its_path_without_its_states_is_refused(saved: Path, tmp_path: Path, name: str):
    """transformers would go on with a fresh optimizer."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(saved, folder)
    (folder / f"{name}.pt").unlink()
    (folder / "complete.json").unlink()
    with pytest.raises(UserError, match=f"it holds no {name} to go on with .*save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    with pytest.raises(UserError, match="nowhere: there is no such folder; resume_from_checkpoint=True"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_checkpoints_of_weights_alone_are_not_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer(tmp_path, save_only_model=True, **STEPS).train()
    with caplog.at_level(logging.WARNING, logger="clha.training"), pytest.raises(ValueError, match="no complete"):
        trainer(tmp_path, **STEPS).train(resume_from_checkpoint=True)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("clha.")] == [
        f"checkpoint-{step} is without states to go on with (save_only_model); the one before it is taken"
        for step in (4, 2)
    ]
    with pytest.raises(UserError, match="it holds no optimizer and no scheduler to go on with"):
        trainer(tmp_path, **STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_alone_without_a_whole_checkpoint_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no complete checkpoint in .*; train without resume_from_checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_alone_too_an_architecture_that_cannot_share_is_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4))
    with caplog.at_level(logging.WARNING, logger="clha.training"):
        trainer(tmp_path, model=model)
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("clha.")]
    assert line.startswith("BloomForCausalLM: prompts are not shared") and "\n" not in line
