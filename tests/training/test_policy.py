"""Shared prompts against separate passes, for the families of architectures."""

import copy
import functools
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from training_cases import VOCABULARY, Prompts
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from clha.errors import UserError
from clha.training import attention, attention_cuda, compiling, policy
from clha.training.batches import MicroBatch, RankedPrompt, Segments, pack, pad
from clha.training.logprobs import sum_by_response

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}

SHARING = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 with windows": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=4),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=4, query_pre_attn_scalar=16),
    "gpt-neox": GPTNeoXConfig(**NEOX),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
}
PADDED = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "llama4": Llama4TextConfig(
        **SMALL, head_dim=16, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=96
    ),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2),
}


def make(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # The usual small initial weights would hide a wrong mask behind near-uniform attention.
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def separate_passes(model: Any, prompts: list[RankedPrompt], n: int) -> torch.Tensor:
    """[B, n] summed log-probabilities by one unpadded pass per response through the model's own forward."""
    rows = []
    for prompt in prompts:
        sums = []
        for response in prompt.responses:
            ids = torch.tensor([[*prompt.prompt.tolist(), *response.tolist()]])
            logps = model(input_ids=ids).logits[0, len(prompt.prompt) - 1 : -1].float().log_softmax(-1)
            sums.append(logps.gather(1, ids[0, len(prompt.prompt) :, None]).sum())
        rows.append(torch.stack([*sums, *[torch.zeros(())] * (n - len(sums))]))
    return torch.stack(rows)


def sums_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    return sum_by_response(policy.response_logps(model, batch), batch.target_cell, *batch.candidate_mask.shape)


def gradients(model: Any, sums: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (sums * upstream).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_against_separate_passes(model: Any, packed: bool, checkpointing: bool = False) -> None:
    prompts = Prompts(5).items
    batch = pack(prompts, multiple_of=16) if packed else pad(prompts)
    upstream = torch.randn(batch.candidate_mask.shape, generator=torch.Generator().manual_seed(3))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    got = sums_of(model, batch)
    ours = gradients(model, got, upstream)
    policy.detach(model)
    if checkpointing:
        model.gradient_checkpointing_disable()
        model.eval()
    model.set_attn_implementation("eager")
    want = separate_passes(model, prompts, batch.candidate_mask.shape[1])
    theirs = gradients(model, want, upstream)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("name", SHARING)
def test_shared_prompts_equal_separate_passes(name: str):
    model = make(SHARING[name]).eval()
    abilities = policy.attach(model)
    assert abilities == policy.Abilities(shares_prompts=True, plain_head=True)
    check_against_separate_passes(model, packed=True)


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name: str):
    model = make(SHARING[name])
    assert policy.attach(model).shares_prompts
    check_against_separate_passes(model, packed=True, checkpointing=True)


@pytest.mark.parametrize("name", PADDED)
def test_an_architecture_that_cannot_share_takes_padded_rows_and_says_so_in_one_line(name: str):
    model = make(PADDED[name]).eval()
    abilities = policy.attach(model)
    assert not abilities.shares_prompts
    assert "padded rows instead" in abilities.reason and "\n" not in abilities.reason
    check_against_separate_passes(model, packed=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHARING)
def test_weights_of_16_bits_hide_neither_a_right_layout_nor_a_wrong_one(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """The wrong one: the second response of a prompt sees the first."""

    def wrong(prompts: list[RankedPrompt], **how: Any) -> MicroBatch:
        batch = pack(prompts, **how)
        (start, end, (one, two, *rest)), *others = batch.segments.groups
        batch.segments = Segments(batch.segments.length, [(start, end, [(one[0], two[1]), *rest]), *others])
        return batch

    model = make(SHARING[name]).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert policy.attach(model) == policy.Abilities(shares_prompts=True, plain_head=True)
    monkeypatch.setattr(policy, "pack", wrong)
    assert "log-probabilities differ" in policy.attach(model).reason
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])


