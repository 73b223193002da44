"""Flipped labels: made reproducibly, found as well as theory says."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from clha import noise
from clha.settings_rewards import RewardFit
from clha.study.detection import LabelledPairs, arm_weights, detect, detect_by_length, flips, swapped


def pairs(count: int, accuracy: float, seed: int, name: str) -> LabelledPairs:
    """One feature whose difference, chosen minus rejected, is Gaussian: a head on it has this accuracy."""
    draw = np.random.default_rng(seed)
    difference = draw.normal(norm.ppf(accuracy), 1, count)
    base = draw.normal(0, 0.1, count)
    features = np.stack([base + difference / 2, base - difference / 2], axis=1)[..., None]
    ids = [f"{name}{i}" for i in range(count)]
    return LabelledPairs(ids, ids, features, draw.integers(10, 200, (count, 2)))


FIT = RewardFit(encoder="none", l2=1e-4)


def test_the_share_of_flips_is_exact_and_the_same_each_time() -> None:
    ids = [f"p{i}" for i in range(50)]
    flipped = flips(ids, 0.4, seed=0)
    assert flipped.sum() == 20
    assert (flipped == flips(ids, 0.4, seed=0)).all()
    assert (flipped != flips(ids, 0.4, seed=1)).any()
    assert not flips(ids, 0.0, seed=0).any()


def test_a_label_is_flipped_whatever_else_is_looked_at() -> None:
    """With more flips the same labels stay flipped, and the order of the pairs is of no matter."""
    ids = [f"p{i}" for i in range(50)]
    assert (flips(ids, 0.4, 0) >= flips(ids, 0.2, 0)).all()
    assert (flips(ids[::-1], 0.4, 0)[::-1] == flips(ids, 0.4, 0)).all()


def test_swapping_exchanges_the_responses_of_flipped_pairs_only() -> None:
    x = np.arange(8.0).reshape(2, 2, 2)
    out = swapped(x, np.array([True, False]))
    assert out[0].tolist() == x[0][::-1].tolist()
    assert out[1].tolist() == x[1].tolist()


@pytest.mark.parametrize("rate", [0.2, 0.4])
@pytest.mark.parametrize("arm", ["clean", "flipped"])
@pytest.mark.parametrize("accuracy", [0.65, 0.8])
def test_detection_meets_theory_on_gaussian_margins(rate: float, arm: str, accuracy: float) -> None:
    """20,000 pairs, to 0.01; with one feature the head is right even where its own labels are flipped."""
    found = detect(pairs(2000, accuracy, 1, "r"), pairs(20_000, accuracy, 2, "t"), rate, 0, arm, FIT, 20)
    assert found.figures["auroc"] == pytest.approx(noise.theory_auroc(accuracy), abs=0.01)
    assert found.figures["theory_auroc"] == pytest.approx(noise.theory_auroc(accuracy), abs=0.01)
    low, high = found.figures["auroc_interval"]
    assert 0 < high - low < 0.03


def test_the_injected_rate_is_estimated_with_a_clean_reward_model() -> None:
    found = detect(pairs(2000, 0.85, 1, "r"), pairs(5000, 0.85, 2, "t"), 0.3, 0, "clean", FIT, 20)
    assert found.figures["flip_rate"] == pytest.approx(0.3, abs=0.05)


def differences(found: LabelledPairs, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """What a head on the one feature says of the labels as they are shown, and which are flipped."""
    flipped = flips(found.ids, rate, 0)
    d = (found.features[:, 0] - found.features[:, 1])[:, 0]
    return np.where(flipped, -d, d), flipped


def test_certainty_that_ties_does_not_spoil_the_ranking() -> None:
    """Margins far above 37: p_right is exactly 1 or 0, the margins still tell who is surer."""
    reward, looked_at = pairs(500, 0.7, 1, "r"), pairs(400, 0.7, 2, "t")
    sure = replace(looked_at, features=looked_at.features * 1e4)
    margins, flipped = differences(looked_at, 0.4)
    found = detect(reward, sure, 0.4, 0, "clean", FIT, 20)
    assert len(np.unique(found.p_right)) < 50
    assert noise.auroc(1 - found.p_right, flipped) < found.figures["auroc"] - 0.02
    assert found.figures["auroc"] == noise.auroc(-margins, flipped)
    assert found.figures["auprc"] == noise.auprc(-margins, flipped)


def test_a_factor_at_its_limit_is_named_and_ties_nothing() -> None:
    """40 pairs of a weak judge: their labels ask for a boundless factor (seed 4)."""
    looked_at = pairs(40, 0.65, 104, "t")
    found = detect(pairs(60, 0.65, 4, "r"), looked_at, 0.4, 4, "flipped", FIT, 20)
    assert found.figures["factor_at_limit"] is True
    assert len(np.unique(found.p_right)) == 40
    assert not detect(pairs(2000, 0.8, 1, "r"), looked_at, 0.4, 0, "clean", FIT, 0).figures["factor_at_limit"]


def test_where_no_label_can_be_trusted_the_interval_of_the_rate_is_the_joint_one() -> None:
    """Both kinds of labels, flipped alike, in one fit of rate and factor; with one feature folds differ in scale."""
    reward, looked_at = pairs(2000, 0.9, 1, "r"), pairs(1000, 0.9, 2, "t")
    figures = detect(reward, looked_at, 0.3, 0, "flipped", FIT, 0).figures
    low, high = figures["flip_rate_interval"]
    assert low < 0.3 < high
    margins, _ = differences(looked_at, 0.3)
    theirs = reward.features[:, 0, 0] - reward.features[:, 1, 0]
    theirs = np.where(flips(reward.ids, 0.3, 1), -theirs, theirs)
    joint = noise.fit_flip_rate(np.concatenate([theirs, margins]))
    assert [figures["flip_rate"], low, high] == pytest.approx(joint[:3], abs=0.02)
    weak = detect(pairs(500, 0.65, 1, "r"), pairs(200, 0.65, 2, "t"), 0.3, 0, "flipped", FIT, 0).figures
    assert weak["flip_rate_interval"][1] - weak["flip_rate_interval"][0] > 0.2, "a weak reward model says so"


def test_without_flips_there_is_nothing_to_find() -> None:
    figures = detect(pairs(200, 0.8, 1, "r"), pairs(100, 0.8, 2, "t"), 0.0, 0, "flipped", FIT, 20).figures
    assert [figures[k] for k in ("auroc", "auprc", "auroc_interval", "auprc_interval")] == [None] * 4
    assert figures["flip_rate_interval"][0] == pytest.approx(noise.FLIP_LIMITS[0])


def test_pairs_of_one_dialogue_are_drawn_together() -> None:
    """Each pair three times over says no more: the interval keeps its width, drawn apart it would shrink."""
    once = pairs(200, 0.7, 2, "t")
    ids = [f"{i}-{k}" for i in once.ids for k in range(3)]
    thrice = LabelledPairs(ids, ids, once.features.repeat(3, 0), once.lengths.repeat(3, 0))
    reward = pairs(500, 0.7, 1, "r")
    width = {}
    for name, groups in (("apart", ids), ("together", [i.split("-")[0] for i in ids])):
        low, high = detect(reward, replace(thrice, groups=groups), 0.4, 0, "clean", FIT).figures["auroc_interval"]
        width[name] = high - low
    assert width["together"] > 1.2 * width["apart"]


def test_length_finds_nothing_where_it_says_nothing() -> None:
    found = detect_by_length(pairs(2000, 0.8, 1, "r"), pairs(4000, 0.8, 2, "t"), 0.4, 0, FIT)
    assert found.figures["auroc"] == pytest.approx(0.5, abs=0.04)


def test_the_arms_weigh_as_their_names_say() -> None:
    reward, train = pairs(500, 0.8, 1, "r"), pairs(500, 0.8, 2, "t")
    found, by_length = detect(reward, train, 0.4, 0, "clean", FIT), detect_by_length(reward, train, 0.4, 0, FIT)
    flipped = flips(train.ids, 0.4, 0)
    judges = {"calibrated": found.p_right, "shuffled": found.p_right, "length": by_length.p_right}
    names = ("none", "calibrated", "shuffled", "length", "oracle")
    weights = {name: arm_weights(name, judges.get(name), flipped, 0) for name in names}
    assert (weights["none"] == 1).all()
    assert (weights["oracle"] == ~flipped).all()
    assert sorted(weights["shuffled"]) == pytest.approx(sorted(weights["calibrated"]))
    assert (weights["shuffled"] != weights["calibrated"]).any()
    for w in weights.values():
        assert w[w > 0].mean() == pytest.approx(1)
    assert weights["calibrated"][flipped].mean() < 0.5 * weights["calibrated"][~flipped].mean()
    assert weights["shuffled"][flipped].mean() == pytest.approx(weights["shuffled"][~flipped].mean(), rel=0.3)
