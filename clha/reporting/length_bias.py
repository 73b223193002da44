"""Whether a reward model follows length."""

import numpy as np
from numpy.typing import NDArray

from clha.reporting.text import number

Floats = NDArray[np.float64]


def length_note(correlation: float | None) -> str:
    """What a rank correlation of reward and length says about the reward model."""
    if correlation is None:
        return "Rewards or lengths do not vary."
    size = abs(correlation)
    likes = "longer" if correlation > 0 else "shorter"
    kind = (
        f"the reward model is length-biased, towards {likes} responses"
        if size >= 0.3
        else f"the reward model leans towards {likes} responses"
        if size >= 0.15
        else "the reward model hardly follows length"
    )
    return f"Rank correlation of reward and length {number(correlation, 2, True)}: {kind}."


def rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)
