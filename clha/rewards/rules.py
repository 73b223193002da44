"""The weighting rules of `rescore.noise`: from settings and all rewards to a rule for prompts of one size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clha import noise
from clha.rewards.given import GivenWeights
from clha.rewards.trust import LabelTrust
from clha.rewards.weighing import Ranked, RewardTable, Rule, Totals, Weighed, all_ranked
from clha.settings import Noise

Floats = NDArray[np.float64]

# Differences of calibrated rewards, and distances of p from one half, that are rounding and no opinion.
_ROUNDING = 1e-9


def make_rule(
    table: RewardTable, settings: Noise, rank_by: str, threshold: float, trust: LabelTrust
) -> tuple[Rule, dict[str, Any]]:
    """The rule that `settings` describe, and the facts that it rests on.

    `threshold`: of the SFT part; `trust`: see `label_trust`.
    """
    rule, facts = _rule_of_method(table, settings, rank_by, threshold, trust)
    return (_sparing_rejected(rule) if rank_by == "label" else rule), facts


def _rule_of_method(
    table: RewardTable, settings: Noise, rank_by: str, threshold: float, trust: LabelTrust
) -> tuple[Rule, dict[str, Any]]:
    if settings.method == "none":
        return _all_ones(rank_by), {"gap": None}
    if settings.method in ("reference", "quantile"):
        gap = settings.gap if settings.method == "reference" else _observed_gap(table, rank_by, settings.quantile)
        return _by_gap(rank_by, gap, threshold), {"gap": gap}
    if settings.method == "from_column":
        assert settings.file is not None
        given = GivenWeights.read(Path(settings.file), settings.column, table)
        return _as_given(given, threshold), {"gap": None, "weights_given": len(given.weights)}
    soft = settings.method == "soft_label"
    rule = _calibrated(rank_by, threshold, trust, settings.labels, soft)
    if soft:  # a pair and its reverse weigh 1 together
        return rule, {"gap": None}
    totals = Totals()
    for *_, ranked in all_ranked(table, rank_by):
        totals.add(rule(ranked))
    scale = noise.mean_one_scale(totals.weight, sum(totals.kept.values()))
    return _scaled(rule, scale), {"gap": None, "weight_scale": scale}


def _sparing_rejected(rule: Rule) -> Rule:
    """In label order a prompt whose chosen response has no reward begins with a rejected one: lambda is 0 there."""

    def sparing(r: Ranked) -> Weighed:
        w = rule(r)
        return replace(w, sft_lambda=np.where(r.labels[:, 0] == -1, 0.0, w.sft_lambda))

    return sparing


def _observed_gap(table: RewardTable, rank_by: str, quantile: float) -> float:
    """The gap below which that share of the gaps lies, of the pairs that can count."""
    gaps = []
    for *_, r in all_ranked(table, rank_by):
        pairs = _pairs(r, rank_by)
        found = noise.pair_gaps(r.rewards)
        gaps.append(found if pairs is None else found[pairs[:, noise.upper(r.rewards.shape[1])].ravel()])
    return noise.quantile_gap(np.concatenate(gaps) if gaps else np.empty(0), quantile)


def _pairs(r: Ranked, rank_by: str) -> NDArray[np.bool_] | None:
    """The pairs that can count: all, or those that a label orders."""
    return noise.labelled_pairs(r.labels) if rank_by == "label" else None


def _all_ones(rank_by: str) -> Rule:
    def rule(r: Ranked) -> Weighed:
        pairs = _pairs(r, rank_by)
        return Weighed(noise.all_ones(r.rewards, pairs), np.ones(len(r.rewards)), pairs=pairs)

    return rule


def _by_gap(rank_by: str, gap: float, threshold: float) -> Rule:
    def rule(r: Ranked) -> Weighed:
        pairs = _pairs(r, rank_by)
        weights = noise.gap_weights(r.rewards, gap, pairs)
        lam = noise.threshold_lambda(r.rewards[:, 0], threshold)
        return Weighed(weights, lam, flags=_contradicted(r, rank_by), pairs=pairs)

    return rule


def _contradicted(r: Ranked, rank_by: str) -> dict[str, NDArray[np.bool_]]:
    """Flags the prompts in which the reward models rather believe the opposite of a label."""
    if rank_by != "label":
        return {}
    wrong = noise.labelled_pairs(r.labels) & (noise.differences(r.rewards) < 0)
    return _flag("label_contradicted", wrong)


def _flag(name: str, pairs: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """A flag for the prompts that have such a pair."""
    return {name: np.asarray(pairs.any(axis=(1, 2)))}


def _calibrated(rank_by: str, threshold: float, trust: LabelTrust, labels: str, soft: bool) -> Rule:
    """2p - 1, or with `soft` p and its reverse, for p that the order of a pair is right.

    In reward order a pair whose p is below one half is trained the other way round. That happens to ensembles whose
    members were given unlike factors: candidates stand by the mean of the rewards as they are, while members say how
    sure they are by the calibrated ones. In label order a doubted label is dropped, or turned where `labels` is flip:
    the response that a dropped label calls the better one is not imitated either, lambda is 0.
    """
    by_label = rank_by == "label"
    turn = not by_label or labels == "flip"

    def rule(r: Ranked) -> Weighed:
        p = trust.probability(r.members, r.labels, rank_by)
        pairs = _pairs(r, rank_by)
        pairs = np.broadcast_to(noise.upper(p.shape[1]), p.shape) if pairs is None else pairs
        wrong = pairs & (p < (0.5 if by_label else 0.5 - _ROUNDING))
        used = pairs if turn else pairs & ~wrong
        forward, reverse = (p, 1 - p) if soft else (noise.trust_weight(p), noise.trust_weight(1 - p) * wrong)
        if by_label and labels == "drop" and not soft:
            forward = np.ones_like(p)
        weights = np.where(used, forward, 0.0) + np.where(used, reverse, 0.0).transpose(0, 2, 1)
        best = _best(trust.calibrated(r.members), by_label, wrong & turn)
        members = np.take_along_axis(r.members, best[:, None, None], axis=1)[:, 0]
        lam = noise.trust_weight(noise.pair_probability(members - threshold, trust.factors))
        if not turn:
            lam = np.where(wrong[:, 0].any(axis=1), 0.0, lam)
        flags = _flag("label_contradicted" if by_label else "order_contradicted", wrong)
        return Weighed(weights, lam, best, flags, pairs)

    return rule


def _best(calibrated: Floats, by_label: bool, turned: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The response that the SFT part raises, [p]: the best by the calibrated rewards [p, n].

    In label order the first one, or where its label was turned the best of those that it lost to.
    """
    if not by_label:
        ahead = calibrated.max(axis=1) > calibrated[:, 0] + _ROUNDING
        return np.where(ahead, calibrated.argmax(axis=1), 0)
    first = turned[:, 0, :]
    winner = np.where(first, calibrated, -np.inf).argmax(axis=1)
    return np.where(first.any(axis=1), winner, 0)


def _scaled(rule: Rule, scale: float) -> Rule:
    def scaled(r: Ranked) -> Weighed:
        w = rule(r)
        return replace(w, pair_weights=w.pair_weights * scale)

    return scaled


def _as_given(given: GivenWeights, threshold: float) -> Rule:
    def rule(r: Ranked) -> Weighed:
        weights = given.of(r.prompts, r.candidates)
        return Weighed(weights, noise.threshold_lambda(r.rewards[:, 0], threshold))

    return rule
