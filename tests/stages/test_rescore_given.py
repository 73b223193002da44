"""rescore, second half: weights of pairs that a file gives (`from_column`)."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from reward_cases import (
    candidate_row,
    given_file,
    given_row,
    node_work,
    settings,
    weigh,
    write_artifact,
    write_candidates,
)

from clha.errors import UserError
from clha.schema import REWARDS
from clha.stages import rescore
from clha.store import Home


def test_own_weights_are_taken_from_their_column(home: Home, tmp_path: Path) -> None:
    rows = [
        {"prompt_id": "a", "better": 1, "worse": 0, "trust": 0.75},
        {"prompt_id": "a", "better": 0, "worse": 2, "trust": 2.0},  # against the order of rewards: the reverse hinge
        {"prompt_id": "elsewhere", "better": 0, "worse": 1, "trust": 1.0},
    ]
    noise = {"method": "from_column", "file": given_file(tmp_path, rows), "column": "trust"}
    artifact = weigh(home, {"a": [1.0, 3.0, 2.0], "b": [5.0, 1.0]}, noise=noise)
    a, b = artifact.rows("weights")
    assert a["order"] == [1, 2, 0]
    assert a["pair_weights"] == [[0, 0, 0.75], [0, 0, 0], [0, 2.0, 0]]
    assert np.sum(b["pair_weights"]) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt_id": "a", "better": 0, "worse": 1}], "has no column `weight`"),
        ([given_row(weight=-1.0)], r"negative or not finite in float32 \(-1, for prompt_id a, better 0, worse 1\)"),
        ([given_row(weight=float("nan"))], r"negative or not finite in float32 \(nan"),
        ([given_row(weight=1e39)], r"negative or not finite in float32 \(1e\+39, for prompt_id a, better 0, worse 1\)"),
        ([given_row(weight=-1e-60)], r"negative or not finite in float32 \(-1e-60"),
        ([given_row(), given_row(better=1, worse=0, weight=None)], r"in float32 \(nan, for prompt_id a, better 1"),
        ([given_row(prompt_id="zz")], "names no prompt of this run that has rewards, so that every pair would weigh 0"),
        (pa.Table.from_pylist([given_row()]).slice(1), "has no rows, so that every pair would weigh 0"),
        ([given_row(weight="much")], "column `weight` must hold numbers, it holds string"),
        ([given_row(weight=True)], "column `weight` must hold numbers, it holds bool"),
        ([given_row(better="0")], r"column `better` must hold candidate ids \(integers\), it holds string"),
        ([given_row(worse=1.0)], r"column `worse` must hold candidate ids \(integers\), it holds double"),
        ([given_row(prompt_id=7)], "column `prompt_id` must hold text, it holds int64"),
        ([given_row(), given_row(better=None)], "column `better` has 1 empty cells"),
        ([given_row(better=1)], r"better than itself \(prompt_id a, better 1, worse 1\)"),
        ([given_row(worse=2)], "`worse` names a candidate that its prompt does not have .*prompt_id a, .*worse 2"),
        ([given_row(better=-1)], "`better` names a candidate that its prompt does not have"),
        ([given_row(worse=65537)], "`worse` names a candidate that its prompt does not have"),
        ([given_row()] * 2, "names a pair twice"),
    ],
)
def test_a_bad_file_of_weights_is_a_clear_error(home: Home, tmp_path: Path, rows: Any, message: str) -> None:
    rewards = {"a": [1.0, 3.0], "b": [1.0, 2.0, 3.0]}
    with pytest.raises(UserError, match=message) as caught:
        weigh(home, rewards, noise={"method": "from_column", "file": given_file(tmp_path, rows)})
    assert "\n" not in str(caught.value)


def test_own_weights_count_as_float32_holds_them(home: Home, tmp_path: Path) -> None:
    """1e-60 is 0 there: a pair that does not count."""
    rows = [given_row(weight=1e-60), given_row(prompt_id="b", weight=3e38)]
    noise = {"method": "from_column", "file": given_file(tmp_path, rows)}
    artifact = weigh(home, {"a": [3.0, 1.0], "b": [3.0, 1.0]}, noise=noise)
    a, b = artifact.rows("weights")
    assert a["pair_weights"] == [[0, 0], [0, 0]] and a["flags"] == ["no_pairs"]
    assert b["pair_weights"][0][1] == np.float32(3e38)
    assert (artifact.manifest["pairs"], artifact.manifest["pairs_kept"]) == (2, 1)


def test_own_weights_of_a_candidate_that_lost_its_reward_are_left_out(home: Home, tmp_path: Path) -> None:
    candidates = [candidate_row({"prompt_id": "a"}, i, f"text {i}") for i in range(3)]
    rewards = [
        {"prompt_id": "a", "candidate_id": i, "reward": float(i), "member_rewards": [float(i)], "truncated": False}
        for i in (0, 2)
    ]
    artifacts = {
        "generate": write_candidates(home, candidates),
        "score": write_artifact(home, "score", {"rewards": (rewards, REWARDS)}),
    }
    given = given_file(tmp_path, [given_row(better=2, worse=0, weight=0.5), given_row(better=1, worse=0)])
    chain = settings(rescore={"noise": {"method": "from_column", "file": given}})
    artifact = rescore.build(node_work(home, chain, "weigh", artifacts))
    assert artifact.rows("weights")[0]["pair_weights"] == [[0, 0.5], [0, 0]]
    assert artifact.manifest["weights_given"] == 1
    given_file(tmp_path, [given_row(better=1, worse=0)])
    with pytest.raises(UserError, match="each pair that it names has a candidate in score's quarantine"):
        rescore.build(node_work(home, chain, "weigh", artifacts))
