"""The weighting rules as `weigh` uses them, over any number of reward models: what must hold, and cases by hand."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit

from clha.rewards.rules import make_rule
from clha.rewards.trust import LabelTrust
from clha.rewards.weighing import Ranked, RewardTable, Rule, Totals, Weighed, all_ranked, pair_strength
from clha.settings import Noise

BY_TRUST = ("calibrated", "soft_label")
ALL = ("reference", "quantile", "calibrated", "soft_label")

CHOSEN, REJECTED, OWN = 1, -1, 0


def table_of(members: np.ndarray, labels: np.ndarray | None = None) -> RewardTable:
    """Rewards [P, n, M] and labels [P, n] as `weigh` reads them; prompts are p0, p1, ..."""
    prompts, n, models = members.shape
    return RewardTable(
        prompt_ids=pa.array([f"p{i}" for i in range(prompts)]),
        unscored=[],
        offsets=np.arange(prompts + 1) * n,
        candidate_id=np.tile(np.arange(n, dtype=np.int32), prompts),
        reward=members.mean(axis=-1).ravel(),
        members=members.reshape(-1, models),
        label=(np.zeros((prompts, n)) if labels is None else labels).astype(np.int8).ravel(),
        truncated=np.zeros(prompts * n, dtype=bool),
        lost=np.empty(0, dtype=np.int64),
    )


def weighed(
    members: np.ndarray,
    factors: np.ndarray,
    *,
    method: str = "calibrated",
    labels: np.ndarray | None = None,
    rank_by: str = "reward",
    threshold: float = 0.0,
    flip_rate: float | None = 0.2,
    doubted: str = "weight",
    **noise: Any,
) -> tuple[Ranked, Weighed]:
    """All prompts in rank order, and what the rule makes of them. `doubted`: what becomes of doubted labels."""
    table = table_of(members, labels)
    rule, _ = make_rule(
        table, Noise(method=method, labels=doubted, **noise), rank_by, threshold, LabelTrust(factors, flip_rate)
    )
    return _whole(table, rule, rank_by)


def _whole(table: RewardTable, rule: Rule, rank_by: str) -> tuple[Ranked, Weighed]:
    ((_, _, ranked),) = all_ranked(table, rank_by)
    return ranked, rule(ranked)


# Eighths of whole numbers, and 1, 2 or 4 members: sums, differences and means are exact.
models = st.sampled_from([1, 2, 4])
factor = st.floats(0.05, 5)


@st.composite
def cases(draw: st.DrawFn, most: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards [P, n, M], factors [M], labels [P, n]."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, most)), draw(models))
    rewards = draw(arrays(np.int64, shape, elements=st.integers(-80, 80))) / 8
    labels = draw(arrays(np.int8, shape[:2], elements=st.sampled_from([-1, 0, 1])))
    return rewards, draw(arrays(np.float64, shape[2], elements=factor)), labels


def test_an_ensemble_that_calibrated_rewards_turn_round_worked_by_hand() -> None:
    """Members say +3 and -1, factors 0.1 and 1: by the raw mean (1) the first leads, by l = (0.3 - 1) / 2 = -0.35 the
    second. s^2 = 0.65^2 x 2 = 0.845; p = sigmoid(-0.35 / sqrt(1 + pi 0.845 / 8)) = sigmoid(-0.30328) = 0.42476; the
    pair is trained the other way round with 2 x 0.57524 - 1 = 0.15049, normalised to 1, and the second response gets
    the SFT part: members (0, 0) against the threshold -2: (0.2, 2), mean 1.1, s^2 = 1.62, p = 0.70266.
    """
    ranked, w = weighed(np.array([[[3.0, -1.0], [0.0, 0.0]]]), np.array([0.1, 1.0]), threshold=-2.0)
    assert ranked.rewards.tolist() == [[1.0, 0.0]]
    p = expit(-0.35 / np.sqrt(1 + np.pi * 0.845 / 8))
    assert p == pytest.approx(0.42476, abs=1e-5)
    assert w.pair_weights.tolist() == [[[0, 0], [1, 0]]]
    assert w.sft_index is not None and w.sft_index.tolist() == [1]
    assert w.sft_lambda == pytest.approx(2 * 0.70266 - 1, abs=1e-4)
    assert w.flags["order_contradicted"].tolist() == [True]
    _, soft = weighed(np.array([[[3.0, -1.0], [0.0, 0.0]]]), np.array([0.1, 1.0]), method="soft_label")
    assert soft.pair_weights[0] == pytest.approx(np.array([[0, p], [1 - p, 0]]))
    assert soft.sft_index is not None and soft.sft_index.tolist() == [1]


@given(cases(), st.sampled_from(ALL), st.sampled_from(["reward", "label"]), st.integers(-400, 400))
def test_a_constant_added_to_one_prompts_rewards_changes_no_pair_weight(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], method: str, rank_by: str, eighths: int
) -> None:
    rewards, factors, labels = case
    noise = {"gap": 0.5, "quantile": 0.25}
    moved = rewards.copy()
    moved[0] += eighths / 8
    _, before = weighed(rewards, factors, method=method, rank_by=rank_by, labels=labels, **noise)
    _, after = weighed(moved, factors, method=method, rank_by=rank_by, labels=labels, **noise)
    assert (before.pair_weights == after.pair_weights).all()
    assert (before.sft_lambda[1:] == after.sft_lambda[1:]).all()


@given(cases(), st.sampled_from(ALL), st.sampled_from(["reward", "label"]))
def test_a_constant_added_to_one_prompts_rewards_does_change_its_lambda(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], method: str, rank_by: str
) -> None:
    """But for what no reward can make worth imitating: a rejected response, or one whose label is dropped."""
    rewards, factors, labels = case
    step = np.zeros_like(rewards)
    step[0] = 64.0  # beyond all of them
    ranked, below = weighed(rewards - step, factors, method=method, rank_by=rank_by, labels=labels)
    _, above = weighed(rewards + step, factors, method=method, rank_by=rank_by, labels=labels)
    barred = rank_by == "label" and (ranked.labels[0, 0] == REJECTED or "label_contradicted" in flags_of(above, 0))
    assert below.sft_lambda[0] == 0
    assert above.sft_lambda[0] > 0 or barred


def flags_of(w: Weighed, prompt: int) -> set[str]:
    return {name for name, where in w.flags.items() if where[prompt]}


@given(cases(), st.sampled_from(ALL), st.sampled_from(["weight", "drop", "flip"]), st.booleans())
def test_label_order_never_imitates_a_rejected_response_or_one_whose_label_it_dropped(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], method: str, doubted: str, high: bool
) -> None:
    rewards, factors, origin = case
    rewards = rewards + 64.0 * high
    ranked, w = weighed(rewards, factors, method=method, rank_by="label", labels=origin, doubted=doubted)
    sft = np.zeros(len(rewards), dtype=np.int64) if w.sft_index is None else w.sft_index
    imitated = np.take_along_axis(ranked.labels, sft[:, None], 1)[:, 0]
    turned = (w.pair_weights[np.arange(len(sft)), sft, 0] > 0) & (sft > 0)
    on = w.sft_lambda > 0
    assert (on & (imitated == REJECTED) <= turned).all()
    if method in BY_TRUST and doubted != "flip":
        p = LabelTrust(factors, 0.2).probability(ranked.members, ranked.labels, "label")
        dropped = ((p < 0.5) & (ranked.labels[:, :1, None] == CHOSEN) & (ranked.labels == REJECTED)[:, None])[:, 0]
        assert not (on & dropped.any(axis=1)).any()


@given(cases(), st.sampled_from(BY_TRUST))
def test_in_reward_order_every_pair_is_trained_as_the_calibrated_models_believe(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], method: str
) -> None:
    """p of the direction with more weight is at least one half, and only pairs of equal reward count for nothing."""
    rewards, factors, _ = case
    ranked, w = weighed(rewards, factors, method=method)
    p = LabelTrust(factors, None).order_probability(ranked.members)
    forward, reverse = np.triu(w.pair_weights, 1), np.triu(w.pair_weights.transpose(0, 2, 1), 1)
    upper = np.triu(np.ones(p.shape[1:], dtype=bool), 1)
    assert (p[(forward > reverse) & upper] >= 0.5).all() and (p[(reverse > forward) & upper] <= 0.5).all()
    assert (np.abs(p - 0.5)[upper & (np.maximum(forward, reverse) == 0)] <= 1e-9).all()
    assert w.sft_index is not None
    calibrated = (ranked.members * factors).mean(axis=-1)
    assert np.take_along_axis(calibrated, w.sft_index[:, None], 1)[:, 0] == pytest.approx(calibrated.max(1), abs=1e-8)


@given(cases(), st.randoms(use_true_random=False), st.sampled_from(BY_TRUST))
def test_the_order_of_the_members_does_not_matter(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], random: Any, method: str
) -> None:
    rewards, factors, labels = case
    order = list(range(len(factors)))
    random.shuffle(order)
    _, a = weighed(rewards, factors, method=method, labels=labels)
    _, b = weighed(rewards[..., order], factors[order], method=method, labels=labels)
    assert np.allclose(a.pair_weights, b.pair_weights, atol=1e-7) and np.allclose(a.sft_lambda, b.sft_lambda)


@given(cases(), st.floats(1.1, 10))
def test_weights_grow_with_the_margin_whatever_the_members_disagreement(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], stretch: float
) -> None:
    """All members' differences stretched alike: l / sqrt(1 + pi s^2 / 8) grows with them."""
    rewards, factors, _ = case
    trust = LabelTrust(factors, None)
    near, far = (np.abs(trust.order_probability(r) - 0.5) for r in (rewards, rewards * stretch))
    assert (far >= near - 1e-12).all()


