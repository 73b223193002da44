"""From a micro-batch to its part of the loss: the denominators count what the losses add up."""

import math

import numpy as np
import pytest
import torch

from clha.training.batches import RankedPrompt, pack
from clha.training.objectives import REFERENCE_LOSSES, count, objective

SETTINGS = {"margin": 1.0, "sft_weight": 0.0, "sft_by": "sum", "beta": 0.5, "label_smoothing": 0.0}


def pair(name: str, weights: list[list[float]], reference: list[float]) -> RankedPrompt:
    tokens = np.array([1, 2], dtype=np.int32)
    return RankedPrompt(
        prompt_id=name,
        prompt=tokens,
        responses=[tokens, tokens],
        rewards=np.array([1.0, 0.0]),
        pair_weights=np.array(weights, dtype=np.float32),
        sft_index=0,
        sft_lambda=1.0,
        reference_logps=np.array(reference),
    )


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
def test_flipped_and_soft_pairs_are_in_the_sum_and_in_its_denominator_however_the_batch_is_cut(loss: str):
    """Three pairs with x = 0.5 * (-1 - -3) = 1, the reference at zero: -log sigmoid is a = 0.313262 for it and
    b = 1.313262 turned round. Kept (1 above): a; flipped (0.8 below): 0.8 b; soft (0.7, 0.3): 0.7 a + 0.3 b.

    Mean over three pairs: (1.7 * 0.313262 + 1.1 * 1.313262) / 3 = 0.659044. A fourth pair without weight counts not.
    """
    prompts = [
        pair("kept", [[0, 1], [0, 0]], [0, 0]),
        pair("flipped", [[0, 0], [0.8, 0]], [0, 0]),
        pair("soft", [[0, 0.7], [0.3, 0]], [0, 0]),
        pair("dropped", [[0, 0], [0, 0]], [0, 0]),
    ]
    over = count(prompts, 2)
    assert over.pairs == 3
    sums = torch.tensor([[-1.0, -3.0]], dtype=torch.float64)
    parts = [objective(sums, pack([prompt]), over, loss=loss, **SETTINGS)["total"] for prompt in prompts]
    whole = objective(sums.expand(4, 2), pack(prompts), over, loss=loss, **SETTINGS)["total"]
    a, b = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    assert float(whole) == pytest.approx((1.7 * a + 1.1 * b) / 3, abs=1e-7) == pytest.approx(0.659044, abs=1e-6)
    assert float(sum(parts)) == pytest.approx(float(whole), abs=1e-12)
