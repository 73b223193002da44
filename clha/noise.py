"""Rewards to trust: which pairs of candidates count, and how much. Pure functions over numpy arrays.

Shapes: P prompts with n candidates each, in rank order (best first); [P, n, n] weights hold the pair (k, j) at
[k, j] for k before j. Rewards must be finite: NaN is refused with a ValueError, it is no weight of 0.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit
from scipy.stats import norm, rankdata

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def require_finite(rewards: Floats) -> None:
    """Raises ValueError when a reward is NaN or infinite."""
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite: such candidates belong in quarantine before weighting")


def _require_probabilities(p: Floats) -> None:
    """Raises ValueError for NaN and for what lies outside of [0, 1]."""
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a probability is NaN or lies outside of [0, 1]: no weight can be made of it")


def rank_by_reward(rewards: Floats) -> Ints:
    """Positions of the candidates from the highest reward to the lowest, [P, n]; ties keep their order."""
    require_finite(rewards)
    return np.argsort(-rewards, axis=1, kind="stable")


def rank_by_label(rewards: Floats, labels: Ints) -> Ints:
    """Positions of the candidates by label: chosen (1), rejected (-1), then those without a label (0), [P, n].

    Within one label by reward. Candidates without a label come last, for the labels say nothing about them.
    """
    require_finite(rewards)
    place = np.select([labels == 1, labels == -1], [0, 1], 2)
    return np.lexsort((np.arange(rewards.shape[1])[None].repeat(len(rewards), 0), -rewards, place), axis=1)


def differences(rewards: Floats) -> Floats:
    """r_k - r_j for every pair of a prompt: [P, n] -> [P, n, n]."""
    return rewards[:, :, None] - rewards[:, None, :]


def upper(n: int) -> Bools:
    """[n, n], true where k stands before j."""
    return np.triu(np.ones((n, n), dtype=bool), 1)


def labelled_pairs(labels: Ints) -> Bools:
    """[P, n, n], true where k is a chosen response and j a rejected one; `labels` [P, n] in rank order."""
    return (labels == 1)[:, :, None] & (labels == -1)[:, None, :]


def pair_gaps(rewards: Floats) -> Floats:
    """|r_k - r_j| of all pairs k < j, flat."""
    n = rewards.shape[1]
    return np.abs(differences(rewards))[:, upper(n)].ravel()


def quantile_gap(gaps: Floats, quantile: float) -> float:
    """The gap below which the given share of the observed pair gaps lies; 0 where there are no pairs."""
    return float(np.quantile(gaps, quantile)) if gaps.size else 0.0


def gap_weights(rewards: Floats, gap: float, pairs: Bools | None = None) -> Floats:
    """The paper's mask (arXiv 2403.16649): 1 where the first of a pair leads by more than `gap`, strictly.

    `rewards` [P, n] in rank order; `pairs` [P, n, n] limits it to these pairs. In reward order this is
    |r_k - r_j| > gap; in label order a pair whose label the reward model contradicts gets 0.
    """
    require_finite(rewards)
    allowed = upper(rewards.shape[1])[None] if pairs is None else pairs & upper(rewards.shape[1])[None]
    return np.where(allowed & (differences(rewards) > gap), 1.0, 0.0)


def all_ones(rewards: Floats, pairs: Bools | None = None) -> Floats:
    """1 for every pair k < j (and in `pairs`): training as if nothing were noise."""
    require_finite(rewards)
    n = rewards.shape[1]
    allowed = np.broadcast_to(upper(n), (len(rewards), n, n))
    return np.where(allowed if pairs is None else allowed & pairs, 1.0, 0.0)


def threshold_lambda(best: Floats, threshold: float) -> Floats:
    """lambda of the adaptive SFT loss: 1 where the reward of the response it raises is above the threshold, [P]."""
    require_finite(best)
    return np.where(best > threshold, 1.0, 0.0)


class PairCounts(NamedTuple):
    """Pairs by rank distance 1..n-1: how many there are and how many have a positive weight."""

    total: dict[int, int]
    kept: dict[int, int]


def count_pairs(weights: Floats) -> PairCounts:
    """Count the pairs of [P, n, n] weights; a pair with weight in either direction counts once."""
    n = weights.shape[1]
    either = (weights > 0) | (weights > 0).transpose(0, 2, 1)
    kept = {i: int(np.diagonal(either, i, axis1=1, axis2=2).sum()) for i in range(1, n)}
    return PairCounts({i: len(weights) * (n - i) for i in range(1, n)}, kept)


def effective_sample_size(total: float, total_of_squares: float) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965): as many equally weighted pairs would say as much; 0 without weights."""
    return total * total / total_of_squares if total_of_squares > 0 else 0.0


