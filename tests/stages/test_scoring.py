"""The shards of `score`: what is flagged, what goes to quarantine, and who scores which shard."""

from pathlib import Path
from typing import Any

import numpy as np
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

from clha.rewards import adapters
from clha.rewards.adapters import Scored, model_folders
from clha.stages import fit_reward, rescore
from clha.stages.scoring import Scoring, score_shards, worker_devices
from clha.stages.work import Work
from clha.store import Artifact, Home


@pytest.fixture
def fitted(home: Home, tiny_model: Path) -> Artifact:
    prompts = write_prompts(home, preference_rows(40))
    work = node_work(home, settings(), "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})
    return fit_reward.build(work)


def work_on(home: Home, model: Path, fitted: Artifact, prompts: list, candidates: list, **changes: Any) -> Work:
    inputs = {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "fit_reward.train": fitted,
    }
    return node_work(home, settings(rescore={"shard_size": 4} | changes), "score", inputs, {"rescore.reward": model})


def test_a_dialogue_that_was_cut_is_flagged_whoever_cut_it(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    """The model was fitted with 256 tokens. Whole; too long for it; cut by the policy, whose prompt was shorter."""
    last = {"role": "user", "content": "And now?"}
    short, long = ([{"role": "user", "content": "so " * n}, {"role": "assistant", "content": "yes"}] for n in (3, 200))
    prompts = [prompt_row(m, "train") for m in ([last], [*short, last], [*long, last])]
    candidates = [candidate_row(p, i, text) for p in prompts for i, text in enumerate(("Fine.", "Rude nope."))]
    for row in candidates[2:4]:
        row["truncated_turns"] = 2
    artifact = rescore.build(work_on(home, tiny_model, fitted, prompts, candidates))
    rows = artifact.rows("rewards")
    assert [r["truncated"] for r in rows] == [False, False, True, True, True, True]
    assert artifact.manifest["truncated"] == 4
    rewards = np.array([r["reward"] for r in rows]).reshape(3, 2)
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-5)  # all three are read as the last turn alone
    assert rewards[2] == pytest.approx(rewards[0], abs=1e-5)
    assert rewards[0, 0] != pytest.approx(rewards[0, 1], abs=1e-3)


def test_rewards_that_are_not_finite_go_to_quarantine(
    home: Home, tiny_model: Path, fitted: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the mean of the members is finite and one of them is not."""
    prompts = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(3)]
    candidates = [candidate_row(p, i, text) for p in prompts for i, text in enumerate(("Fine.", "No."))]
    members = np.array([[1.0, 2.0], [np.inf, 0.0], [0.5, 0.1], [0.0, -np.inf], [np.nan, 1.0], [3.0, 4.0]])
    mean = members.mean(axis=1)
    mean[4] = 0.25
    left = list(range(6))

    def score(self: Any, inputs: list, progress: Any = None) -> Scored:
        rows, left[:] = left[: len(inputs)], left[len(inputs) :]
        return Scored(mean[rows], members[rows], np.zeros(len(rows), dtype=bool))

    monkeypatch.setattr(adapters.EncoderHead, "score", score)
    artifact = rescore.build(work_on(home, tiny_model, fitted, prompts, candidates, max_quarantined=0.5))
    kept = [(r["prompt_id"], r["candidate_id"], r["reward"]) for r in artifact.rows("rewards")]
    assert kept == [(candidates[i]["prompt_id"], candidates[i]["candidate_id"], mean[i]) for i in (0, 2, 5)]
    lost = {(r["prompt_id"], r["detail"]) for r in artifact.rows("quarantine")}
    assert lost == {
        (prompts[0]["prompt_id"], "candidate 1: reward inf"),
        (prompts[1]["prompt_id"], "candidate 1: reward -inf"),
        (prompts[2]["prompt_id"], "candidate 0: reward 0.25"),
    }
    assert artifact.manifest["quarantined"] == {"reward not finite": 3}
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (6, 3)


def test_processes_take_the_gpus_in_turn() -> None:
    assert worker_devices(5, 2) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert worker_devices(3, 0) == ["cpu"] * 3


def test_processes_claim_each_shard_once(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    """A shard that two of them took would be counted twice."""
    prompts = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(22)]
    candidates = [candidate_row(p, i, text) for p in prompts for i, text in enumerate(("Fine.", "No."))]
    work = work_on(home, tiny_model, fitted, prompts, candidates)
    scoring = Scoring(
        work.settings.rescore.reward, model_folders(work.models, "rescore.reward"), fitted.folder,
        work.inputs["prepare"], work.inputs["generate"], 4, len(candidates), work.writer,
    )  # fmt: skip
    done = score_shards(scoring, 2, work.progress)
    assert (done.candidates, done.devices) == (44, "cpu (2 processes)")
    assert [work.writer.has_shard("rewards", i) for i in range(12)] == [True] * 11 + [False]
