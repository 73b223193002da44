"""Rewards joined by id, never by position."""

from typing import Any

import pyarrow as pa
import pytest
from reward_cases import candidate_row

from clha.rewards.weighing import reward_table
from clha.schema import CANDIDATES, REWARDS


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
