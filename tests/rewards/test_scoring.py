"""Batches by token budget: nothing lost, nothing reordered, halved when memory runs out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clha.errors import StageFailure
from clha.rewards.scoring import (
    Padding,
    computed_tokens,
    in_chunks,
    length_batches,
    lengths_mask,
    padded,
    run_batches,
)

lengths = st.lists(st.integers(1, 50), max_size=40)


@given(lengths, st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget(sizes: list[int], budget: int) -> None:
    batches = length_batches(sizes, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(sizes)))
    for b in batches:
        assert len(b) == 1 or len(b) * max(sizes[i] for i in b) <= budget


@given(lengths)
def test_longest_come_first(sizes: list[int]) -> None:
    order = [sizes[i] for b in length_batches(sizes, 60) for i in b]
    assert order == sorted(sizes, reverse=True)


@given(lengths.filter(bool), st.integers(1, 120))
def test_less_than_a_quarter_of_a_batch_is_padding(sizes: list[int], budget: int) -> None:
    padding = Padding()
    for b in length_batches(sizes, budget):
        assert min(sizes[i] for i in b) >= 0.75 * max(sizes[i] for i in b)
        padding.add([sizes[i] for i in b])
    assert padding.fraction < 0.25
    assert padding.tokens == computed_tokens(sizes, budget)


def test_batches_worked_by_hand() -> None:
    """Lengths 3, 10, 4 and budget 12: 10 alone, then 4 and 3 (2 x 4 = 8). 18 computed, 1 of them padding."""
    assert length_batches([3, 10, 4], 12) == [[1], [2, 0]]
    assert computed_tokens([3, 10, 4], 12) == 18


def test_a_batch_ends_where_padding_would_be_more_than_a_quarter() -> None:
    """Three quarters of 8 are 6: 7 and 6 stand beside it, 5 and 4 make the next batch, however large the budget."""
    assert length_batches([4, 8, 6, 5, 7], 1000) == [[1, 4, 2], [3, 0]]


@given(lengths.filter(bool), st.integers(1, 120))
def test_results_come_in_the_order_given(sizes: list[int], budget: int) -> None:
    out = run_batches(sizes, lambda rows: [np.array([sizes[i] * 2.0]) for i in rows], tokens_per_batch=budget)
    assert [float(o[0]) for o in out] == [s * 2.0 for s in sizes]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(error: Exception) -> None:
    tried: list[int] = []

    def run(rows: list[int]) -> list[np.ndarray]:
        tried.append(len(rows))
        if len(rows) > 2:
            raise error
        return [np.array([float(i)]) for i in rows]

    out = run_batches([5] * 7, run, tokens_per_batch=1000)
    assert tried == [7, 3, 1, 2, 4, 2, 2]
    assert [float(o[0]) for o in out] == [0, 1, 2, 3, 4, 5, 6]


def test_one_sequence_that_does_not_fit_is_a_failure_that_says_what_to_do() -> None:
    def run(rows: list[int]) -> list[np.ndarray]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(StageFailure, match="one sequence of 9 tokens; lower max_tokens"):
        run_batches([9], run, tokens_per_batch=100)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    def run(rows: list[int]) -> list[np.ndarray]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_batches([1, 2], run, tokens_per_batch=100)


def test_padding_is_counted() -> None:
    """One batch of 4 and 1 tokens: 8 computed, 3 of them padding."""
    padding = Padding()
    run_batches([4, 1], lambda rows: [np.zeros(1) for _ in rows], tokens_per_batch=9, batches=[[0, 1]], padding=padding)
    assert (padding.tokens, padding.padded, padding.fraction) == (8, 3, 3 / 8)


def test_padding_stands_on_the_right() -> None:
    cpu = torch.device("cpu")
    assert padded([[1, 2, 3], [4]], 9, cpu).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert lengths_mask([[1, 2, 3], [4]], cpu).tolist() == [[1, 1, 1], [1, 0, 0]]


def test_chunks_cover_the_count() -> None:
    assert [list(c) for c in in_chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert list(in_chunks(0, 2)) == []
