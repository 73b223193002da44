"""The width of padded rows, and what it is for: right values on CUDA."""

import numpy as np
import pytest
import torch
from policy_cases import SMALL, make, separate_passes, sums_of
from training_cases import VOCABULARY
from transformers import MistralConfig

from clha.padding import row_width
from clha.rewards.scoring import lengths_mask, padded
from clha.training import policy
from clha.training.batches import Layout, RankedPrompt

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (2, 2), (32, 32), (33, 34), (64, 64), (65, 66), (66, 66)])
def test_rows_on_cuda_are_never_one_longer_than_a_multiple_of_32(tokens: int, width: int) -> None:
    assert row_width(tokens, CUDA) == width
    assert row_width(tokens, CPU) == tokens


def test_a_wider_row_is_padded_on_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clha.rewards.scoring.row_width", lambda tokens, device: tokens + 1)
    assert padded([[5, 6], [7]], 0, CPU).tolist() == [[5, 6, 0], [7, 0, 0]]
    assert padded([[5, 6], [7]], 0, CPU, left=True).tolist() == [[0, 5, 6], [0, 0, 7]]
    assert lengths_mask([[5, 6], [7]], CPU).tolist() == [[1, 1, 0], [1, 0, 0]]


def prompt_of(tokens: int) -> RankedPrompt:
    """Two responses of 5 tokens; the input has `tokens`."""
    draw = np.random.default_rng(0)
    return RankedPrompt(
        prompt_id="p",
        prompt=draw.integers(0, VOCABULARY, tokens - 4).astype(np.int32),
        responses=[draw.integers(0, VOCABULARY, 5).astype(np.int32) for _ in range(2)],
        rewards=np.array([1.0, 0.0]),
        pair_weights=np.triu(np.ones((2, 2), dtype=np.float32), 1),
        sft_index=0,
        sft_lambda=1.0,
    )


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
@pytest.mark.parametrize("tokens", [64, 65, 66, 97])
def test_padded_rows_of_every_width_give_the_log_probabilities_of_separate_passes(tokens: int, device: str) -> None:
    """A single key-value head and a window: at 65 and 97 tokens PyTorch's own attention on CUDA would be wrong."""
    model = make(MistralConfig(**SMALL | {"num_key_value_heads": 1}, sliding_window=16)).eval().to(device)
    policy.attach(model, share_prompts=False)
    prompt = prompt_of(tokens)
    with torch.no_grad():
        batch = Layout(packed=False, device=torch.device(device)).batch([prompt])
        got = sums_of(model, batch).cpu()
        policy.detach(model)
        model.cpu().set_attn_implementation("eager")
        want = separate_passes(model, [prompt], 2)
    torch.testing.assert_close(got, want, atol=1e-2 if device == "cuda" else 1e-4, rtol=0)
