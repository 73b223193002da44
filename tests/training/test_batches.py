"""Layouts: what stands where, what predicts what, who may see whom."""

import numpy as np
import pytest
import torch
from training_cases import Prompts

from clha.training.attention import _visible
from clha.training.batches import RankedPrompt, pack, pad, split_by_tokens


def example() -> list[RankedPrompt]:
    """Prompt 10 11 12 with responses 20 21 22 | 30, and prompt 13 with response 40 41."""
    shape = {"sft_index": 0, "sft_lambda": 1.0}
    return [
        RankedPrompt(
            "a",
            np.array([10, 11, 12]),
            [np.array([20, 21, 22]), np.array([30])],
            np.array([2.0, 1.0]),
            np.array([[0, 1], [0, 0]], dtype=np.float32),
            generator_logps=[np.array([-1.0, -2.0, -3.0]), None],
            **shape,
        ),
        RankedPrompt("b", np.array([13]), [np.array([40, 41])], np.array([5.0]), np.zeros((1, 1)), **shape),
    ]


def test_a_packed_row_holds_each_prompt_once_and_positions_restart_per_response():
    batch = pack(example(), multiple_of=4)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 13, 40, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0]]
    assert batch.segments.groups == [(0, 3, [(3, 5), (5, 5)]), (5, 6, [(6, 7)])]
    assert batch.tokens == 7


def test_every_response_token_is_predicted_from_the_token_before_it():
    """The last prompt token (position 2) predicts the first token of both responses; no position predicts twice."""
    batch = pack(example())
    assert batch.predict_at.tolist() == [2, 3, 4, 5, 6]
    assert batch.target_row.tolist() == [0, 0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [20, 30, 21, 22, 40, 41]
    assert batch.target_cell.tolist() == [0, 1, 0, 0, 2, 2]
    assert batch.generator_logps.nan_to_num(9).tolist() == [-1, 9, -2, -3, 9, 9]


def test_the_padded_layout_predicts_the_same_tokens_of_the_same_responses():
    batch = pad(example())
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 0, 0], [13, 40, 0, 0, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 3, 2]
    tokens = sorted(zip(batch.target_cell.tolist(), batch.targets.tolist(), strict=True))
    assert tokens == [(0, 20), (0, 21), (0, 22), (1, 30), (2, 40), (2, 41)]


def test_absent_candidates_are_masked_and_carry_no_weight():
    batch = pack(example())
    assert batch.response_lengths.tolist() == [[3, 1], [2, 0]]
    assert batch.candidate_mask.tolist() == [[True, True], [True, False]]
    assert torch.isnan(batch.rewards[1, 1])
    assert batch.pair_weights[1].sum() == 0


def test_a_response_sees_its_prompt_and_itself_only():
    batch = pack(example(), multiple_of=4)
    seen = _visible(batch.segments, None, torch.device("cpu"))
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[:3, :3] = torch.ones(3, 3, dtype=torch.bool).tril()
    want[3, :4] = want[4, :5] = True
    want[5, 5] = want[6, 5] = want[6, 6] = True
    assert torch.equal(seen, want)
    assert batch.segments.attended_pairs() == int(want.sum())


def test_a_window_counts_positions_not_places_in_the_row():
    prompt = example()[0]
    batch = pack([RankedPrompt(**(vars(prompt) | {"responses": [np.array([20, 21, 22]), np.array([30, 31])]}))])
    seen = _visible(batch.segments, 2, torch.device("cpu"))
    # Token 30 stands at place 5, position 3: with window 2 it sees position 2 (place 2) and itself.
    assert seen[5].nonzero().flatten().tolist() == [2, 5]
    assert batch.segments.attended_pairs(2) == int(seen.sum())


@pytest.mark.parametrize("packed", [True, False])
def test_splitting_keeps_every_prompt_once_within_the_budget(packed: bool):
    prompts = Prompts(40).items
    parts = split_by_tokens(prompts, 120, packed)
    assert sorted(p.prompt_id for part in parts for p in part) == sorted(p.prompt_id for p in prompts)
    for part in parts:
        layout = pack(part) if packed else pad(part)
        assert layout.input_ids.numel() <= 120 or len(part) == 1
    if packed:
        total = sum(p.packed_tokens for p in prompts)
        assert len(parts) <= -(-total // 120) + 1


def test_a_prompt_above_the_budget_gets_a_micro_batch_of_its_own():
    parts = split_by_tokens(Prompts(3).items, 5)
    assert [len(part) for part in parts] == [1, 1, 1]
