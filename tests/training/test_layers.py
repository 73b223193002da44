"""Layers computed by `clha.training.layers` give what the model's own operations give."""

from collections.abc import Callable

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from clha.training import layers
from clha.training.logprobs import token_logprobs

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
    assert torch.autograd.gradcheck(layers.SwigluProjected.apply, (gate, up, down))
    assert torch.autograd.gradcheck(layers.Linear.apply, (x, down, made(4)))
    ids = torch.tensor([[1, 2], [2, 0]])  # one row twice: its gradients add up
    assert torch.autograd.gradcheck(lambda w: layers.Embedding.apply(ids.t(), w, None), (made(4, 3),))


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
    want = logits_and_gradients(model)
    for accumulate in (False, True):
        layers.fuse(model, accumulate)
        patched = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
        assert (sum("RMSNorm" in p for p in patched), sum("MLP" in p for p in patched)) == (norms, mlps)
        assert ("Linear" in patched) == accumulate
        for ours, theirs in zip(logits_and_gradients(model), want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        layers.unfuse(model)
        assert not any("forward" in vars(m) or layers._MARK in vars(m) for m in model.modules())


def logits_and_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of two batches, the second added to the first inside `adding_in_place`."""
    model.zero_grad()
    logits = [model(input_ids=ids).logits for ids in torch.randint(0, 99, (2, 2, 9), generator=torch.manual_seed(1))]
    with layers.adding_in_place():
        for part in logits:
            part.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return [*(part.detach() for part in logits), *(p.grad for p in trained)]


def test_adapters_train_as_they_do_without_and_frozen_weights_get_no_gradient():
    """On a projection that a gated MLP ends in, on one of attention, with dropout."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    lora = peft.LoraConfig(r=2, target_modules=["down_proj", "q_proj"], lora_dropout=0.3, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).train()
    torch.manual_seed(2)
    want = logits_and_gradients(adapted)
    layers.fuse(model, accumulate=True)
    assert sum("MLP" in type(m).__name__ for m in model.modules() if "forward" in vars(m)) == 2
    torch.manual_seed(2)
    for ours, theirs in zip(logits_and_gradients(adapted), want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_an_mlp_with_a_dropout_of_its_own_goes_its_own_way():
    class Dropped(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(x), p=0.5, training=self.training)

    config = LlamaConfig(**SIZES)
    for kind, fused in ((LlamaMLP, True), (Dropped, False)):
        mlp = kind(config).eval()
        state = torch.random.get_rng_state()
        layers.fuse(mlp)
        assert ("forward" in vars(mlp)) == fused and not mlp.training
        assert torch.equal(torch.random.get_rng_state(), state)


def test_a_norm_with_another_place_for_eps_goes_its_own_way():
    class OtherRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(16)), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)

    norm = OtherRMSNorm()
    layers.fuse(norm)
    assert "forward" not in vars(norm)


def test_a_forward_that_somebody_replaced_stays():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    norm = model.model.norm
    norm.forward = theirs = lambda x: x * 2
    layers.fuse(model, accumulate=True)
    assert norm.forward is theirs
    layers.unfuse(model)
    assert norm.forward is theirs


def products(weight: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """By name, something whose gradient for `weight` [2, 2] is not zero."""
    one, states = torch.ones(1, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    rows, targets = torch.tensor([0, 1]), torch.tensor([0, 1])
    return {
        "linear": lambda: layers.Linear.apply(one, weight, None),
        "embedding": lambda: layers.Embedding.apply(torch.tensor([[1]]), weight, None),
        "mlp": lambda: layers.SwigluProjected.apply(one, one, weight),
        "log-probabilities": lambda: token_logprobs(states, weight, rows, targets),
        "log-probabilities in chunks": lambda: token_logprobs(states, weight, rows, targets, logits_bytes=1),
    }


@pytest.mark.parametrize("name", list(products(torch.eye(2))))
def test_gradients_are_added_in_place_where_one_is_there_and_nothing_waits_for_them(name: str):
    weight = torch.nn.Parameter(torch.eye(2))
    seen: list[torch.Tensor] = []

    def backward() -> torch.Tensor:
        products(weight)[name]().sum().backward()
        assert weight.grad is not None
        return weight.grad

    with layers.adding_in_place():
        once = backward().clone()
        assert once.abs().sum() > 0
        before = weight.grad
        called = weight.grad._version
        assert backward() is before and torch.allclose(before, 2 * once) and before._version > called
        weight.register_hook(lambda grad: seen.append(grad.clone()))
        assert torch.allclose(backward(), 3 * once) and len(seen) == 1 and torch.allclose(seen[0], once)


@pytest.mark.parametrize("name", list(products(torch.eye(2))))
def test_outside_autograd_adds_and_other_gradients_leave_the_weights_alone(name: str):
    weight = torch.nn.Parameter(torch.eye(2))
    with layers.adding_in_place():
        products(weight)[name]().sum().backward()
    assert weight.grad is not None
    once = weight.grad.clone()
    (gradient,) = torch.autograd.grad(products(weight)[name]().sum(), weight)
    assert torch.equal(weight.grad, once) and torch.allclose(gradient, once)


def test_the_row_of_the_padding_gets_no_gradient():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    layers.Embedding.apply(torch.tensor([0, 2, 2]), weight, 2).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]


def test_layers_with_hooks_are_called():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    layers.fuse(model)
    calls = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=torch.arange(5)[None])
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_go_the_models_own_way(dtype: torch.dtype):
    """Of the weights, before and after the layers are taken over, and of autocast."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(dtype)
    ids = torch.arange(5)[None]
    want = model(input_ids=ids).logits
    layers.fuse(model, accumulate=True)
    assert not any("forward" in vars(m) for m in model.modules())
    model.float()
    layers.fuse(model, accumulate=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model(input_ids=ids).logits
    assert torch.equal(model.to(dtype)(input_ids=ids).logits, want)
    layers.unfuse(model.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, model(input_ids=ids).logits)
