"""rescore, first half: rewards of all candidates (`score`)."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from reward_cases import (
    candidate_row,
    node_work,
    preference_rows,
    prompt_row,
    settings,
    write_candidates,
    write_prompts,
)

from clha.errors import UserError
from clha.rewards import adapters
from clha.schema import REWARDS
from clha.stages import fit_reward, rescore
from clha.stages import scoring as scoring_module
from clha.stages.work import Work
from clha.store import Artifact, Home


@pytest.fixture
def fitted(home: Home, tiny_model: Path) -> Artifact:
    prompts = write_prompts(home, preference_rows(40))
    return fit_reward.build(
        node_work(home, settings(), "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})
    )


def some_candidates(prompts: int, each: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(prompts)]
    words = ["warm", "rude", "exact", "dunno", "clear and kind", "boring nope nope"]
    texts = [[f"{words[(i + j) % 6]} {i} {'so ' * (j * (i % 4))}" for j in range(each)] for i in range(prompts)]
    return rows, [candidate_row(r, j, t) for r, ts in zip(rows, texts, strict=True) for j, t in enumerate(ts)]


def score_work(home: Home, model: Path, fitted: Artifact, prompts: list, candidates: list, **changes: Any) -> Work:
    inputs = {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "fit_reward.train": fitted,
    }
    rescored = {"shard_size": 8} | changes
    return node_work(home, settings(rescore=rescored), "score", inputs, {"rescore.reward": model})


def test_every_candidate_gets_one_reward(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(7, 3)
    artifact = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    rows = artifact.rows("rewards")
    assert [(r["prompt_id"], r["candidate_id"]) for r in rows] == [
        (c["prompt_id"], c["candidate_id"]) for c in candidates
    ]
    assert len(artifact.shards("rewards")) == 3  # 21 candidates, 8 a shard
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (21, 21)


def test_shards_and_batches_do_not_change_rewards(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(7, 3)
    first = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    reward = {"tokens_per_batch": 64}
    second = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates, shard_size=5, reward=reward))
    a, b = (np.array([r["reward"] for r in x.rows("rewards")]) for x in (first, second))
    assert np.abs(a - b).max() < 1e-5


def test_without_a_candidate_there_is_nothing_to_score(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    with pytest.raises(
        UserError, match="score: there are no candidates; see the reasons in the quarantine of generate"
    ):
        rescore.build(score_work(home, tiny_model, fitted, some_candidates(2, 1)[0], []))


def test_a_killed_score_goes_on_from_its_finished_shards(
    home: Home, tiny_model: Path, fitted: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, candidates = some_candidates(7, 3)
    work = score_work(home, tiny_model, fitted, prompts, candidates)

    class Killed(BaseException):
        pass

    def die(done: int, total: int, unit: str, note: str = "") -> None:
        if done > 16:
            raise Killed

    monkeypatch.setattr(work.progress, "update", die)
    with pytest.raises(Killed):
        rescore.build(work)
    finished = sorted(work.writer.folder.glob("rewards-*.parquet"))
    assert len(finished) == 2
    stamps = [p.stat().st_mtime_ns for p in finished]
    scored: list[int] = []
    score = adapters.EncoderHead.score

    def count(self: Any, inputs: Any, progress: Any = None) -> Any:
        scored.append(len(inputs))
        return score(self, inputs, progress)

    monkeypatch.setattr(adapters.EncoderHead, "score", count)
    artifact = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    assert scored == [5]
    assert [p.stat().st_mtime_ns for p in artifact.shards("rewards")][:2] == stamps
    assert Counter(r["prompt_id"] for r in artifact.rows("rewards")) == {p["prompt_id"]: 3 for p in prompts}


def test_two_processes_share_the_shards_and_make_the_same_table(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(14, 3)
    candidates[12]["text"] = "  "
    alone = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    whole = {name: alone.read(name).to_pylist() for name in ("rewards", "quarantine")}
    first = pq.read_table(alone.shards("rewards")[0])
    work = score_work(home, tiny_model, fitted, prompts, candidates, processes=2)
    assert alone.key == work.writer.key, "the number of processes is in no key"
    work.writer.write_shard("rewards", 0, first)
    stamp = work.writer.shard_path("rewards", 0).stat().st_mtime_ns
    shared = rescore.build(work)
    assert shared.shards("rewards")[0].stat().st_mtime_ns == stamp, "a finished shard is kept"
    assert len(shared.shards("rewards")) == len(alone.shards("rewards")) == 6
    rows = shared.rows("rewards")
    assert [(r["prompt_id"], r["candidate_id"]) for r in rows] == [
        (r["prompt_id"], r["candidate_id"]) for r in whole["rewards"]
    ]
    rewards = [[r["reward"] for r in table] for table in (rows, whole["rewards"])]
    assert np.abs(np.subtract(*rewards)).max() < 1e-5
    assert shared.rows("quarantine") == whole["quarantine"]
    assert "2 processes" in shared.manifest["device"] and shared.manifest["padding_fraction"] is not None


def test_a_reward_model_that_cannot_be_loaded_stops_all_processes_with_its_reason(
    home: Home, tiny_model: Path, fitted: Artifact
) -> None:
    prompts, candidates = some_candidates(7, 3)
    reward = {"type": "sequence_classification", "model": str(tiny_model)}
    work = score_work(home, tiny_model, fitted, prompts, candidates, processes=2, reward=reward, sft_threshold=0.0)
    with pytest.raises(UserError, match="has no score.weight"):
        rescore.build(work)
    assert not list(work.writer.folder.glob("rewards-*.parquet"))


def test_a_candidate_that_cannot_be_read_is_quarantined_with_the_reason(
    home: Home, tiny_model: Path, fitted: Artifact
) -> None:
    prompts, candidates = some_candidates(7, 3)
    candidates[4]["text"] = "  "
    artifact = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    assert artifact.manifest["quarantined"] == {"reward not finite": 1}
    (row,) = artifact.rows("quarantine")
    assert row["prompt_id"] == candidates[4]["prompt_id"]
    assert row["detail"].startswith("candidate 1: empty_response")


def test_too_many_bad_candidates_stop_the_run(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(7, 3)
    for c in candidates[:4]:
        c["text"] = " "
    with pytest.raises(UserError, match="4 of 21 rows are bad.*rescore.max_quarantined"):
        rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))


def test_a_constant_reward_model_is_an_error_that_says_so(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(4, 2)
    for c in candidates:
        c["text"] = "the same"
    for p in prompts:
        p["messages"] = prompts[0]["messages"]
    with pytest.raises(UserError, match="gives all 8 candidates the same reward"):
        rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))


def test_a_constant_member_of_an_ensemble_is_refused_by_its_name(
    home: Home, tiny_model: Path, fitted: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would halve every difference and add to the disagreement, in silence."""
    prompts, candidates = some_candidates(4, 2)
    member = {"type": "sequence_classification", "model": "some/model"}
    reward = {"type": "ensemble", "members": [{"type": "fitted"}, member]}
    work = score_work(home, tiny_model, fitted, prompts, candidates, reward=reward)
    write_members(monkeypatch, lambda i: [float(i), 0.25])
    with pytest.raises(UserError, match=r"rescore.reward.members\[1\] \(some/model\) gives all 8 .* reward \(0.25\)"):
        rescore.build(work)


def test_a_constant_head_among_several_is_refused_by_its_number(
    home: Home, tiny_model: Path, fitted: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, candidates = some_candidates(4, 2)
    work = score_work(home, tiny_model, fitted, prompts, candidates)
    write_members(monkeypatch, lambda i: [1.0, float(i), float(-i)])
    with pytest.raises(UserError, match="head 1 of the reward model gives all 8 candidates the same reward"):
        rescore.build(work)


def write_members(monkeypatch: pytest.MonkeyPatch, members_of: Callable[[int], list[float]]) -> None:
    """Scoring writes these rewards of candidate 0, 1, ... instead of asking models."""

    def score(scoring: Any, processes: int, progress: Any) -> Any:
        rows = [
            {"prompt_id": c["prompt_id"], "candidate_id": c["candidate_id"], "reward": float(np.mean(members_of(i))),
             "member_rewards": members_of(i), "truncated": False}
            for i, c in enumerate(scoring.generate.rows("candidates"))
        ]  # fmt: skip
        scoring.writer.write_shard("rewards", 0, rows, REWARDS)
        return scoring_module.Done(0.0, 0, 0, 0, "cpu")

    monkeypatch.setattr(scoring_module, "score_shards", score)
