"""A linear Bradley-Terry head on frozen features: fitting, cross-validation, choice of the regularisation.

The model: reward(y) = w . f(y), P(chosen beats rejected) = sigmoid(w . (f(chosen) - f(rejected))); Bradley and Terry
(1952). Features f are standardised over all responses and divided by the square root of their number, so that one
value of l2 means about the same for encoders of any width.
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from clha.digests import unit_of
from clha.rewards.calibration import fit_temperature

Floats = NDArray[np.float64]

# Values of l2 that `auto` chooses from, from weak to strong.
L2_PATH = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Standardiser:
    """f(x) = (x - mean) / (scale * sqrt(D)): features of unit length on average. `mean`, `scale`: [D]."""

    mean: Floats
    scale: Floats

    @classmethod
    def of(cls, features: Floats) -> "Standardiser":
        """Mean and standard deviation of `features` [N, D]; a column that never changes gets scale 1."""
        scale = features.std(axis=0)
        return cls(features.mean(axis=0), np.where(scale > 1e-8, scale, 1.0))

    def __call__(self, features: Floats) -> Floats:
        """[N, D] -> [N, D]."""
        return (features - self.mean) / (self.scale * np.sqrt(features.shape[1]))


def fit_head(differences: Floats, l2: float, weights: Floats | None = None, start: Floats | None = None) -> Floats:
    """The weights w [D] that minimise the Bradley-Terry loss of pairs with feature differences [N, D].

    Loss: weighted mean of -log sigmoid(w . d), plus l2 * |w|^2. `weights` [N] are the weights of the pairs (default:
    1 each), `start` [D] where to begin. Convex; solved by L-BFGS to a gradient of 1e-7.
    """
    n, width = differences.shape
    shares = np.full(n, 1 / n) if weights is None else weights / weights.sum()

    def loss(w: Floats) -> tuple[float, Floats]:
        margins = differences @ w
        value = float(shares @ np.logaddexp(0, -margins) + l2 * (w @ w))
        return value, -((shares * expit(-margins)) @ differences) + 2 * l2 * w

    begin = np.zeros(width) if start is None else start
    options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-7}
    return np.asarray(minimize(loss, begin, jac=True, method="L-BFGS-B", options=options).x)


def assign_folds(groups: Sequence[Hashable], folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each pair [N]; pairs of one group stay together, groups are spread evenly by their digest.

    Raises ValueError when there are fewer groups than folds.
    """
    distinct = sorted(set(groups), key=lambda g: unit_of("fold", seed, g))
    if len(distinct) < folds:
        raise ValueError(f"{len(distinct)} groups of pairs, {folds} folds")
    fold = {g: i % folds for i, g in enumerate(distinct)}
    return np.array([fold[g] for g in groups])


