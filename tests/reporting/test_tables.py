"""Pairs and scores are joined by id, whatever the order of the rows and the number of candidates."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fabricated import Fabricated
from scipy.special import logit

from clha.reporting import tables
from clha.reporting.tables import Ordering, Pairs
from clha.rewards.trust import LabelTrust
from clha.schema import REWARDS, SCORES, WEIGHTS


def rewards(values: dict[tuple[str, int], float | list[float]]) -> pa.Table:
    """Of each candidate: the reward, or those of the members."""
    rows = [
        {"prompt_id": p, "candidate_id": c, "reward": float(np.mean(r)), "member_rewards": np.atleast_1d(r).tolist(),
         "truncated": False}
        for (p, c), r in values.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=REWARDS)


def joined(
    scored: pa.Table,
    weighed: pa.Table,
    origins: dict[int, str] | None = None,
    rank_by: str = "reward",
    labelled_only: bool = False,
    **trust: Any,
) -> Pairs:
    """`pairs_of`, candidates being those that are scored; `origins` by candidate_id, the others are generated."""
    named = [(origins or {}).get(c, "generated") for c in scored["candidate_id"].to_pylist()]
    candidates = scored.select(["prompt_id", "candidate_id"]).append_column("origin", pa.array(named, pa.string()))
    members = len(scored["member_rewards"][0]) if scored.num_rows else 1
    judge = LabelTrust(np.ones(members), **({"flip_rate": None} | trust))
    return tables.pairs_of(candidates, scored, weighed, Ordering(rank_by, judge, labelled_only))


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
    found = joined(
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
        ("a", 1, 0): (4.0, 0.5, 1),
    }
    assert found.kept.sum() == 3
    assert found.turned.tolist() == [f == 1 for f in found.first.tolist()], "0.5 against 0.25 the other way"
    assert dict(zip(found.prompt_ids, found.best_reward, strict=True)) == {"b": 3.0, "c": 7.0, "a": 1.0}


def test_the_effective_sample_size_of_unlike_weights() -> None:
    """Weights 1, 1, 2: (1 + 1 + 2)^2 / (1 + 1 + 4) = 16 / 6."""
    found = joined(
        rewards({(p, c): float(c) for p in "abc" for c in (0, 1)}),
        weights([(p, [1, 0], [[0, w], [0, 0]], 0) for p, w in (("a", 1), ("b", 1), ("c", 2))]),
    )
    assert found.effective_sample_size == pytest.approx(16 / 6)


CHOSEN_REJECTED = {0: "dataset_chosen", 1: "dataset_rejected"}


def labelled_pairs_of(method_may_weigh_all: bool) -> Pairs:
    """Chosen 1, rejected 0, generated 9: label order, the flip rate 0.2."""
    return joined(
        rewards({("a", 0): 1.0, ("a", 1): 0.0, ("a", 2): 9.0}),
        weights([("a", [0, 1, 2], [[0, 1, 1], [0, 0, 1], [0, 0, 0]], 0)]),
        CHOSEN_REJECTED,
        "label",
        not method_may_weigh_all,
        flip_rate=0.2,
    )


def test_in_label_order_only_pairs_that_a_label_orders_count() -> None:
    found = labelled_pairs_of(False)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == [(0, 1)]
    assert found.log_odds == pytest.approx([1 + logit(0.8)])


def test_annotators_flip_no_pair_that_they_did_not_label() -> None:
    """Own weights may count any pair; of those without a label the order says nothing."""
    found = labelled_pairs_of(True)
    assert len(found.gap) == 3
    assert found.log_odds == pytest.approx([1 + logit(0.8), np.nan, np.nan], nan_ok=True)


def test_log_odds_of_an_order_are_those_of_all_members_together() -> None:
    """Members say 1 and 3: l = 2, s^2 = 2; 2 / sqrt(1 + pi / 4) = 1.4968."""
    found = joined(rewards({("a", 0): [1.0, 3.0], ("a", 1): [0.0, 0.0]}), weights([("a", [0, 1], [[0, 1], [0, 0]], 0)]))
    assert found.log_odds == pytest.approx([1.4968], abs=1e-4)
    assert found.gap.tolist() == [2.0]


def test_a_ranked_candidate_without_a_reward_is_refused() -> None:
    with pytest.raises(KeyError):
        joined(rewards({("a", 0): 1.0}), weights([("a", [0, 1], [[0, 1], [0, 0]], 0)]))


def test_prompts_with_one_candidate_have_no_pairs() -> None:
    found = joined(rewards({("a", 0): 1.0}), weights([("a", [0], [[0]], 0)]))
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
