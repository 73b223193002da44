"""Figures of training: learning curves, and how likely better and worse responses became."""

from collections.abc import Mapping

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from clha.reporting.drawing import PALETTE, Drawn, canvas, finish, legend_above
from clha.reporting.text import number, percent

Floats = NDArray[np.float64]


# Column of the metrics table -> heading; the panels of the learning curves, in order.
_PANELS = {
    "loss": "loss",
    "loss/contrastive": "contrastive loss",
    "loss/sft": "SFT loss",
    "rewards/accuracies": "pairs in the right order",
}


def learning_curves(metrics: Mapping[str, Floats]) -> Drawn | None:
    """Training metrics over steps ({"step": [S], name: [S]}); None where none of the known ones was logged."""
    panels = {n: t for n, t in _PANELS.items() if n in metrics and np.isfinite(metrics[n]).any()}
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    with canvas(rows, 2 if len(panels) > 1 else 1, height=1.75 * rows + 0.1) as (figure, axes):
        for axis in axes[len(panels) :]:
            axis.remove()
        said = []
        for axis, (name, heading) in zip(axes, panels.items(), strict=False):
            known = np.isfinite(metrics[name])
            steps, values = metrics["step"][known], metrics[name][known]
            smooth = _smoothed(values)
            axis.plot(steps, values, color=PALETTE["base"], linewidth=0.8, alpha=0.7)
            axis.plot(steps, smooth, color=PALETTE["trained"], linewidth=1.8)
            held = metrics.get(f"eval_{name}")
            if held is not None and np.isfinite(held).any():
                at = np.isfinite(held)
                axis.plot(metrics["step"][at], held[at], "o-", color=PALETTE["loss"], markersize=3.5, linewidth=1.2)
            axis.set_title(heading)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(4))
            if name == "rewards/accuracies":
                axis.axhline(0.5, color=PALETTE["mark"], linewidth=1, linestyle=(0, (4, 2)))
                axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
            said.append(f"{heading} from {number(float(smooth[0]))} to {number(float(smooth[-1]))}")
        figure.supxlabel("optimizer step", fontsize=8, color=PALETTE["muted"])
        held_too = any(n.startswith("eval_") and np.isfinite(v).any() for n, v in metrics.items())
        return finish(
            figure,
            "learning-curves",
            "Learning curves",
            f"Grey: each logged step; blue: running mean{'; orange: dev split' if held_too else ''}. "
            f"{said[0].capitalize()}.",
            f"Line charts over optimizer steps: {'; '.join(said)}.",
        )


def better_and_worse(metrics: Mapping[str, Floats]) -> Drawn | None:
    """Mean log-probability per token of the better and the worse response of a pair, over steps; None if not logged."""
    lines = {"rewards/chosen": ("better response", "trained"), "rewards/rejected": ("worse response", "loss")}
    if not all(n in metrics and np.isfinite(metrics[n]).any() for n in lines):
        return None
    ends = {}
    with canvas(height=3.6) as (figure, (axis,)):
        for name, (label, role) in lines.items():
            known = np.isfinite(metrics[name])
            steps, values = metrics["step"][known], metrics[name][known]
            smooth = _smoothed(values)
            axis.plot(steps, values, color=PALETTE[role], linewidth=0.7, alpha=0.4)
            axis.plot(steps, smooth, color=PALETTE[role], linewidth=1.8, label=label)
            ends[label] = float(smooth[0]), float(smooth[-1])
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("log-probability per token, nats")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        legend_above(axis)
        (b0, b1), (w0, w1) = ends.values()
        note = f"The distance between the two went from {number(b0 - w0)} to {number(b1 - w1)} nats."
        if b1 < b0:
            note += " Both became" if w1 < w0 else " The better one became"
            note += " less likely than at the start."
        return finish(
            figure,
            "better-and-worse",
            "Better and worse responses",
            note,
            f"Line chart of log-probabilities per token over optimizer steps. {note}",
        )


def _smoothed(values: Floats) -> Floats:
    """Running mean over a tenth of the points, shorter at the ends."""
    reach = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(0, at - reach), np.minimum(len(values), at + reach + 1)
    return (sums[high] - sums[low]) / (high - low)
