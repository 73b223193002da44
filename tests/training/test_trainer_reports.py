"""What the trainer reports of its steps and evaluations, and which weights it keeps."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_cases import Prompts, config, small_llama, trainer, weights

from clha.errors import UserError
from clha.tiny_model import tiny_tokenizer
from clha.training.batches import RankedPrompt
from clha.training.export import metrics_table
from clha.training.metrics import metric_rows
from clha.training.trainer import ClhaTrainer


def test_metrics_are_those_of_the_pairs_that_were_kept(tmp_path: Path):
    """Two responses of prompt A, kept: s = log-probability per token, the better one is chosen."""
    made = trainer(tmp_path, max_steps=1)
    made.train()
    row = metric_rows(made.state.log_history)[0]
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"])
    assert row["loss"] == pytest.approx(row["loss/contrastive"] + row["loss/sft"], rel=1e-5)
    assert 0 <= row["rewards/accuracies"] <= 1 and 0 < row["noise/kept_fraction"] <= 1
    for name in ("grad_norm", "learning_rate", "logps/chosen", "num_tokens", "perf/tokens_per_second", "perf/mfu"):
        assert name in row
    table = metrics_table([row])
    assert str(table.schema.field("step").type) == "int64"
    assert {str(f.type) for f in table.schema} == {"int64", "double"}


def test_tokens_are_counted_whatever_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four steps: a row for each, for the first three, for none."""
    counts: list[int] = []
    said: list[str] = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda line, *_: said.append(line))
    for settings in ({}, {"logging_steps": 3}, {"logging_strategy": "no"}):
        made = trainer(tmp_path, include_num_input_tokens_seen="all", **settings)
        made.train()
        counts.append(made.state.num_input_tokens_seen)
        for row in made.state.log_history:
            assert row["num_input_tokens_seen"] == row.get("num_tokens", counts[0])
    assert counts == [counts[0]] * 3 and counts[0] > 0
    assert said == []


def test_what_is_measured_once_is_no_part_of_a_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The device's peak takes 100 seconds of a clock on which each look at it takes one."""
    now = itertools.count(1)
    clock = {"extra": 0.0}

    def slow_peak(*_: object) -> float:
        clock["extra"] += 100.0
        return 1e9

    looked = SimpleNamespace(perf_counter=lambda: next(now) + clock["extra"])
    monkeypatch.setattr("clha.training.metrics.time", looked)
    monkeypatch.setattr("clha.training.trainer.peak_flops", slow_peak)
    made = trainer(tmp_path, max_steps=1)
    made.train()
    (row,) = metric_rows(made.state.log_history)
    assert clock["extra"] == 100.0
    assert 0 < row["num_tokens"] / row["perf/tokens_per_second"] < 100


def test_an_evaluation_reads_every_prompt_once(tmp_path: Path):
    """Text is tokenised when it is read."""

    class Counted(Prompts):
        reads = 0

        def __getitem__(self, i: int) -> RankedPrompt:
            self.reads += 1
            return super().__getitem__(i)

    made, counted = trainer(tmp_path, per_device_eval_batch_size=3), Counted(7, 1)
    assert made.evaluate(counted)["eval_loss"] == pytest.approx(made.evaluate()["eval_loss"], rel=1e-6)
    assert counted.reads == 7


def test_evaluation_is_over_the_whole_set_whatever_the_batch(tmp_path: Path):
    model = small_llama()
    one = trainer(tmp_path, model=model, per_device_eval_batch_size=7).evaluate()
    two = trainer(tmp_path, model=model, per_device_eval_batch_size=2, tokens_per_micro_batch=50).evaluate()
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)


def test_other_datasets_are_evaluated_as_by_any_trainer_one_or_by_name(tmp_path: Path):
    """Prompts with more responses than the trainer knew of, too."""
    few = Prompts(9, 2)
    few.items, few.max_candidates = [p for p in few.items if len(p) == 2], 2
    made = trainer(tmp_path, data=few, evaluation={"one": few, "other": Prompts(7, 1)}, max_steps=1)
    named = made.evaluate()
    assert made.evaluate(Prompts(7, 1))["eval_loss"] == pytest.approx(named["eval_other_loss"], rel=1e-6)
    assert made.evaluate(few)["eval_loss"] == pytest.approx(named["eval_one_loss"], rel=1e-6)
    assert named["eval_one_loss"] != named["eval_other_loss"]


def test_after_training_a_dataset_without_a_reference_cannot_be_evaluated_with_dpo(tmp_path: Path):
    made = trainer(tmp_path, max_steps=1, loss="dpo")
    assert made.evaluate(Prompts(5, 4))["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    made.train()
    assert made.evaluate()["eval_loss"] != pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(UserError, match="before training"):
        made.evaluate(Prompts(5, 4))


def test_the_best_checkpoint_by_held_out_accuracy_is_loaded_and_training_stops_early(tmp_path: Path):
    from transformers import EarlyStoppingCallback

    settings = {
        "max_steps": 20,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/accuracies",
        "greater_is_better": True,
    }
    made = trainer(tmp_path, **settings)
    made.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    made.train()
    evaluated = [e for e in made.state.log_history if "eval_rewards/accuracies" in e]
    best = max(e["eval_rewards/accuracies"] for e in evaluated)
    assert made.evaluate()["eval_rewards/accuracies"] == pytest.approx(best)
    assert made.state.global_step < 20


def test_a_lora_adapter_trains_alone_and_is_saved_or_merged(tmp_path: Path):
    from peft import LoraConfig, PeftModel

    from clha.training.export import save_model

    for merge in (False, True):
        model = small_llama()
        before = weights(model)
        made = ClhaTrainer(
            model, config(tmp_path), train_dataset=Prompts(30), peft_config=LoraConfig(target_modules=["q_proj"])
        )
        made.train()
        trained_model = made.model
        ids = torch.randint(0, 99, (1, 9))
        trained_model.eval()
        want = trained_model(input_ids=ids).logits
        folder = tmp_path / f"merged-{merge}"
        save_model(trained_model, tiny_tokenizer(), folder, dtype="float32", card="card", merge_adapter=merge)
        if merge:
            loaded = type(model).from_pretrained(folder)
        else:
            assert (folder / "adapter_model.safetensors").stat().st_size < 100_000
            base = small_llama()
            assert torch.equal(weights(base), before)
            loaded = PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, want, atol=1e-5, rtol=0)
