"""Rewards to trust: which pairs of candidates count, and how much. Pure functions over numpy arrays.

Shapes: P prompts with n candidates each, in rank order (best first); [P, n, n] weights hold the pair (k, j) at
[k, j] for k before j. Rewards must be finite: NaN is refused with a ValueError, it is no weight of 0.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def require_finite(rewards: Floats) -> None:
    """Raises ValueError when a reward is NaN or infinite."""
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not finite: such candidates belong in quarantine before weighting")


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
