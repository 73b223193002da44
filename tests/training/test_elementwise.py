"""Norms and gated activations in blocks give what the model's own operations give."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from clha.training import elementwise

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def test_the_norm_of_one_row_by_hand():
    """x = (3, 4): mean of squares 12.5; with gain (1, 2) and eps 0 the norm is (3, 8) / sqrt(12.5).

    For the loss y_1 the slope is g = (1, 0): n = x / sqrt(12.5), mean(g * gain * n) = n_1 / 2,
    dx = ((1, 0) - n * n_1 / 2) / sqrt(12.5) and dgain = (n_1, 0).
    """
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    out = elementwise.RmsNorm.apply(x, gain, 0.0)
    torch.testing.assert_close(out.detach(), torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 12.5**0.5)
    out[0, 0].backward()
    n = torch.tensor([3.0, 4.0], dtype=torch.float64) / 12.5**0.5
    torch.testing.assert_close(x.grad[0], (torch.tensor([1.0, 0.0]) - n * n[0] / 2) / 12.5**0.5)
    torch.testing.assert_close(gain.grad, torch.stack([n[0], torch.zeros(()).double()]))


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
def test_gradients_are_those_of_finite_differences_however_rows_are_cut(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(elementwise, "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    x, gate, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    gain = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: elementwise.RmsNorm.apply(*a, 1e-6), (x, gain))
    assert torch.autograd.gradcheck(elementwise.Swiglu.apply, (gate, up))


@pytest.mark.parametrize(
    ("config", "norms", "mlps"),
    [
        (LlamaConfig(**SIZES), 5, 2),
        (Qwen3Config(**SIZES), 9, 2),  # queries and keys have norms of their own
        (GemmaConfig(**SIZES), 5, 0),  # 1 + w; its MLP has another activation
        (GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key" not in k and k != "head_dim"}), 0, 0),
    ],
    ids=["llama", "qwen3", "gemma", "gpt_neox"],
)
def test_a_model_gives_the_same_logits_and_gradients_with_the_parts_that_are_known(config, norms: int, mlps: int):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    ids = torch.randint(0, 99, (2, 9))

    def logits_and_gradients() -> list[torch.Tensor]:
        logits = model(input_ids=ids).logits
        return [logits.detach(), *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]

    want = logits_and_gradients()
    elementwise.fuse(model)
    patched = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
    assert (sum("RMSNorm" in p for p in patched), sum("MLP" in p for p in patched)) == (norms, mlps)
    for ours, theirs in zip(logits_and_gradients(), want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    elementwise.unfuse(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_states_of_lower_precision_go_the_models_own_way():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    elementwise.fuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(input_ids=torch.arange(5)[None]).logits
    elementwise.unfuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, model(input_ids=torch.arange(5)[None]).logits)
