"""Shared prompts against separate passes, for the families of architectures."""

from typing import Any

import numpy as np
import pytest
import torch
from policy_cases import PADDED, SHARING, SMALL, changed_copy, check_against_separate_passes, make, sums_of
from training_cases import VOCABULARY, Prompts
from transformers import (
    LlamaConfig,
    Phi3Config,
)

from clha.training import attention, attention_cuda, policy
from clha.training.batches import MicroBatch, RankedPrompt, Segments, pack, pad


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
