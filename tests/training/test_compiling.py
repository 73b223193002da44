"""Blocks that are compiled compute what they computed before."""

import functools
import shutil
from collections.abc import Iterator

import pytest
import torch
from policy_cases import SHARING, changed_copy, check_against_separate_passes, make, sums_of
from training_cases import Prompts

from clha.errors import UserError
from clha.training import compiling, policy
from clha.training.batches import pack

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