@given(cases(), st.floats(0.01, 0.49))
def test_log_odds_are_those_of_the_probabilities(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], flip_rate: float
) -> None:
    rewards, factors, labels = case
    trust = LabelTrust(factors, flip_rate)
    for rank_by in ("reward", "label"):
        p = trust.probability(rewards, labels.astype(np.int64), rank_by)
        assert np.allclose(expit(trust.log_odds(rewards, labels.astype(np.int64), rank_by)), p, atol=1e-12)


def test_log_odds_stay_apart_where_probabilities_are_all_1() -> None:
    members = np.array([[[90.0], [50.0], [0.0]]])
    odds = LabelTrust(np.ones(1), None).log_odds(members, np.zeros((1, 3), dtype=np.int64), "reward")[0]
    assert odds[0] == pytest.approx([0, 40, 90]) and odds[2] == pytest.approx([-90, -50, 0])


@pytest.mark.parametrize("method", BY_TRUST)
def test_a_member_that_is_no_number_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="not finite"):
        weighed(np.array([[[1.0, np.nan], [0.0, 0.0]]]), np.ones(2), method=method)


def test_the_quantile_of_label_order_is_that_of_the_labelled_pairs() -> None:
    """Chosen minus rejected: 1, 2, 3, 4; their median is 2.5. The generated ones beside them make gaps of 50."""
    members = np.array([[[float(d)], [0.0], [50.0], [100.0]] for d in (1, 2, 3, 4)])
    labels = np.tile([CHOSEN, REJECTED, OWN, OWN], (4, 1))
    found: dict[str, Any] = {"method": "quantile", "quantile": 0.5, "rank_by": "label", "labels": labels}
    _, w = weighed(members, np.ones(1), **found)
    assert w.pair_weights[:, 0, 1].tolist() == [0, 0, 1, 1]
    totals = Totals()
    totals.add(w)
    facts = totals.facts()
    assert (facts["pairs"], facts["pairs_kept"], facts["kept_fraction"]) == (4, 2, 0.5)
    assert facts["pairs_by_distance"] == {"1": [2, 4]}


@pytest.mark.parametrize("method", ALL)
def test_where_every_label_is_kept_all_of_the_pairs_that_can_count_are(method: str) -> None:
    members = np.array([[[9.0], [0.0], [50.0], [40.0]]] * 3)
    labels = np.tile([CHOSEN, REJECTED, OWN, OWN], (3, 1))
    _, w = weighed(members, np.ones(1), method=method, rank_by="label", labels=labels, gap=3.0, quantile=0.0)
    totals = Totals()
    totals.add(w)
    assert totals.facts()["pairs"] == 3
    assert totals.facts()["kept_fraction"] == (0 if method == "quantile" else 1), "a gap of 9 is not above 9"


def test_a_soft_pair_has_the_strength_of_its_larger_direction() -> None:
    w = np.array([[[0, 0.7, 0.0], [0.3, 0, 0.2], [0.0, 0.8, 0]]])
    assert pair_strength(w).tolist() == [[[0, 0.7, 0], [0, 0, 0.8], [0, 0, 0]]]
