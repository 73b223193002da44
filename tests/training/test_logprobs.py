"""Chunked log-probabilities against the plain computation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clha.training.logprobs import sum_by_response, token_logprobs


def case(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 16, dtype=dtype, requires_grad=True)
    bias = torch.randn(50, dtype=dtype, requires_grad=True)
    # Some positions predict several tokens, as the last token of a prompt does.
    rows = torch.tensor([0, 0, 0, *range(1, 23), 22])
    return hidden, weight, bias, rows, torch.randint(0, 50, (len(rows),))


def plain(hidden, weight, bias, rows, targets, scale=1.0, softcap=None):
    logits = hidden @ weight.t() + (0 if bias is None else bias)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)[rows, targets]


@pytest.mark.parametrize("logits_bytes", [1, 4 * 50 * 5, 1 << 20])
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), [(1.0, None, False), (0.25, None, True), (1.0, 3.0, True)])
def test_values_and_gradients_equal_the_plain_computation_to_1e_5(logits_bytes, scale, softcap, with_bias):
    hidden, weight, bias, rows, targets = case()
    bias = bias if with_bias else None
    got = token_logprobs(
        hidden, weight, rows, targets, bias=bias, scale=scale, softcap=softcap, logits_bytes=logits_bytes
    )
    upstream = torch.randn_like(got)
    want = plain(hidden, weight, bias, rows, targets, scale, softcap)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, _, rows, targets = case()
    weight = weight.detach()
    token_logprobs(hidden, weight, rows, targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_memory_grows_with_the_chunk_not_with_tokens_times_vocabulary():
    vocabulary, chunk = 400, 8
    for tokens in (64, 256):
        hidden = torch.randn(tokens, 4, requires_grad=True)
        weight = torch.randn(vocabulary, 4, requires_grad=True)
        targets = torch.randint(0, vocabulary, (tokens,))
        with Largest() as largest:
            logps = token_logprobs(hidden, weight, torch.arange(tokens), targets, logits_bytes=4 * vocabulary * chunk)
            logps.sum().backward()
        assert largest.elements <= vocabulary * chunk


def test_bf16_autocast_computes_products_in_bf16_and_sums_in_float32():
    hidden, weight, _, rows, targets = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden, weight, rows, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(hidden, weight, None, rows, targets), atol=0.2, rtol=0.05)
    got.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_sums_by_response_leave_absent_cells_at_zero():
    sums = sum_by_response(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 3, 3]), 2, 2)
    assert sums.tolist() == [[1.0, 0.0], [0.0, 6.0]]
