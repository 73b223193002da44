"""Shared prompts and FlexAttention on a CUDA device, and bfloat16 there and on the CPU, against float32 on it."""

import pytest
import torch
from policy_cases import SHARING, gradients, make, separate_passes, sums_of
from training_cases import Prompts

from clha.training import attention, attention_cuda, policy
from clha.training.batches import Segments, pack

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def distances(name: str, device: str, *, bf16: bool = False, checkpointing: bool = False) -> tuple[float, float]:
    """How far shared prompts on `device` are from separate passes in float32 on the CPU: the largest difference of a
    sum of log-probabilities, and the relative difference of the gradient."""
    model = make(SHARING[name]).eval().to(device)
    assert policy.attach(model).shares_prompts
    prompts = Prompts(5).items
    batch = pack(prompts, multiple_of=128).to(torch.device(device))
    upstream = torch.randn(batch.candidate_mask.shape, generator=torch.Generator().manual_seed(3))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        got = sums_of(model, batch)
    ours = gradients(model, got, upstream.to(device)).cpu()
    policy.detach(model)
    if checkpointing:
        model.gradient_checkpointing_disable()
    model.cpu().eval().set_attn_implementation("eager")
    want = separate_passes(model, prompts, got.shape[1])
    theirs = gradients(model, want, upstream)
    apart = (got.detach().cpu() - want.detach()).abs().max()
    return float(apart), float((ours - theirs).norm() / theirs.norm())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma2"])
def test_shared_prompts_equal_separate_passes_on_cuda_gradients_too(name: str, checkpointing: bool):
    apart, gradient = distances(name, "cuda", checkpointing=checkpointing)
    assert apart < 1e-2 and gradient < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, needs_cuda))])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_gradients_computed_in_bfloat16_are_those_of_float32_within_its_precision(
    name: str, checkpointing: bool, device: str
):
    """bfloat16 has 8 bits: 0.4% for each product, and three layers of them."""
    apart, gradient = distances(name, device, bf16=True, checkpointing=checkpointing)
    assert 0 < gradient < 0.1 and apart < 1.0


def states_and_upstream(
    segments: Segments, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries of 4 heads, keys and values of 2, and a gradient from above for all but the padding."""
    torch.manual_seed(0)
    given = {"device": "cuda", "dtype": dtype}
    states = [torch.randn(1, heads, segments.length, 16, **given, requires_grad=True) for heads in (4, 2, 2)]
    used = max(responses[-1][1] for *_, responses in segments.groups)
    return states, torch.randn(1, used, 4, 16, **given)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_flex_attention_and_its_gradients_equal_attention_written_out(window: int | None, softcap: float | None):
    """Prompt 150 and responses 140, 1 and 70, in a row of 384; what the padding behind them sees counts nowhere."""
    segments = Segments(384, [(0, 150, [(150, 290), (290, 291), (291, 361)])])
    (states, upstream), results = states_and_upstream(segments), []
    for function in (
        lambda *x: attention_cuda.flex_attention(*x, segments, 0.3, window, softcap),
        lambda *x: attention._plain(*x, segments, 0.3, window, softcap, 0.0),
    ):
        out = function(*states)[:, :361]
        results.append([out, *torch.autograd.grad(out, states, upstream)])
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.gpu
@needs_cuda
def test_flex_attention_is_compiled_once_for_rows_of_every_length_and_window():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for length in (256, 384, 512, 640, 1024, 1152):
        segments = Segments(length, [(0, 100, [(100, 140), (140, length - 7)])])
        for window in (None, 5):
            states, upstream = states_and_upstream(segments, torch.bfloat16)
            out = attention_cuda.flex_attention(*states, segments, 0.25, window, None)[:, : upstream.shape[1]]
            torch.autograd.grad(out, states, upstream)
    assert counters["stats"]["unique_graphs"] == 1
