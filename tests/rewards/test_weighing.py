"""Rewards joined by id, never by position."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from reward_cases import candidate_row

from clha.reporting.tables import Ordering, pairs_of
from clha.rewards.trust import LabelTrust
from clha.rewards.weighing import Totals, Weighed, reward_table
from clha.schema import CANDIDATES, REWARDS, WEIGHTS
from clha.training.metrics import Sums


def tables(rewards: list[tuple[str, int, float]], candidates: list[tuple[str, int, str]]) -> tuple[pa.Table, pa.Table]:
    rows: list[dict[str, Any]] = [
        {"prompt_id": p, "candidate_id": c, "reward": r, "member_rewards": [r, r + 1], "truncated": False}
        for p, c, r in rewards
    ]
    texts = [candidate_row({"prompt_id": p}, c, f"{p}{c}", origin) for p, c, origin in candidates]
    return pa.Table.from_pylist(texts, schema=CANDIDATES), pa.Table.from_pylist(rows, schema=REWARDS)


CHOSEN, REJECTED, OWN = "dataset_chosen", "dataset_rejected", "generated"


def test_rows_in_any_order_and_shards_find_their_prompt() -> None:
    candidates, rewards = tables(
        [("b", 1, 4.0), ("a", 2, 3.0), ("b", 0, 2.0), ("a", 0, 1.0)],
        [("a", 0, OWN), ("a", 1, OWN), ("a", 2, CHOSEN), ("b", 0, REJECTED), ("b", 1, CHOSEN), ("c", 0, OWN)],
    )
    table = reward_table(candidates, pa.concat_tables([rewards.slice(0, 1), rewards.slice(1)]))
    assert table.prompt_ids.to_pylist() == ["a", "b"]
    assert table.unscored == ["c"]
    assert table.offsets.tolist() == [0, 2, 4]
    assert table.candidate_id.tolist() == [0, 2, 0, 1]
    assert table.reward.tolist() == [1.0, 3.0, 2.0, 4.0]
    assert table.label.tolist() == [0, 1, -1, 1]
    assert table.members.tolist() == [[1, 2], [3, 4], [2, 3], [4, 5]]


@pytest.mark.parametrize("origin", [CHOSEN, OWN])
@pytest.mark.parametrize("stranger", [("x", 0), ("a", 7)])
def test_a_reward_of_no_candidate_is_refused(stranger: tuple[str, int], origin: str) -> None:
    candidates, rewards = tables([("a", 0, 1.0), (*stranger, 2.0)], [("a", 0, origin)])
    with pytest.raises(ValueError, match="belongs to no candidate"):
        reward_table(candidates, rewards)


def test_prompts_come_by_their_number_of_candidates() -> None:
    candidates, rewards = tables(
        [("a", 0, 1.0), ("b", 0, 1.0), ("b", 1, 2.0), ("c", 0, 3.0)],
        [("a", 0, OWN), ("b", 0, OWN), ("b", 1, OWN), ("c", 0, OWN)],
    )
    found = [(p.tolist(), r.tolist()) for p, r in reward_table(candidates, rewards).by_size(range(0, 3))]
    assert found == [([0, 2], [[0], [3]]), ([1], [[1, 2]])]


def test_a_candidate_with_a_reward_without_one_and_of_no_prompt_are_told_apart() -> None:
    """Prompt a has no reward at all, so that b is the first place; b's candidate 1 lost its own."""
    candidates, rewards = tables(
        [("b", 0, 1.0), ("c", 0, 2.0)], [("a", 0, OWN), ("b", 0, OWN), ("b", 1, OWN), ("c", 0, OWN)]
    )
    table = reward_table(candidates, rewards)
    asked = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, -1), (0, 1 << 33)]
    scored, lost = table.has(*np.array(asked, dtype=np.int64).T)
    assert scored.tolist() == [True, False, False, True, False, False, False]
    assert lost.tolist() == [False, True, False, False, False, False, False]


def test_manifest_report_and_trainer_mean_the_same_by_effective_sample_size() -> None:
    """Soft pairs of 0.52 (three) and 0.9 (one): (3 x 0.52 + 0.9)^2 / (3 x 0.52^2 + 0.9^2) = 3.7330; both directions
    summed would say 4.9 or 4 of the four pairs."""
    soft = [0.52, 0.52, 0.52, 0.9]
    w = np.array([[[0, p], [1 - p, 0]] for p in soft])
    expected = (3 * 0.52 + 0.9) ** 2 / (3 * 0.52**2 + 0.9**2)
    totals = Totals()
    totals.add(Weighed(w, np.ones(4)))
    assert totals.facts()["effective_sample_size"] == pytest.approx(expected)

    ids = [f"p{i}" for i in range(4)]
    candidates, rewards = tables(
        [(p, c, 1.0 - c) for p in ids for c in (0, 1)], [(p, c, OWN) for p in ids for c in (0, 1)]
    )
    rows = [
        {"prompt_id": p, "order": [0, 1], "pair_weights": x.tolist(), "sft_index": 0, "sft_lambda": 1.0, "flags": []}
        for p, x in zip(ids, w, strict=True)
    ]
    ordering = Ordering("reward", LabelTrust(np.ones(2), None), labelled_only=False)
    pairs = pairs_of(candidates, rewards, pa.Table.from_pylist(rows, schema=WEIGHTS), ordering)
    assert pairs.effective_sample_size == pytest.approx(expected, rel=1e-6)

    batch: Any = SimpleNamespace(
        response_lengths=torch.ones(4, 2),
        candidate_mask=torch.ones(4, 2, dtype=torch.bool),
        pair_weights=torch.tensor(w),
        tokens=8,
        prompt_ids=ids,
    )
    sums = Sums("dpo")
    sums.add_batch(torch.zeros(4, 2), batch, {"total": torch.zeros(())})
    assert sums.metrics(1)["noise/effective_sample_size"] == pytest.approx(expected)
