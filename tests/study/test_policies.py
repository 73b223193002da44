"""Trained policies are judged pair by pair."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from clha.study.policies import preference_margins
from clha.training.batches import RankedPrompt


def pair(draw: np.random.Generator) -> RankedPrompt:
    def tokens(low: int, high: int) -> np.ndarray:
        return draw.integers(20, 200, draw.integers(low, high)).astype(np.int32)

    return RankedPrompt(
        prompt_id="",
        prompt=tokens(2, 30),
        responses=[tokens(1, 20), tokens(1, 20)],
        rewards=np.array([1.0, 0.0]),
        pair_weights=np.array([[0, 1], [0, 0]], dtype=np.float32),
        sft_index=0,
        sft_lambda=1.0,
    )


def test_margins_stand_in_the_order_of_the_pairs(tiny_model: Path) -> None:
    """Micro-batches take the longest pairs first; one after the other is what each margin must be."""
    draw = np.random.default_rng(0)
    pairs = [pair(draw) for _ in range(12)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    alone = np.concatenate([preference_margins(model, [p]) for p in pairs])
    assert len(np.unique(alone.round(6))) == 12
    for budget in (60, 200, 10**6):
        assert preference_margins(model, pairs, budget) == pytest.approx(alone, abs=1e-5)