def pair_probability(member_differences: Floats, factors: Floats) -> Floats:
    """P(the first of a pair is the better one), from M reward models that each say d_m: [..., M] -> [...].

    Each is calibrated, l_m = a_m d_m with a_m > 0 (`factors` [M]); their mean l is shrunk by their disagreement s
    (standard deviation, ddof 1; 0 for one model): p = sigmoid(l / sqrt(1 + pi s^2 / 8)), the mean of a sigmoid over
    a normal l (MacKay 1992). Swapping the pair gives 1 - p. Raises ValueError for NaN and for a factor that is not
    above 0 and finite.
    """
    require_finite(member_differences)
    given = np.asarray(factors)
    if not ((given > 0) & np.isfinite(given)).all():
        raise ValueError(f"calibration factors must be finite and above 0: {factors}")
    logits = member_differences * factors
    mean = logits.mean(axis=-1)
    if logits.shape[-1] == 1:
        return np.asarray(expit(mean))
    variance = logits.var(axis=-1, ddof=1)
    return np.asarray(expit(mean / np.sqrt(1 + np.pi * variance / 8)))


def label_probability(p: Floats, flip_rate: float) -> Floats:
    """P(label right | reward models): p(1-e) / (p(1-e) + (1-p)e), where annotators flip a share e of the labels.

    `p`: what the reward models alone say of the labelled order. Raises ValueError for NaN, and unless 0 < e < 1: with
    e = 0 every label would be right whatever the models say.
    """
    _require_probabilities(p)
    if not 0 < flip_rate < 1:
        raise ValueError(f"flip_rate must lie between 0 and 1, both excluded: it is {flip_rate}")
    right = p * (1 - flip_rate)
    return np.asarray(right / (right + (1 - p) * flip_rate))


def trust_weight(p: Floats) -> Floats:
    """w = clip(2p - 1, 0, 1): the first-order form of a loss whose labels are smoothed by 1 - p.

    Raises ValueError for NaN.
    """
    _require_probabilities(p)
    return np.asarray(np.clip(2 * p - 1, 0.0, 1.0))


def mean_one_scale(total: float, kept: int) -> float:
    """The factor that gives `kept` weights of sum `total` the mean 1; 1 where there are none."""
    return kept / total if total > 0 else 1.0


class FlipRate(NamedTuple):
    """Share of flipped labels with its 95% profile interval, and the calibration factor found with it."""

    estimate: float
    low: float
    high: float
    factor: float
    at_limit: bool = False  # whether the factor was fitted and ended at one of FACTOR_LIMITS


# Limits of an estimated flip rate: 0 would make every label right, above 1/2 labels would mean their opposite.
FLIP_LIMITS = (1e-3, 0.499)
# Limits of a fitted factor, times the margins' root mean square. Gaussian margins of a judge who is right 98 times in
# 100 come to 10; few flipped labels can ask for any more, and every label would then be all right or all wrong.
FACTOR_LIMITS = (1e-3, 10.0)
# Half the 95% quantile of chi-squared with one degree of freedom.
_DROP = 1.920729