def test_weights_of_16_bits_that_are_read_from_outside_are_tried_as_they_are():
    model, square = make(LlamaConfig(**SMALL)).to(torch.bfloat16), torch.eye(64, dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.model.norm.register_forward_hook(lambda module, inputs, out: out @ square)
    assert policy.attach(model) == policy.Abilities(shares_prompts=True, plain_head=True)


@pytest.mark.parametrize("name", PADDED)
def test_an_architecture_that_cannot_share_says_so_with_weights_of_16_bits_too(name: str):
    assert "padded rows instead" in policy.attach(make(PADDED[name]).to(torch.bfloat16)).reason


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox"])
def test_padded_rows_on_request_equal_separate_passes(name: str):
    model = make(SHARING[name]).eval()
    assert policy.attach(model, share_prompts=False) == policy.Abilities(shares_prompts=False, plain_head=True)
    check_against_separate_passes(model, packed=False)


STRETCHED = {
    "dynamic": LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}),
    "longrope": Phi3Config(
        **SMALL,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    ),
}


@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("share_prompts", [True, False])
def test_positions_that_the_longest_row_stretches_are_told_in_one_line(kind: str, share_prompts: bool):
    """Short prompts do not show it: the trial against the model's own forward finds no difference."""
    abilities = policy.attach(make(STRETCHED[kind]).eval(), share_prompts)
    assert not abilities.shares_prompts and "\n" not in abilities.reason
    limit = {"dynamic": 256, "longrope": 16}[kind]
    assert f"its {kind} rotary positions are scaled by the longest row: beyond {limit} tokens" in abilities.reason
    assert ("padded rows instead" in abilities.reason) is share_prompts


def test_positions_that_the_longest_row_stretches_do_depend_on_neighbours():
    """What the line says: alone, 13 tokens are within 16; beside a row of 20 they are taken for long ones."""
    model = make(STRETCHED["longrope"]).eval()
    policy.attach(model)
    short, long = (
        RankedPrompt("x", np.arange(size), [np.arange(8)], np.zeros(1), np.zeros((1, 1)), 0, 1.0) for size in (6, 13)
    )
    alone, beside = (sums_of(model, pad(prompts))[0, 0] for prompts in ([short], [short, long]))
    assert abs((alone - beside).item()) > 1e-3


def test_a_head_that_is_more_than_a_product_uses_the_models_own_logits():
    class Doubled(torch.nn.Linear):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return super().forward(states) * 2

    model = make(LlamaConfig(**SMALL, tie_word_embeddings=False)).eval()
    model.lm_head.__class__ = Doubled
    assert policy.attach(model) == policy.Abilities(shares_prompts=True, plain_head=False)
    check_against_separate_passes(model, packed=True)


def test_a_model_whose_attention_ignores_the_segments_is_found_out():
    model = make(LlamaConfig(**SMALL)).eval()
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, own=own, segments=None, **k: own(*a, **k)
    assert not policy.attach(model).shares_prompts


def test_everybody_else_still_gets_the_models_own_forward_and_attention():
    model = make(LlamaConfig(**SMALL)).eval()
    ids = torch.randint(0, VOCABULARY, (2, 7))
    before, implementation = model(input_ids=ids).logits, model.config._attn_implementation
    policy.attach(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 10)
    policy.detach(model)
    assert model.config._attn_implementation == implementation and "forward" not in vars(model)