def wilson_interval(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share seen in `count` independent trials (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


@dataclass(frozen=True)
class PathPoint:
    """What cross-validation says about one value of l2."""

    l2: float
    accuracy: float  # share of held-out pairs judged right
    nll: float  # of held-out pairs at the head's own scale, nats
    agreement: float  # correlation of held-out margins between heads fitted on disjoint halves of the rest
    behind: float  # how far the accuracy is below the best one
    behind_error: float  # standard error of that difference, over the same pairs


@dataclass(frozen=True)
class CrossValidation:
    """Out-of-fold judgement of every response by heads that never saw its group."""

    l2: float
    path: list[PathPoint]
    rewards: Floats  # [N, 2]: chosen, rejected; at the raw scale of the heads

    @property
    def margins(self) -> Floats:
        """reward(chosen) - reward(rejected), [N]."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    def path_rows(self) -> list[dict[str, Any]]:
        return [asdict(p) for p in self.path]


def cross_validate(
    features: Floats, weights: Floats, groups: Sequence[Hashable], l2: float | str, folds: int, seed: int
) -> CrossValidation:
    """K-fold cross-validation over groups.

    Args:
        features: [N, 2, D], standardised; chosen first.
        weights: [N], weights of the pairs.
        groups: [N], pairs of one group are never parted.
        l2: a number, or "auto": of the values whose held-out accuracy is no more than two standard errors (of the
            paired difference) below the best, the one whose heads, fitted on disjoint halves, agree most. Agreement
            tells more than accuracy: a weakly regularised head judges pairs as well, but ranks new responses by its
            own accidents.
        folds: number of folds.
        seed: moves groups between folds.
    """
    path = list(L2_PATH) if l2 == "auto" else [float(l2)]
    fold = assign_folds(groups, folds, seed)
    half = np.array([unit_of("half", seed, g) < 0.5 for g in groups])
    differences = features[:, 0] - features[:, 1]
    rewards = np.zeros((len(path), len(features), 2))
    halves = np.zeros((len(path), len(features), 2))
    for k in range(folds):
        held, rest = fold == k, fold != k
        parts = (rest, rest & half, rest & ~half)
        starts: list[Floats | None] = [None, None, None]
        for i, strength in reversed(list(enumerate(path))):
            heads = [
                fit_head(differences[p], strength, weights[p], s) if p.any() else np.zeros(features.shape[2])
                for p, s in zip(parts, starts, strict=True)
            ]
            starts = list(heads)
            rewards[i, held] = features[held] @ heads[0]
            halves[i, held] = np.stack([differences[held] @ heads[1], differences[held] @ heads[2]], axis=1)
    right = (rewards[:, :, 0] > rewards[:, :, 1]).astype(float)
    accuracy = np.average(right, axis=1, weights=weights)
    best = int(np.argmax(accuracy))
    points = []
    for i, strength in enumerate(path):
        behind = right[best] - right[i]
        error = _mean_error(behind, weights, groups)
        margins = rewards[i, :, 0] - rewards[i, :, 1]
        nll = float(np.average(np.logaddexp(0, -margins), weights=weights))
        points.append(
            PathPoint(
                strength, float(accuracy[i]), nll, _correlation(halves[i]), float(accuracy[best] - accuracy[i]), error
            )
        )
    eligible = [i for i, p in enumerate(points) if p.behind <= 2 * p.behind_error + 1e-12]
    chosen = max(eligible, key=lambda i: (points[i].agreement, points[i].l2))
    return CrossValidation(path[chosen], points, rewards[chosen])


@dataclass(frozen=True)
class CurvePoint:
    """Held-out accuracy of heads fitted on so many pairs, with its 95% interval (Wilson, by groups)."""

    pairs: int
    accuracy: float
    interval: tuple[float, float]


# Shares of the pairs that the learning curve is measured at.
_CURVE = (0.125, 0.25, 0.5, 1.0)


def learning_curve(
    features: Floats, weights: Floats, groups: Sequence[Hashable], l2: float, folds: int, seed: int
) -> list[CurvePoint]:
    """Accuracy against the number of pairs: in each fold heads are fitted on a growing part of the other folds.

    Arguments as of `cross_validate`. The same pairs are judged at each point. `pairs` is the mean over folds; a part of
    less than two groups is left out.
    """
    fold = assign_folds(groups, folds, seed)
    places = curve_places(groups, seed)
    differences = features[:, 0] - features[:, 1]
    points = []
    for share in _CURVE:
        margins, used = np.zeros(len(features)), 0
        for k in range(folds):
            rest = np.flatnonzero(fold != k)
            part = curve_part(places, rest, share)
            if not len(part):
                break
            used += len(part)
            margins[fold == k] = differences[fold == k] @ fit_head(differences[part], l2, weights[part])
        else:
            accuracy = float(np.average(margins > 0, weights=weights))
            points.append(CurvePoint(round(used / folds), accuracy, wilson_interval(accuracy, len(set(groups)))))
    return points


def curve_places(groups: Sequence[Hashable], seed: int) -> Floats:
    """[N], the order in which pairs enter the parts of a learning curve; pairs of one group enter together."""
    return np.array([unit_of("curve", seed, g) for g in groups])


def curve_part(places: Floats, among: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The first `share` of the groups of the pairs `among` (rows of `places`); a larger share contains a smaller one.

    Nothing where that is less than two groups.
    """
    cut = np.quantile(np.unique(places[among]), share)
    part = among[places[among] <= cut]
    return part if len(np.unique(places[part])) >= 2 else part[:0]


def _mean_error(values: Floats, weights: Floats, groups: Sequence[Hashable]) -> float:
    """Standard error of the weighted mean of `values`, pairs of one group counted as one."""
    mean = np.average(values, weights=weights)
    sums: dict[Hashable, float] = {}
    for value, weight, group in zip(values, weights, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + weight * (value - mean)
    return float(np.sqrt(np.sum(np.square(list(sums.values())))) / weights.sum())


def _correlation(columns: Floats) -> float:
    """Pearson correlation of the two columns of [N, 2]; 0 where one does not vary."""
    if (columns.std(axis=0) < 1e-12).any():
        return 0.0
    return float(np.corrcoef(columns.T)[0, 1])


@dataclass(frozen=True)
class Members:
    """M heads [M, D] and the factors [M] that bring the reward of each to log-odds."""

    heads: Floats
    factors: Floats

    @property
    def calibrated(self) -> Floats:
        """[M, D], whose rewards are in log-odds; the reward model is their mean."""
        return self.heads * self.factors[:, None]


def bootstrap_members(
    features: Floats, weights: Floats, groups: Sequence[Hashable], l2: float, members: int, seed: int
) -> Members:
    """Heads fitted on bootstrap samples of the groups (drawn with replacement), each calibrated on those left out.

    `features` [N, 2, D], standardised; `weights` [N].
    """
    names = sorted(set(groups), key=str)
    place = {g: i for i, g in enumerate(names)}
    of_pair = np.array([place[g] for g in groups])
    differences = features[:, 0] - features[:, 1]
    draw = np.random.default_rng(seed)
    heads, factors = [], []
    for _ in range(members):
        times = np.bincount(draw.integers(0, len(names), len(names)), minlength=len(names))[of_pair]
        drawn, out = times > 0, times == 0
        head = fit_head(differences[drawn], l2, (weights * times)[drawn])
        heads.append(head)
        factors.append(fit_temperature(differences[out] @ head, weights[out]) if out.any() else 1.0)
    return Members(np.stack(heads), np.array(factors))


def cross_validate_members(
    features: Floats, weights: Floats, groups: Sequence[Hashable], l2: float, members: int, folds: int, seed: int
) -> tuple[Floats, Floats]:
    """Rewards of every response by the mean of members, drawn, fitted and calibrated on other folds than its own.

    Arguments as of `cross_validate` and `bootstrap_members`. Returns rewards [N, 2] as the heads give them, and in
    log-odds (each member times its own factor): of what is used, the mean, and not of a member or a single head.
    """
    fold = assign_folds(groups, folds, seed)
    plain, calibrated = np.zeros((len(features), 2)), np.zeros((len(features), 2))
    for k in range(folds):
        held, rest = fold == k, np.flatnonzero(fold != k)
        made = bootstrap_members(features[rest], weights[rest], [groups[i] for i in rest], l2, members, seed)
        plain[held] = features[held] @ made.heads.mean(axis=0)
        calibrated[held] = features[held] @ made.calibrated.mean(axis=0)
    return plain, calibrated


def length_bias(margins: Floats, lengths: NDArray[np.int64], weights: Floats) -> dict[str, float | None]:
    """How much the judgement follows length.

    `margins` [N]: chosen minus rejected; `lengths` [N, 2]. Returns the rank correlation of margin and length
    difference, the share of pairs in which the longer response is preferred, the share in which it is the chosen one,
    and the accuracy of either kind of pair (shares are over pairs of unlike length; None where there are none).
    """
    from scipy.stats import spearmanr

    longer = lengths[:, 0] - lengths[:, 1]
    unlike = longer != 0
    varied = unlike.any() and np.ptp(longer) > 0 and np.ptp(margins) > 0
    return {
        "correlation": float(spearmanr(margins, longer).statistic) if varied else 0.0,
        "prefers_longer": _share((margins > 0) == (longer > 0), weights, unlike),
        "chosen_is_longer": _share(longer > 0, weights, unlike),
        "accuracy_chosen_longer": _share(margins > 0, weights, longer > 0),
        "accuracy_chosen_shorter": _share(margins > 0, weights, longer < 0),
    }


def _share(true: NDArray[np.bool_], weights: Floats, among: NDArray[np.bool_]) -> float | None:
    return float(np.average(true[among], weights=weights[among])) if among.any() else None
