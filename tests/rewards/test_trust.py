"""Calibration on labels that may be flipped: which pairs it takes, what it says of them, and how sure it is."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit
from scipy.stats import norm

from clha import noise
from clha.rewards import trust
from clha.rewards.trust import label_calibration, label_trust, pair_log_odds
from clha.rewards.weighing import RewardTable
from clha.settings import Noise

BY_LABELS = Noise(method="calibrated", calibration="labels")


def labelled(margins: np.ndarray, ids: list[str] | None = None) -> RewardTable:
    """Prompts with a chosen and a rejected candidate, so far apart by each member: margins [P, M]."""
    prompts = len(margins)
    members = np.stack([margins, np.zeros_like(margins)], axis=1).reshape(2 * prompts, -1)
    return RewardTable(
        prompt_ids=pa.array(ids or [f"p{i}" for i in range(prompts)]),
        unscored=[],
        offsets=np.arange(prompts + 1) * 2,
        candidate_id=np.tile(np.arange(2, dtype=np.int32), prompts),
        reward=members.mean(axis=1),
        members=members,
        label=np.tile(np.array([1, -1], dtype=np.int8), prompts),
        truncated=np.zeros(2 * prompts, dtype=bool),
        lost=np.empty(0, dtype=np.int64),
    )


def gaussian(accuracy: float, flip_rate: float, pairs: int, seed: int) -> np.ndarray:
    """Margins of a reward model of that accuracy along labels of which a share is flipped."""
    draw = np.random.default_rng(seed)
    true = draw.normal(norm.ppf(accuracy), 1, pairs)
    return np.where(draw.random(pairs) < flip_rate, -true, true)


@pytest.mark.parametrize("seed", [1, 5, 11])
def test_calibrated_on_labels_a_weak_model_says_that_it_does_not_know_their_flip_rate(seed: int) -> None:
    """Accuracy 0.62, 500 pairs, 30% flipped: with the factor taken for known the interval misses 30%."""
    margins = gaussian(0.62, 0.3, 500, seed)
    found = label_trust(labelled(margins[:, None]), BY_LABELS)
    known = noise.fit_flip_rate(margins, factor=float(found.factors[0]))
    low, high = found.facts["flip_rate"]["interval"]
    assert known.low > 0.3 > low and high - low > 0.4
    joint = noise.fit_flip_rate(margins)
    assert [low, high] == pytest.approx([joint.low, joint.high], abs=1e-3)


def test_the_interval_of_an_ensemble_leaves_the_common_factor_free() -> None:
    draw = np.random.default_rng(3)
    true = gaussian(0.8, 0.2, 2000, seed=1)
    margins = np.stack([true + draw.normal(0, 0.5, 2000), 2 * true + draw.normal(0, 1.0, 2000)], axis=1)
    found = label_trust(labelled(margins), BY_LABELS)
    logits = pair_log_odds(margins, found.factors)
    joint, known = noise.fit_flip_rate(logits), noise.fit_flip_rate(logits, factor=1.0)
    low, high = found.facts["flip_rate"]["interval"]
    assert [low, high] == pytest.approx([joint.low, joint.high], abs=1e-3)
    assert high - low > 1.2 * (known.high - known.low)
    assert found.flip_rate == found.facts["flip_rate"]["estimate"] == pytest.approx(joint.estimate, abs=1e-3)


def test_a_flip_rate_that_is_given_is_used_and_the_joint_one_is_reported() -> None:
    margins = gaussian(0.8, 0.2, 2000, seed=2)
    found = label_trust(labelled(margins[:, None]), Noise(method="calibrated", calibration="labels", flip_rate=0.1))
    joint = noise.fit_flip_rate(margins)
    assert found.flip_rate == 0.1 == found.facts["flip_rate"]["used"]
    assert found.factors[0] == pytest.approx(noise.fit_factor(margins, 0.1), rel=1e-3)
    assert found.facts["flip_rate"]["interval"] == pytest.approx([joint.low, joint.high], abs=1e-3)


@pytest.mark.parametrize("calibration", ["reward_model", 0.5])
def test_with_a_factor_that_is_known_the_flip_rate_alone_is_fitted(calibration: Any) -> None:
    factor = 1.0 if calibration == "reward_model" else 0.5
    margins = gaussian(0.8, 0.2, 2000, seed=4)
    found = label_trust(labelled(margins[:, None]), Noise(method="calibrated", calibration=calibration))
    known = noise.fit_flip_rate(margins, factor=factor)
    assert found.factors.tolist() == [factor]
    assert found.facts["flip_rate"]["interval"] == pytest.approx([known.low, known.high], abs=1e-3)
    assert "calibration" not in found.facts, "nothing was calibrated"


def test_calibration_on_one_label_worked_by_hand() -> None:
    """Margin log 3, factor 1, 20% flipped. Before: p = 0.75, of a label taken for right. After: the label stands with
    0.8 x 0.75 + 0.2 x 0.25 = 0.65."""
    found = label_calibration(np.array([[np.log(3)]]), np.ones(1), 0.2)
    assert found["before"] == pytest.approx({"ece": 0.25, "brier": 0.25**2, "nll": -np.log(0.75)})
    assert found["after"] == pytest.approx({"ece": 0.35, "brier": 0.35**2, "nll": -np.log(0.65)})
    assert found["pairs"] == 1 and found["reliability"]["predicted"] == pytest.approx([0.35, 0.65])


@pytest.mark.parametrize("members", [1, 3])
def test_calibration_on_labels_brings_all_three_measures_down(members: int) -> None:
    """Rewards that are five times too sure, labels of which 20% are flipped."""
    draw = np.random.default_rng(5)
    d = draw.normal(0, 2, 4000)
    right = (draw.random(4000) < expit(d)) == (draw.random(4000) >= 0.2)
    margins = 5 * np.where(right, d, -d)[:, None] + draw.normal(0, 0.5, (4000, members))
    found = label_trust(labelled(margins), BY_LABELS).facts["calibration"]
    for measure in ("ece", "brier", "nll"):
        assert found["after"][measure] < found["before"][measure]
    assert found["after"]["ece"] < 0.03


def test_of_many_labels_those_with_the_smallest_digests_are_fitted_whatever_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trust, "MOST_PAIRS", 150)
    ids = [f"p{i}" for i in range(400)]
    margins = gaussian(0.8, 0.2, 400, seed=6)[:, None]
    found = label_trust(labelled(margins, ids), BY_LABELS).facts
    kept = sorted(range(400), key=lambda i: hashlib.sha256(ids[i].encode()).digest())[:150]
    assert found["labelled_pairs"] == 400 and found["flip_rate"]["pairs"] == found["calibration"]["pairs"] == 150
    assert found["calibration_factors"][0] == pytest.approx(noise.fit_flip_rate(margins[kept, 0]).factor, rel=1e-6)
    order = np.random.default_rng(0).permutation(400)
    again = label_trust(labelled(margins[order], [ids[i] for i in order]), BY_LABELS).facts
    assert again["calibration_factors"] == pytest.approx(found["calibration_factors"], rel=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_model_that_is_very_sure_gives_no_warning() -> None:
    """Log-odds of 45: 1 - p is 0 in floating point, and its logarithm was taken."""
    margins = np.array([45.0, 800.0, -60.0])
    assert pair_log_odds(margins[:, None], np.ones(1))[0] == pytest.approx(45)
    found = label_trust(labelled(margins[:, None]), Noise(method="calibrated"))
    assert 0 < found.facts["flip_rate"]["estimate"] < 0.5
