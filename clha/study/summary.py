"""What weights do for the trained policy: gains over the same held-out pairs, with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

# Effect that a two-sided test at 5% finds with 80% power, in standard errors.
_POWER = 2.8
_RESAMPLES = 10_000


def paired_gain(arm: Sequence[Bools], baseline: Sequence[Bools], groups: Sequence[str]) -> dict[str, Any]:
    """Held-out accuracy of one arm minus that of another: one array [N] of right judgements for each seed.

    The difference of a pair is its mean over seeds; the interval comes from 10,000 bootstrap samples of the groups
    of pairs. `smallest_effect` is the gain that such a sample would show with 80% power.
    """
    difference = np.mean([a.astype(float) - b for a, b in zip(arm, baseline, strict=True)], axis=0)
    names = sorted(set(groups))
    place = {g: i for i, g in enumerate(names)}
    of_pair = np.array([place[g] for g in groups])
    sums, counts = np.bincount(of_pair, difference), np.bincount(of_pair)
    drawn = np.random.default_rng(0).integers(0, len(names), (_RESAMPLES, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "gain": float(difference.mean()),
        "interval": [float(low), float(high)],
        "smallest_effect": float(_POWER * means.std()),
        "pairs": len(difference),
        "seeds": len(arm),
    }
