"""Paired statistics over prompts: bootstrap intervals, a sign-flip test, adjustment for length, agreement of judges.

The prompt is the unit: each holds one answer per policy, so resampling prompts keeps the two answers together.
All functions are pure, vectorised with numpy and seeded.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clha.rewards.fitting import wilson_interval

Floats = NDArray[np.float64]

# Cells of an index matrix that are held at a time: 2**22 int64 are 32 MiB.
_CELLS = 1 << 22
LEVEL = 0.95


class Estimate(NamedTuple):
    """A value and its interval [low, high]."""

    value: float
    low: float
    high: float


def bootstrap_means(columns: Floats, resamples: int, seed: int) -> Floats:
    """Means of `columns` [P, k] over `resamples` resamplings of the P prompts with replacement: [resamples, k].

    Every statistic that is a function of means (a standardised gain, a regression) can be had from one call, so
    that all of them see the same resamplings. Raises ValueError without prompts or resamples, or for values that
    are not finite.
    """
    columns = np.asarray(columns, dtype=np.float64)
    if columns.ndim != 2 or not len(columns):
        raise ValueError(f"columns must be [P, k] with P > 0, not {list(columns.shape)}")
    if resamples < 1:
        raise ValueError(f"resamples must be positive, not {resamples}")
    if not np.isfinite(columns).all():
        raise ValueError("columns must be finite")
    prompts = len(columns)
    rng = np.random.default_rng(seed)
    # Around the mean, so that equal values give exactly equal resampled means.
    center = columns.mean(0)
    shifted = columns - center
    means = np.empty((resamples, columns.shape[1]))
    step = max(1, _CELLS // prompts)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, prompts, (min(step, resamples - start), prompts))
        for k in range(columns.shape[1]):
            means[start : start + len(drawn), k] = shifted[:, k][drawn].mean(1)
    return means + center


def percentile_interval(samples: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The central `level` of resampled values [resamples], by percentiles (Efron and Tibshirani 1993, chapter 13)."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_gain(base: Floats, trained: Floats, resamples: int, seed: int) -> Estimate:
    """Mean of trained - base ([P] each, the same prompts in the same order) with its bootstrap interval."""
    difference = np.asarray(trained, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    means = bootstrap_means(difference[:, None], resamples, seed)[:, 0]
    return Estimate(float(difference.mean()), *percentile_interval(means))


def standardised_gain(base: Floats, trained: Floats, resamples: int, seed: int) -> Estimate | None:
    """The gain in standard deviations of the base policy's rewards (ddof 0), both resampled together (Glass's delta).

    None where the base's rewards do not vary.
    """
    base, trained = np.asarray(base, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    spread = float(base.std())
    if spread <= 1e-12 * max(1.0, float(np.abs(base).max())):
        return None
    shifted = base - base.mean()
    d, m, square = bootstrap_means(np.stack([trained - base, shifted, shifted**2], 1), resamples, seed).T
    variance = square - m**2
    varied = variance > 1e-9 * spread**2  # a resampling may hold one prompt only, over and over
    if not varied.any():
        return None
    return Estimate(
        float((trained - base).mean()) / spread, *percentile_interval(d[varied] / np.sqrt(variance[varied]))
    )


def sign_flip_p(differences: Floats, permutations: int, seed: int) -> float:
    """Two-sided p value of "the differences [P] are symmetric about zero", by flipping their signs at random.

    Exact where all 2^P sign patterns are no more than `permutations`; otherwise (1 + hits) / (1 + permutations), which
    is never zero (Phipson and Smyth 2010). Zero differences alone give 1.
    """
    differences = np.asarray(differences, dtype=np.float64)
    prompts = len(differences)
    if not prompts or not np.isfinite(differences).all():
        raise ValueError("differences must be finite and there must be some")
    scale = float(np.abs(differences).sum())
    if scale == 0.0:
        return 1.0
    bound = abs(float(differences.sum())) - 1e-12 * scale  # what rounding can take from an equal sum
    if 2**prompts <= permutations:
        patterns = (np.arange(2**prompts)[:, None] >> np.arange(prompts)) & 1
        sums = np.where(patterns == 1, differences, -differences).sum(1)
        return float(np.mean(np.abs(sums) >= bound))
    rng = np.random.default_rng(seed)
    hits, step = 0, max(1, _CELLS // prompts)
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        signs = rng.integers(0, 2, (rows, prompts), dtype=np.int8).astype(np.float32) * 2 - 1
        hits += int((np.abs(signs @ differences) >= bound).sum())
    return (1 + hits) / (1 + permutations)


class LengthAdjusted(NamedTuple):
    """The gain at equal length, and the reward that comes with one more token."""

    gain: Estimate
    slope: float


def length_adjusted_gain(
    reward_difference: Floats, length_difference: Floats, resamples: int, seed: int
) -> LengthAdjusted | None:
    """The gain that is left at equal length: the intercept of reward difference [P] on length difference [P] (tokens).

    By least squares within prompts, so that what makes a prompt's answers long does not count. None where the
    length difference is the same for every prompt: then length and policy cannot be told apart.
    """
    y, x = np.asarray(reward_difference, dtype=np.float64), np.asarray(length_difference, dtype=np.float64)
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    center, scale = float(x.mean()), float(x.std())
    z = (x - center) / scale

    def intercept(my: Floats, mz: Floats, mzz: Floats, mzy: Floats) -> tuple[Floats, Floats]:
        variance = mzz - mz**2
        # A resampling whose lengths do not vary says nothing about the slope: it keeps the plain mean.
        slope = np.divide(mzy - mz * my, variance, out=np.zeros_like(my), where=variance > 1e-9)
        return my - slope * (mz + center / scale), slope / scale

    columns = np.stack([y, z, z**2, z * y], 1)
    at, slope = intercept(*columns.mean(0, keepdims=True).T)
    resampled, _ = intercept(*bootstrap_means(columns, resamples, seed).T)
    return LengthAdjusted(Estimate(float(at[0]), *percentile_interval(resampled)), float(slope[0]))


def share_estimate(hits: int, trials: int) -> Estimate | None:
    """A share and its 95% Wilson interval; None without trials."""
    return Estimate(hits / trials, *wilson_interval(hits / trials, trials)) if trials else None


class Agreement(NamedTuple):
    """How far two reward models prefer the same of two answers."""

    share: Estimate | None  # of the prompts on which both have a preference
    compared: int
    undecided: int  # prompts on which at least one of them has none
    correlation: float | None  # of the rewards within a prompt, about the prompt's mean
    rank_correlation: float | None  # Spearman's, of the signed preferences


def agreement(first: Floats, second: Floats) -> Agreement:
    """Agreement of two reward models on the differences trained - base that they see, [P] each.

    With two answers to a prompt the rewards about the prompt's mean are +d/2 and -d/2: their correlation over all
    answers is the uncentred one of the differences.
    """
    from scipy.stats import rankdata

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    decided = (a != 0) & (b != 0)
    compared = int(decided.sum())
    same = int((np.sign(a[decided]) == np.sign(b[decided])).sum())
    norm = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    ranks = rankdata(a), rankdata(b)
    varied = len(a) > 1 and all(np.ptp(r) > 0 for r in ranks)
    return Agreement(
        share_estimate(same, compared),
        compared,
        len(a) - compared,
        float((a * b).sum()) / norm if norm > 0 else None,
        float(np.corrcoef(*ranks)[0, 1]) if varied else None,
    )


class Outcome(NamedTuple):
    """Prompts on which the trained policy's answer has the higher, a like, or the lower reward."""

    wins: int
    ties: int
    losses: int


def win_tie_loss(differences: Floats, tie: float) -> Outcome:
    """Count trained - base differences [P]; up to `tie` either way is a tie."""
    d = np.asarray(differences, dtype=np.float64)
    return Outcome(int((d > tie).sum()), int((np.abs(d) <= tie).sum()), int((d < -tie).sum()))
