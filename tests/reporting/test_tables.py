"""Pairs and scores are joined by id, whatever the order of the rows and the number of candidates."""

import numpy as np
import pyarrow as pa
import pytest
from fabricated import Fabricated

from clha.reporting import tables
from clha.schema import REWARDS, SCORES, WEIGHTS


def rewards(values: dict[tuple[str, int], float]) -> pa.Table:
    rows = [
        {"prompt_id": p, "candidate_id": c, "reward": r, "member_rewards": [r], "truncated": False}
        for (p, c), r in values.items()
    ]
    return pa.Table.from_pylist(rows, schema=REWARDS)


def weights(rows: list[tuple[str, list[int], list[list[float]], int]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"prompt_id": p, "order": o, "pair_weights": w, "sft_index": i, "sft_lambda": 1.0, "flags": []}
            for p, o, w, i in rows
        ],
        schema=WEIGHTS,
    )


def test_pairs_of_unlike_prompts_are_joined_by_id() -> None:
    """Prompt b: 3 candidates, best first 2, 0, 1; prompt a: 2; prompt c: one, hence no pair."""
    found = tables.pairs_of(
        rewards({("a", 1): 5.0, ("b", 0): 1.0, ("c", 0): 7.0, ("b", 1): 0.5, ("a", 0): 1.0, ("b", 2): 3.0}),
        weights(
            [
                ("b", [2, 0, 1], [[0, 1, 0.5], [0, 0, 0], [0, 0, 0]], 0),
                ("c", [0], [[0]], 0),
                ("a", [1, 0], [[0, 0.25], [0.5, 0]], 1),
            ]
        ),
    )
    rows = {
        (found.prompt_ids[p], int(f), int(s)): (float(g), float(w), int(d))
        for p, f, s, g, w, d in zip(
            found.prompt, found.first, found.second, found.gap, found.weight, found.distance, strict=True
        )
    }
    assert rows == {
        ("b", 2, 0): (2.0, 1.0, 1),
        ("b", 2, 1): (2.5, 0.5, 2),
        ("b", 0, 1): (0.5, 0.0, 1),
        ("a", 1, 0): (4.0, 0.75, 1),
    }
    assert found.kept.sum() == 3
    assert dict(zip(found.prompt_ids, found.best_reward, strict=True)) == {"b": 3.0, "c": 7.0, "a": 1.0}


def test_the_effective_sample_size_of_unlike_weights() -> None:
    """Weights 1, 1, 2: (1 + 1 + 2)^2 / (1 + 1 + 4) = 16 / 6."""
    found = tables.pairs_of(
        rewards({(p, c): float(c) for p in "abc" for c in (0, 1)}),
        weights([(p, [1, 0], [[0, w], [0, 0]], 0) for p, w in (("a", 1), ("b", 1), ("c", 2))]),
    )
    assert found.effective_sample_size == pytest.approx(16 / 6)


def test_a_ranked_candidate_without_a_reward_is_refused() -> None:
    with pytest.raises(KeyError):
        tables.pairs_of(rewards({("a", 0): 1.0}), weights([("a", [0, 1], [[0, 1], [0, 0]], 0)]))


def test_prompts_with_one_candidate_have_no_pairs() -> None:
    found = tables.pairs_of(rewards({("a", 0): 1.0}), weights([("a", [0], [[0]], 0)]))
    assert len(found.gap) == 0
    assert found.effective_sample_size == 0


def test_scores_are_paired_by_id() -> None:
    rows = [("x", "trained", 3.0), ("y", "base", 2.0), ("y", "trained", 1.0), ("x", "base", 1.0), ("z", "base", 9.0)]
    table = pa.Table.from_pylist(
        [
            {"prompt_id": i, "policy": p, "reward": r, "length": 4, "training_reward": -r, "truncated": False}
            for i, p, r in rows
        ],
        schema=SCORES,
    )
    found = tables.paired_scores(table)
    assert found.prompt_ids == ["x", "y"]
    assert found.gain.tolist() == [2.0, -1.0]
    assert (found.trained_training - found.base_training).tolist() == [-2.0, 1.0]


def test_splits_are_counted_per_subset(made: Fabricated) -> None:
    table = made.nodes["prepare"].read("prompts", ["prompt_id", "subset", "split"])
    rows = tables.split_counts(table)
    assert sum(r["total"] for r in rows) == table.num_rows
    assert sum(r.get("test", 0) for r in rows) == 96
    assert np.all(np.diff([r["total"] for r in rows]) <= 0)
