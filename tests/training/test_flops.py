"""How much arithmetic a batch needs: worked by hand for small shapes, with windows and with an adapter."""

from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

from clha.training.batches import MicroBatch, RankedPrompt, pack, pad
from clha.training.flops import training_flops

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Per layer: q and o 64 x 64, k and v 32 x 64, gate, up and down 96 x 64: 8192 + 4096 + 18432 = 30720 weights.
BODY, HEAD = 2 * 30720, 99 * 64
# Attention per pair, 4 heads of width 16: 2 * 64 for the score, 2 * 64 for the value, backward twice that.
PAIR = 3 * 4 * 64


def prompt() -> RankedPrompt:
    """Prompt of 3 tokens with responses of 3 and 1."""
    responses = [np.array([20, 21, 22]), np.array([30])]
    return RankedPrompt("a", np.array([10, 11, 12]), responses, np.array([2.0, 1.0]), np.zeros((2, 2)), 0, 1.0)


def flops(config: PreTrainedConfig, batch: MicroBatch) -> float:
    return training_flops(AutoModelForCausalLM.from_config(config), batch)


@pytest.mark.parametrize(
    ("config", "packed_pairs", "padded_pairs"),
    [
        # Packed: the prompt 1 + 2 + 3, the first response's two inputs 4 + 5. Padded: 1 + ... + 5 and 1 + 2 + 3.
        (LlamaConfig(**SHAPE), 2 * 15, 2 * 21),
        # With a window of 2 keys: 1 + 2 + 2 and 2 + 2; 1 + 2 + 2 + 2 + 2 and 1 + 2 + 2.
        (MistralConfig(**SHAPE, sliding_window=2), 2 * 9, 2 * 14),
        # In the second layer alone.
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=2, max_window_layers=1), 15 + 9, 21 + 14),
        # A width that is not used.
        (Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=2), 2 * 15, 2 * 21),
    ],
    ids=["llama", "windows", "windows in some layers", "no windows"],
)
def test_each_layer_counts_the_pairs_that_its_window_leaves(
    config: PreTrainedConfig, packed_pairs: int, padded_pairs: int
):
    """Packed 5 tokens, 3 of which predict; padded 5 and 3 tokens, of which 3 and 1 predict."""
    assert flops(config, pack([prompt()])) == 6 * (5 * BODY + 3 * HEAD) + PAIR * packed_pairs
    assert flops(config, pad([prompt()])) == 6 * (8 * BODY + 4 * HEAD) + PAIR * padded_pairs


def test_of_frozen_weights_no_gradient_is_computed():
    """Rank 2 on q: 2 x 64 and 64 x 2 in each layer, at 6 operations a weight and token; the frozen ones at 4."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), LoraConfig(r=2, target_modules=["q_proj"])
    )
    want = 5 * (4 * BODY + 6 * 2 * 256) + 3 * 4 * HEAD + PAIR * 2 * 15
    assert training_flops(model.get_base_model(), pack([prompt()])) == want
