"""Settings that a trainer would misread are refused when they are given, in one line."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import config, trainer


@pytest.mark.parametrize(
    "settings",
    [
        {"margin": -1.0},
        {"margin": math.nan},
        {"margin": math.inf},
        {"reward_gap": -0.5},
        {"sft_threshold": math.nan},
        {"sft_weight": -1.0},
        {"beta": -0.1},
        {"beta": 0.0},
        {"label_smoothing": 0.5, "loss": "dpo_robust"},
        {"label_smoothing": -0.1, "loss": "dpo_smoothed"},
        {"tokens_per_micro_batch": 0},
        {"logits_megabytes": -5},
        {"logprob_tolerance": 0.0},
        {"per_device_train_batch_size": 0},
        {"per_device_eval_batch_size": 0},
        {"gradient_accumulation_steps": 0},
    ],
    ids=lambda settings: ", ".join(f"{k}={v}" for k, v in settings.items()),
)
def test_numbers_out_of_their_range_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any]):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"^{name} must be .*, not {value}$") as caught:
        config(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_numbers_at_the_ends_of_their_ranges_are_taken(tmp_path: Path):
    settings = {"margin": 0.0, "reward_gap": 0.0, "sft_threshold": -math.inf, "sft_weight": 0.0, "logits_megabytes": 0}
    settings |= {"tokens_per_micro_batch": 1, "per_device_train_batch_size": 1}
    made = config(tmp_path, **settings, loss="dpo_robust", label_smoothing=0.49)
    assert made.label_smoothing == 0.49 and made.sft_threshold == -math.inf


@pytest.mark.parametrize("loss", ["clha", "dpo"])
def test_smoothing_that_the_loss_would_leave_aside_is_refused(tmp_path: Path, loss: str):
    with pytest.raises(ValueError, match=f"label_smoothing needs loss dpo_smoothed or dpo_robust, it is {loss}"):
        config(tmp_path, loss=loss, label_smoothing=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"dataloader_drop_last": True},
        {"eval_accumulation_steps": 2},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs"]},
        {"torch_empty_cache_steps": 2},
        {"dataloader_in_order": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_arguments_of_a_trainer_that_would_be_ignored_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any]):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))}.* is not supported: ") as caught:
        config(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_prompts_are_taken_in_their_own_order_on_request_and_by_length_never(tmp_path: Path):
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    loader = trainer(tmp_path, **settings).get_train_dataloader()
    assert [prompt.prompt_id for batch in loader for prompt in batch] == [f"prompt-0-{i}" for i in range(30)]
    with pytest.raises(ValueError, match="train_sampling_strategy must be random or sequential, not 'group_by_length'"):
        config(tmp_path, train_sampling_strategy="group_by_length")


def test_what_changes_the_speed_of_workers_alone_reaches_the_loader(tmp_path: Path):
    workers = {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 3, "multiprocessing_context": "spawn"}
    loader = trainer(tmp_path, **{f"dataloader_{k}": v for k, v in workers.items()}).get_train_dataloader()
    assert loader.num_workers == 1 and loader.persistent_workers and loader.prefetch_factor == 3
    assert loader.multiprocessing_context.get_start_method() == "spawn"


def test_settings_can_be_written_down_and_read_again(tmp_path: Path):
    made = config(tmp_path, loss="dpo_robust", label_smoothing=0.1)
    assert type(made)(**made.to_dict()).to_dict() == made.to_dict()


def test_a_process_that_sees_several_gpus_trains_on_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = config(tmp_path, use_cpu=False)
    assert made.n_gpu == 1 and made.train_batch_size == made.per_device_train_batch_size
    assert "one process trains on one of the 2 GPUs" in caplog.text
