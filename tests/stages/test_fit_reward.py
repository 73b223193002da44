"""fit_reward: a reward model from preference pairs, with what is known about it."""

import json
from pathlib import Path

import numpy as np
import pytest
from reward_cases import node_work, preference_rows, prompt_row, settings, write_prompts

from clha.errors import UserError
from clha.rewards.adapters import load_scorer
from clha.rewards.head import load_head
from clha.rewards.texts import RewardInput
from clha.stages import fit_reward
from clha.store import Artifact, Home


def build(home: Home, model: Path, rows: list, events: list | None = None) -> Artifact:
    work = node_work(
        home, settings(), "fit_reward.train", {"prepare": write_prompts(home, rows)}, {"encoder": model}, events
    )
    return fit_reward.build(work)


def test_the_reward_model_judges_pairs_that_it_never_saw(home: Home, tiny_model: Path) -> None:
    artifact = build(home, tiny_model, preference_rows(60))
    report = json.loads((artifact.folder / "fit.json").read_text())
    assert report["accuracy"] > 0.8
    low, high = report["accuracy_interval"]
    assert low < report["accuracy"] <= high
    scorer = load_scorer(settings().rescore.reward, tiny_model, artifact.folder, "cpu")
    held_out = preference_rows(40, seed=7)
    chosen = scorer.score([RewardInput(r["messages"], r["chosen"][0]) for r in held_out]).rewards
    rejected = scorer.score([RewardInput(r["messages"], r["rejected"][0]) for r in held_out]).rewards
    assert (chosen > rejected).mean() > 0.8


def test_calibration_never_worsens_the_likelihood_much_and_is_in_the_head(home: Home, tiny_model: Path) -> None:
    artifact = build(home, tiny_model, preference_rows(60))
    report = json.loads((artifact.folder / "fit.json").read_text())
    assert report["calibration"]["after"]["nll"] < report["calibration"]["before"]["nll"]
    head = load_head(artifact.folder / "reward_model")
    assert head.config["calibration"]["factor"] == [report["calibration"]["factor"]]
    assert head.threshold == report["sft_threshold"]


def test_several_members_come_from_one_fit(home: Home, tiny_model: Path) -> None:
    fit = {"encoder": "bundled:tiny-random", "layer": 1, "max_tokens": 256, "folds": 3, "members": 4}
    chain = settings(fit_reward={"train": fit, "eval": fit})
    prompts = write_prompts(home, preference_rows(60))
    artifact = fit_reward.build(
        node_work(home, chain, "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})
    )
    report = json.loads((artifact.folder / "fit.json").read_text())
    assert report["members"]["count"] == 4
    assert report["members"]["accuracy"] > 0.7
    scored = load_scorer(chain.rescore.reward, tiny_model, artifact.folder, "cpu").score(
        [RewardInput(r["messages"], r["chosen"][0]) for r in preference_rows(5, seed=9)]
    )
    assert scored.members.shape == (5, 4)
    assert scored.rewards == pytest.approx(scored.members.mean(axis=1))
    assert (scored.members.std(axis=1) > 0).all()


def test_rows_of_other_splits_are_not_used(home: Home, tiny_model: Path) -> None:
    rows = preference_rows(40) + preference_rows(30, split="train", seed=3)
    artifact = build(home, tiny_model, rows)
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (40, 40)


def test_every_chosen_meets_every_rejected_and_a_prompt_weighs_one() -> None:
    row = prompt_row([{"role": "user", "content": "Hello"}], "reward_train", ["a", "b"], ["c", "d", "e"])
    data = fit_reward.pairs_of([row])
    assert [r.response for r in data.responses] == ["a", "c", "d", "e", "b"]
    assert len(data.pairs) == 6
    assert sum(p.weight for p in data.pairs) == pytest.approx(1)


def test_empty_and_identical_pairs_are_quarantined_with_their_reason(home: Home, tiny_model: Path) -> None:
    rows = preference_rows(40)
    rows[0]["rejected"] = ["  "]
    rows[1]["rejected"] = list(rows[1]["chosen"])
    artifact = build(home, tiny_model, rows)
    assert artifact.manifest["quarantined"] == {"empty response": 1, "identical responses": 1}
    assert artifact.manifest["rows_in"] == artifact.manifest["rows_out"] + 2 == 40


def test_too_few_pairs_are_a_clear_error(home: Home, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="pairs of 4 dialogues in split reward_train, at least 6 needed"):
        build(home, tiny_model, preference_rows(4))


def test_no_pairs_at_all_are_a_clear_error(home: Home, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="pairs of 0 dialogues"):
        build(home, tiny_model, preference_rows(4, split="train"))


def test_a_killed_fit_takes_up_its_features(home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_reward, "_FEATURE_SHARD", 16)
    prompts = write_prompts(home, preference_rows(40))

    class Killed(BaseException):
        pass

    work = node_work(home, settings(), "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})

    def die(done: int, total: int, unit: str, note: str = "") -> None:
        if done >= 48:
            raise Killed

    monkeypatch.setattr(work.progress, "update", die)
    with pytest.raises(Killed):
        fit_reward.build(work)
    kept = sorted(work.writer.scratch.glob("features-*.npy"))
    assert 0 < len(kept) < 5
    stamps = {p.name: p.stat().st_mtime_ns for p in kept}
    again = node_work(home, settings(), "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})
    seen: dict[str, int] = {}
    finish = type(again).finish

    def look(self, **facts):  # type: ignore[no-untyped-def]
        seen.update({p.name: p.stat().st_mtime_ns for p in self.writer.scratch.glob("features-*.npy")})
        return finish(self, **facts)

    monkeypatch.setattr(type(again), "finish", look)
    resumed = fit_reward.build(again)
    assert {name: seen[name] for name in stamps} == stamps
    whole = load_head(resumed.folder / "reward_model").members
    other = {"prepare": write_prompts(home, preference_rows(40, "reward_eval"))}
    unbroken = fit_reward.build(node_work(home, settings(), "fit_reward.eval", other, {"encoder": tiny_model}))
    assert np.allclose(whole, load_head(unbroken.folder / "reward_model").members, rtol=1e-5)