def changed_copy(model: Any) -> Any:
    """A copy whose weights are half of the model's."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model, ids, batch = make(SHARING["llama"]).eval(), torch.randint(0, VOCABULARY, (2, 7)), pack(Prompts(2).items)
    want = changed_copy(model)(input_ids=ids).logits
    policy.attach(model)
    other = changed_copy(model)
    torch.testing.assert_close(other(input_ids=ids).logits, want)
    assert not torch.allclose(sums_of(other, batch), sums_of(model, batch))
    policy.detach(model)


@pytest.mark.parametrize("window", [None, 5, 64, 70])
def test_long_prompts_and_responses_are_cut_into_tiles_that_change_nothing(window: int | None):
    """Prompts of 150 and 39 with responses of 140, 1, 70 and 31, 0, 39, in float64, against attention written out."""
    first = (0, 150, [(150, 290), (290, 291), (291, 361)])
    segments = Segments(480, [first, (361, 400, [(400, 431), (431, 431), (431, 470)])])
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 480, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(1, 470, 4, 8, dtype=torch.float64)
    results = []
    for function in (
        lambda *x: attention._Tiled.apply(*x, segments, 0.3, window),
        lambda *x: attention._plain(*x, segments, 0.3, window, None, 0.0),
    ):
        out = function(*states)[:, :470]
        results.append([out, *torch.autograd.grad(out, states, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_probabilities_that_are_too_many_to_keep_are_computed_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_KEPT_KEYS", 0)
    model = make(SHARING["llama"]).eval()
    policy.attach(model)
    check_against_separate_passes(model, packed=True)


@pytest.mark.parametrize("window", [None, 1, 3, 70, 200])
def test_the_block_mask_of_flex_attention_is_the_same_rule(window: int | None):
    """Token by token, and in its blocks: those that PyTorch finds in the whole mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    long = Segments(512, [(0, 150, [(150, 290), (290, 290), (290, 361)]), (361, 400, [])])
    for segments in (pack(Prompts(5).items, multiple_of=128).segments, long):
        mask, at = attention_cuda.block_mask(segments, window, "cpu"), torch.arange(segments.length)
        padding = torch.diag(segments.token_maps()[0] < 0)  # sees itself: softmax over nothing is NaN
        got = mask.mask_mod(None, None, at[:, None], at[None, :])
        assert torch.equal(got, attention._visible(segments, window, torch.device("cpu")) | padding)
        want = create_block_mask(mask.mask_mod, None, None, segments.length, segments.length, device="cpu")
        for ours, theirs in zip(mask.as_tuple(flatten=False), want.as_tuple(flatten=False), strict=True):
            assert not isinstance(ours, torch.Tensor) or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


# -- compiled blocks ---------------------------------------------------------------------------------------------

COMPILER = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("c++"), reason="c++")])


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """What turns the graphs of `torch.compile` into programs; "aot_eager" runs them as they are, forward and backward.

    Nothing compiled before is known.
    """
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))
    yield request.param
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", COMPILER], indirect=True)
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"]
)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral with a window", "gemma2", "gpt-neox")),
    ],
)
def test_compiled_blocks_change_nothing(name: str, checkpointing: bool, backend: str):
    model = make(SHARING[name]).eval()
    assert policy.attach(model, compiled=True).shares_prompts
    check_against_separate_passes(model, packed=True, checkpointing=checkpointing)


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_blocks_are_compiled_once_for_rows_of_every_length(backend: str):
    """Four parts of a block: up to its attention, in it before and after the call, and the rest."""
    from torch._dynamo.utils import counters

    model, graphs = make(SHARING["llama"]), []
    policy.attach(model, compiled=True)
    counters.clear()
    for prompts in (3, 5, 7, 2):
        sums_of(model, pack(Prompts(prompts).items)).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    policy.detach(model)
    assert graphs == [4, 4, 4, 4]


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_detaching_takes_compiled_blocks_away_again(backend: str):
    model = make(SHARING["llama"])
    policy.attach(model, compiled=True)
    blocks = list(model.model.layers)
    assert all("forward" in vars(block) for block in blocks)
    policy.detach(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_copy_of_a_model_of_compiled_blocks_computes_with_its_own_weights(backend: str):
    model, batch = make(SHARING["llama"]).eval(), pack(Prompts(2).items)
    plain = changed_copy(model)
    policy.attach(plain)
    want = sums_of(plain, batch)
    policy.detach(plain)
    policy.attach(model, compiled=True)
    torch.testing.assert_close(sums_of(changed_copy(model), batch), want)
    policy.detach(model)


def test_a_model_without_known_blocks_is_not_compiled_and_says_so():
    model = make(SHARING["llama"])
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match="torch_compile: LlamaForCausalLM has no blocks that are known here"):
        compiling.compile_blocks(model)


# -- on a CUDA device --------------------------------------------------------------------------------------------

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
