"""Figures of candidates and pairs: rewards, gaps, what is kept, weights."""

from collections.abc import Mapping

import numpy as np
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from clha.reporting.drawing import HEIGHT, PALETTE, Drawn, canvas, count_axis, finish, legend_above
from clha.reporting.text import number, percent

Floats = NDArray[np.float64]


def candidate_rewards(rewards: Mapping[str, Floats], best: Floats, threshold: float | None) -> Drawn:
    """Rewards of all candidates by origin ({origin: [N]}) and of each prompt's best ([P])."""
    names = {
        "generated": "generated",
        "dataset_chosen": "chosen in the data",
        "dataset_rejected": "rejected in the data",
        "external": "external",
    }
    roles = {"generated": "base", "dataset_chosen": "trained", "dataset_rejected": "loss", "external": "muted"}
    with canvas() as (figure, (axis,)):
        everything = np.concatenate(list(rewards.values()))
        edges = np.histogram_bin_edges(everything, min(40, max(8, int(len(everything) ** 0.5)))).tolist()
        for origin, values in rewards.items():
            color = PALETTE[roles.get(origin, "muted")]
            axis.hist(values, edges, histtype="stepfilled", color=color, alpha=0.25, linewidth=0)
            axis.hist(values, edges, histtype="step", color=color, linewidth=1.3, label=names.get(origin, origin))
        axis.hist(best, edges, histtype="step", color=PALETTE["ink"], linewidth=1.8, label="best of each prompt")
        note = f"{number(len(everything), 0)} candidates of {number(len(best), 0)} prompts."
        if threshold is not None and np.isfinite(threshold):
            axis.axvline(threshold, color=PALETTE["mark"], linewidth=1.2, linestyle=(0, (4, 2)))
            note += (
                f" The best candidate is above the SFT threshold (red) for {percent(float((best > threshold).mean()))}."
            )
        axis.set_xlabel("reward by the training reward model")
        count_axis(axis, "candidates")
        legend_above(axis)
        return finish(
            figure, "candidate-rewards", "Rewards of the candidates", note, f"Histogram of candidate rewards. {note}"
        )


def pair_gaps(gap: Floats, kept: NDArray[np.bool_], cut: float | None) -> Drawn:
    """Reward gaps of all pairs [M], those that training uses and those taken for noise."""
    share = float(kept.mean()) if len(kept) else 0.0
    with canvas() as (figure, (axis,)):
        edges = _edges_with(gap, cut)
        axis.hist(
            [gap[~kept], gap[kept]],
            edges,
            stacked=True,
            color=[PALETTE["dropped"], PALETTE["trained"]],
            label=["dropped as noise", "kept"],
            linewidth=0,
        )
        note = f"{percent(share)} of {number(len(gap), 0)} pairs are kept."
        if cut is not None:
            axis.axvline(cut, color=PALETTE["mark"], linewidth=1.2, linestyle=(0, (4, 2)))
            note += f" The cut lies at a gap of {number(cut)} (red)."
        axis.set_xlabel("reward gap of the pair, higher-ranked minus lower-ranked")
        count_axis(axis, "pairs")
        legend_above(axis)
        return finish(figure, "pair-gaps", "Pairs kept and dropped", note, f"Stacked histogram of reward gaps. {note}")


def _edges_with(values: Floats, cut: float | None) -> list[float]:
    """Bin edges over `values`, moved so that one of them is `cut`."""
    edges = np.histogram_bin_edges(values, min(44, max(8, int(len(values) ** 0.5))))
    if cut is None or not edges[0] < cut < edges[-1]:
        return edges.tolist()  # type: ignore[no-any-return]
    step = edges[1] - edges[0]
    below, above = int(np.ceil((cut - edges[0]) / step)), int(np.ceil((edges[-1] - cut) / step))
    moved = cut + step * np.arange(-below, above + 1)
    moved[0], moved[-1] = edges[0], max(moved[-1], edges[-1])
    return np.unique(moved).tolist()  # type: ignore[no-any-return]


def kept_by_distance(shares: Mapping[int, float]) -> Drawn:
    """Share of pairs kept, by places between the two in rank order: {distance: share}."""
    with canvas(height=HEIGHT) as (figure, (axis,)):
        places = np.arange(len(shares))
        values = list(shares.values())
        axis.bar(places, [1.0] * len(values), 0.62, color=PALETTE["dropped"], alpha=0.45)
        axis.bar(places, values, 0.62, color=PALETTE["trained"])
        for place, value in zip(places, values, strict=True):
            axis.annotate(percent(value), (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xticks(places, [str(d) for d in shares])
        axis.set_ylim(0, 1.12)
        axis.set_yticks([0, 0.5, 1])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
        axis.set_xlabel("places between the two in rank order")
        said = ", ".join(f"{percent(v)} at distance {d}" for d, v in shares.items())
        return finish(
            figure,
            "kept-by-distance",
            "Kept pairs by rank distance",
            "Neighbours in rank order are the hardest to tell apart.",
            f"Bar chart of the share of pairs kept: {said}.",
        )


def pair_weights(weights: Floats, effective: float) -> Drawn:
    """Weights of the pairs that are kept, [K]; `effective`: their effective sample size."""
    with canvas() as (figure, (axis,)):
        top = float(weights.max())
        edges = np.linspace(0, top * 1.0001, min(32, max(8, int(len(weights) ** 0.5))) + 1).tolist()
        axis.hist(weights, edges, color=PALETTE["trained"], linewidth=0)
        axis.axvline(float(weights.mean()), color=PALETTE["ink"], linewidth=1.2, linestyle=(0, (4, 2)))
        axis.set_xlabel("weight of a kept pair")
        count_axis(axis, "pairs")
        note = (
            f"{number(len(weights), 0)} kept pairs say as much as {number(effective, 0)} of equal weight "
            f"({percent(effective / len(weights))}); mean weight {number(float(weights.mean()))} (dashed)."
        )
        return finish(figure, "pair-weights", "Weights of the kept pairs", note, f"Histogram of pair weights. {note}")
