"""Layers computed by `clha.training.layers` give what the model's own operations give."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from clha.training import layers

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
    out = layers.RmsNorm.apply(x, gain, 0.0)
    torch.testing.assert_close(out.detach(), torch.tensor([[3.0, 8.0]], dtype=torch.float64) / 12.5**0.5)
    out[0, 0].backward()
    n = torch.tensor([3.0, 4.0], dtype=torch.float64) / 12.5**0.5
    torch.testing.assert_close(x.grad[0], (torch.tensor([1.0, 0.0]) - n * n[0] / 2) / 12.5**0.5)
    torch.testing.assert_close(gain.grad, torch.stack([n[0], torch.zeros(()).double()]))


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, gate, up, down = made(2, 3, 5), made(2, 3, 5), made(2, 3, 5), made(4, 5)
    assert torch.autograd.gradcheck(lambda *a: layers.RmsNorm.apply(*a, 1e-6), (x, made(5)))
    assert torch.autograd.gradcheck(layers.Swiglu.apply, (gate, up))
    assert torch.autograd.gradcheck(lambda *a: layers.SwigluProjected.apply(*a, False), (gate, up, down))
    assert torch.autograd.gradcheck(layers.Linear.apply, (x, down, made(4)))
    ids = torch.tensor([[1, 2], [2, 0]])  # one row twice: its gradients add up
    assert torch.autograd.gradcheck(lambda w: layers.Embedding.apply(ids, w), (made(4, 3),))


@pytest.mark.parametrize(
    ("config", "norms", "mlps"),
    [
        (LlamaConfig(**SIZES), 5, 2),
        (LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True), 5, 2),
        (Qwen3Config(**SIZES), 9, 2),  # queries and keys have norms of their own
        (GemmaConfig(**SIZES), 5, 0),  # 1 + w; its MLP has another activation
        (GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key" not in k and k != "head_dim"}), 0, 0),
    ],
    ids=["llama", "tied, with biases", "qwen3", "gemma", "gpt_neox"],
)
def test_a_model_gives_the_same_logits_and_gradients_with_the_parts_that_are_known(config, norms: int, mlps: int):
    """Two micro-batches add up their gradients, by autograd and in place."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    ids = torch.randint(0, 99, (2, 2, 9))

    def logits_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        logits = [model(input_ids=part).logits for part in ids]
        for part in logits:
            part.square().mean().backward()
        return [*(part.detach() for part in logits), *(p.grad for p in model.parameters())]

    want = logits_and_gradients()
    for accumulate in (False, True):
        layers.fuse(model, accumulate)
        patched = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
        assert (sum("RMSNorm" in p for p in patched), sum("MLP" in p for p in patched)) == (norms, mlps)
        assert ("Linear" in patched) == accumulate
        for ours, theirs in zip(logits_and_gradients(), want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        layers.unfuse(model)
        assert not any("forward" in vars(m) for m in model.modules())


def test_gradients_are_added_in_place_where_one_is_there_and_nothing_waits_for_them():
    weight = torch.nn.Parameter(torch.eye(2))
    x = torch.tensor([[1.0, 2.0]])
    layers.Linear.apply(x, weight, None).sum().backward()
    first = weight.grad
    layers.Linear.apply(x, weight, None).sum().backward()
    assert weight.grad is first and first.tolist() == [[2.0, 4.0], [2.0, 4.0]]
    seen = []
    weight.register_hook(lambda grad: seen.append(grad.tolist()))
    layers.Linear.apply(x, weight, None).sum().backward()
    assert seen == [[[1.0, 2.0], [1.0, 2.0]]] and weight.grad.tolist() == [[3.0, 6.0], [3.0, 6.0]]


def test_layers_with_hooks_are_called_and_so_are_adapters():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    layers.fuse(model)
    calls = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=torch.arange(5)[None])
    assert calls == [1]


def test_states_of_lower_precision_go_the_models_own_way():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    layers.fuse(model, accumulate=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(input_ids=torch.arange(5)[None]).logits
    layers.unfuse(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, model(input_ids=torch.arange(5)[None]).logits)
