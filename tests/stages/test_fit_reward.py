"""fit_reward: a reward model from preference pairs, with what is known about it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_cases import node_work, preference_rows, prompt_row, settings, write_prompts

from clha.errors import UserError
from clha.progress import Event
from clha.rewards.adapters import load_scorer
from clha.rewards.features import FrozenEncoder
from clha.rewards.head import load_head
from clha.rewards.texts import RewardInput
from clha.settings import Settings
from clha.stages import fit_reward
from clha.stages.features import CODE_VERSION
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
    assert report["members"] == {"count": 4}
    assert report["accuracy"] > 0.7
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


def fit_settings(**changes: Any) -> Settings:
    fit = {"encoder": "bundled:tiny-random", "layer": 1, "max_tokens": 256, "folds": 3} | changes
    return settings(fit_reward={"train": fit, "eval": fit})


def fitted(home: Home, model: Path, prompts: Artifact, events: list[Event], **changes: Any) -> Artifact:
    chain = fit_settings(**changes)
    work = node_work(home, chain, "fit_reward.train", {"prepare": prompts}, {"encoder": model}, events)
    return fit_reward.build(work)


def features(home: Home) -> list[Path]:
    return sorted((home.artifacts / "features").glob("*"))


@pytest.mark.parametrize(
    "change",
    [{"l2": 0.1}, {"members": 3}, {"folds": 4}, {"sft_quantile": 0.5}, {"seed": 1}],
    ids=lambda c: next(iter(c)),
)
def test_another_fit_on_the_same_responses_computes_no_features(
    home: Home, tiny_model: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(home, preference_rows(40))
    first = fitted(home, tiny_model, prompts, [], l2=0.01)
    made = {p: p.stat().st_mtime_ns for folder in features(home) for p in folder.iterdir()}

    def no_more(*_: Any, **__: Any) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(FrozenEncoder, "__init__", no_more)
    events: list[Event] = []
    second = fitted(home, tiny_model, prompts, events, **({"l2": 0.01} | change))
    assert second.key != first.key
    assert second.manifest["features"] == first.manifest["features"] == features(home)[0].name
    assert any("features of 80 responses: found" in e.get("message", "") for e in events)
    assert {p: p.stat().st_mtime_ns for folder in features(home) for p in folder.iterdir()} == made


@pytest.mark.parametrize(
    "change", [{"layer": 2}, {"layer": None}, {"pooling": "mean"}, {"max_tokens": 20}], ids=lambda c: str(c)
)
def test_a_model_that_is_read_otherwise_has_features_of_its_own(
    home: Home, tiny_model: Path, change: dict[str, Any]
) -> None:
    prompts = write_prompts(home, preference_rows(40))
    events: list[Event] = []
    keys = {fitted(home, tiny_model, prompts, events, l2=0.01, **c).manifest["features"] for c in ({}, change)}
    assert keys == {p.name for p in features(home)} and len(keys) == 2
    assert sum("features of 80 responses: computed" in e.get("message", "") for e in events) == 2


def test_other_pairs_have_other_features_and_the_other_splits_do_not_matter(home: Home, tiny_model: Path) -> None:
    rows = preference_rows(40)
    first = fitted(home, tiny_model, write_prompts(home, rows), [], l2=0.01)
    more = fitted(home, tiny_model, write_prompts(home, rows + preference_rows(9, "train", seed=5)), [], l2=0.1)
    fewer = fitted(home, tiny_model, write_prompts(home, rows[1:]), [], l2=0.01)
    assert first.manifest["features"] == more.manifest["features"] != fewer.manifest["features"]


def test_features_are_an_artifact_with_a_whole_manifest(home: Home, tiny_model: Path) -> None:
    artifact = fitted(home, tiny_model, write_prompts(home, preference_rows(40)), [], l2=0.01, shard_size=32)
    made = home.find("features", artifact.manifest["features"])
    assert made is not None and made.damage(deep=True) is None
    assert [f["rows"] for f in made.manifest["files"]] == [32, 32, 16]
    assert (made.manifest["rows_in"], made.manifest["rows_out"], made.manifest["rows_quarantined"]) == (80, 80, 0)
    assert made.manifest["inputs"].keys() == {"prepare"} and made.manifest["code_version"] == CODE_VERSION["features"]
    assert made.manifest["settings"] == {"layer": 1, "pooling": "response_mean", "max_tokens": 256, "shard_size": 32}
    assert 0 <= made.manifest["padding_fraction"] < 1


def test_stored_features_are_what_the_encoder_computes_bit_for_bit(home: Home, tiny_model: Path) -> None:
    prompts = write_prompts(home, preference_rows(40))
    artifact = fitted(home, tiny_model, prompts, [], l2=0.01)
    items = fit_reward.pairs_of(prompts.rows("prompts")).responses
    reader = FrozenEncoder(tiny_model, layer=1, pooling="response_mean", max_tokens=256)
    stored = home.find("features", artifact.manifest["features"])
    assert stored is not None
    values = np.array(stored.read("features")["values"].to_pylist())
    assert np.array_equal(values, reader.features(items, tokens_per_batch=4096).values)


def test_damaged_features_are_computed_again(home: Home, tiny_model: Path) -> None:
    prompts = write_prompts(home, preference_rows(40))
    first = fitted(home, tiny_model, prompts, [], l2=0.01)
    (shard,) = features(home)[0].glob("*.parquet")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    events: list[Event] = []
    second = fitted(home, tiny_model, prompts, events, l2=0.1)
    assert any(": computed, " in e.get("message", "") for e in events)
    assert second.manifest["features"] == first.manifest["features"] and shard.read_bytes() == whole


class Killed(BaseException):
    """Ends a build where no cleanup of its own can run after it."""


def test_a_killed_fit_takes_up_its_features_and_ends_with_the_same_head(
    home: Home, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = preference_rows(40)
    prompts = write_prompts(home, rows)
    chain = fit_settings(l2=0.01, shard_size=16)
    work = node_work(home, chain, "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})

    def die(done: int, total: int, unit: str, note: str = "") -> None:
        if done >= 48:
            raise Killed

    monkeypatch.setattr(work.progress, "update", die)
    with pytest.raises(Killed):
        fit_reward.build(work)
    kept = {p.name: p.stat().st_mtime_ns for p in (home.work / "features").glob("*/artifact/features-*.parquet")}
    assert 0 < len(kept) < 5
    assert not features(home)

    resumed = fitted(home, tiny_model, prompts, [], l2=0.01, shard_size=16)
    (folder,) = features(home)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert len(list(folder.glob("features-*.parquet"))) == 5
    other = Home(tmp_path / "other").create()
    unbroken = fitted(other, tiny_model, write_prompts(other, rows), [], l2=0.01, shard_size=16)
    assert resumed.content == unbroken.content and resumed.key == unbroken.key