def fit_flip_rate(margins: Floats, factor: float | None = None) -> FlipRate:
    """The share e of flipped labels that margins d = r(chosen) - r(rejected) [N] speak for.

    Maximises the sum of log((1-e) sigmoid(a d) + e sigmoid(-a d)) over e and a, or over e alone where the
    calibration `factor` a is known from labels that can be trusted. The interval holds every e whose profile
    likelihood is within 1.92 of the best (95%); it is wide for a weak reward model, and may be all of FLIP_LIMITS.

    Without `factor` the profile is the joint one: each e is given the factor that suits it best. That is the interval
    to report wherever the factor rests on these same labels, for with it taken as known the interval is much too
    narrow. The scale of `margins` does not matter then: logits that were calibrated on these labels give the same e.
    """
    require_finite(margins)
    size = _root_mean_square(margins)
    if size == 0:
        return FlipRate(FLIP_LIMITS[1], *FLIP_LIMITS, factor or 1.0)
    scaled = margins / size
    known = None if factor is None else expit(factor * margins)

    def profile(e: float) -> float:
        return _likelihood(known, e) if known is not None else _best_factor(scaled, e)[0]

    grid = np.linspace(*FLIP_LIMITS, 25)
    likelihood = np.array([profile(e) for e in grid])
    best = int(np.argmax(likelihood))
    near = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(lambda e: -profile(e), bounds=near, method="bounded", options={"xatol": 1e-5})
    estimate, top = float(grid[best]), float(likelihood[best])
    if -found.fun > top:
        estimate, top = float(found.x), -float(found.fun)
    # The bounds lie between points of a grid, however narrow the interval is: the estimate itself is one of them.
    place = int(np.searchsorted(grid, estimate))
    points = np.insert(grid, place, estimate)
    inside = np.flatnonzero(np.insert(likelihood, place, top) - top + _DROP >= 0)

    def bound(outside: int, within: int) -> float:
        if not 0 <= outside < len(points):
            return float(points[within])
        return float(brentq(lambda e: profile(e) - top + _DROP, points[outside], points[within], xtol=1e-6))

    low, high = bound(inside[0] - 1, inside[0]), bound(inside[-1] + 1, inside[-1])
    if factor is not None:
        return FlipRate(estimate, low, high, factor)
    log_factor = _best_factor(scaled, estimate)[1]
    ends = np.abs(log_factor - np.log(FACTOR_LIMITS))
    return FlipRate(estimate, low, high, float(np.exp(log_factor) / size), bool(ends.min() < 0.01))


def fit_factor(margins: Floats, flip_rate: float) -> float:
    """The calibration factor a > 0 at a known share of flipped labels, within FACTOR_LIMITS; see `fit_flip_rate`."""
    require_finite(margins)
    size = _root_mean_square(margins)
    return float(np.exp(_best_factor(margins / size, flip_rate)[1]) / size) if size else 1.0


def _root_mean_square(margins: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(margins)))) if margins.size else 0.0


def _best_factor(margins: Floats, e: float) -> tuple[float, float]:
    """(largest log-likelihood, log of its factor) at flip rate e, for margins of unit size."""

    def loss(log_a: float) -> float:
        return -_likelihood(expit(np.exp(log_a) * margins), e)

    # The likelihood can have more than one maximum in a: the best of a coarse grid says which one to go to.
    grid = np.linspace(np.log(FACTOR_LIMITS[0]), np.log(FACTOR_LIMITS[1]), 9)
    best = int(np.argmin([loss(x) for x in grid]))
    near = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(loss, bounds=near, method="bounded", options={"xatol": 1e-4})
    return -float(found.fun), float(found.x)


def _likelihood(p: Floats, e: float) -> float:
    """Log-likelihood of labels that are right with p [N] and flipped with e: (1-e) p + e (1-p) each."""
    return float(np.log(e + (1 - 2 * e) * p).sum())


def auroc(scores: Floats, truth: Bools) -> float:
    """P(a positive scores above a negative), ties counting half; NaN where one kind is absent."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auprc(scores: Floats, truth: Bools) -> float:
    """Average precision: the mean, over positives, of the precision at their score; NaN without positives."""
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last place of each score
    precision = hits[last] / (last + 1)
    gained = np.diff(np.concatenate([[0], hits[last]]))
    return float((precision * gained).sum() / hits[-1])


def theory_auroc(accuracy: float) -> float:
    """AUROC of finding flipped labels by a reward model of this accuracy with Gaussian margins.

    Phi(sqrt(2) Phi^-1(a)), whatever the flip rate: of two pairs, one flipped, the sum of two margins decides.
    """
    return float(norm.cdf(np.sqrt(2) * norm.ppf(accuracy)))
