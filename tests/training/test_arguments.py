"""Settings that a trainer would misread are refused when they are given, in one line."""

import math
from pathlib import Path
from typing import Any

import pytest
from training_cases import config


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
