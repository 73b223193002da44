"""Calibration of a reward model on labelled pairs: temperature, expected calibration error, Brier score, NLL.

A margin d = reward(chosen) - reward(rejected) says that the label is right with p = sigmoid(a d). There is no
intercept, so p(a, b) + p(b, a) = 1; what is measured is therefore measured over both orders of each pair.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit

Floats = NDArray[np.float64]

# Limits of the fitted factor: a model that is worse than chance gets the lower one, a faultless one the upper.
SMALLEST, LARGEST = 1e-3, 1e3


@dataclass(frozen=True)
class Calibration:
    """How well p = sigmoid(margin) matches what happens; lower is better for all three."""

    ece: float
    brier: float
    nll: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_temperature(margins: Floats, weights: Floats | None = None) -> float:
    """The factor a > 0 that minimises the mean of -log sigmoid(a d): Platt scaling without intercept.

    `margins` [N]: chosen minus rejected on pairs that the model was not fitted on. As in Platt (1999) a label counts
    as right with (N + 1) / (N + 2), so a faultless judge of few pairs is not certain. Within [1e-3, 1e3] divided by
    the margins' root mean square.
    """
    right = (len(margins) + 1) / (len(margins) + 2)
    size = float(np.sqrt(np.mean(np.square(margins))))
    if size == 0:
        return 1.0
    scaled = margins / size
    low, high = np.log(SMALLEST), np.log(LARGEST)
    found = minimize_scalar(
        lambda log_a: _smoothed_loss(np.exp(log_a) * scaled, right, weights),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(np.exp(found.x) / size)


def _smoothed_loss(margins: Floats, right: float, weights: Floats | None) -> float:
    loss = right * np.logaddexp(0, -margins) + (1 - right) * np.logaddexp(0, margins)
    return float(np.average(loss, weights=weights))


def reliability(margins: Floats, weights: Floats | None = None, bins: int = 10) -> tuple[Floats, Floats, Floats]:
    """A reliability diagram over both orders of each pair: mean predicted p, share that came true, weight, per bin.

    Bins are equal in width over [0, 1]; empty ones are left out.
    """
    w = np.ones(len(margins)) if weights is None else weights
    p = np.concatenate([expit(margins), expit(-margins)])
    true = np.concatenate([np.ones(len(margins)), np.zeros(len(margins))])
    w = np.concatenate([w, w])
    index = np.minimum((p * bins).astype(int), bins - 1)
    mass = np.bincount(index, w, bins).astype(float)
    used = mass > 0
    predicted = np.bincount(index, w * p, bins)[used] / mass[used]
    observed = np.bincount(index, w * true, bins)[used] / mass[used]
    return predicted, observed, mass[used]


def measure(margins: Floats, weights: Floats | None = None, bins: int = 10) -> Calibration:
    """Calibration of p = sigmoid(margins) [N] where every label is taken for right.

    ECE is the mean |predicted - observed| over `bins` bins of equal width (Guo et al. 2017).
    """
    predicted, observed, mass = reliability(margins, weights, bins)
    return Calibration(
        ece=float(np.average(np.abs(predicted - observed), weights=mass)),
        brier=float(np.average(np.square(expit(-margins)), weights=weights)),
        nll=float(np.average(np.logaddexp(0, -margins), weights=weights)),
    )
