"""Figures of reward models: calibration, and reward against length."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from clha.reporting.drawing import PALETTE, Drawn, canvas, finish, legend_above, some_rows
from clha.reporting.length_bias import length_note, rank_correlation
from clha.reporting.text import number, percent

Floats = NDArray[np.float64]


def reliability(models: Mapping[str, Mapping[str, Any]]) -> Drawn:
    """Reliability diagrams on held-out pairs, {name: its `calibration`}: filled after, hollow before calibration.

    Each holds `reliability` and `reliability_before`: lists "predicted", "observed", "weight", one entry per bin.
    """
    title = "Do the reward models mean what they say?"
    return _diagram(models, "reliability", title, "On held-out pairs, both orders of each, after calibration")


def label_reliability(calibration: Mapping[str, Any]) -> Drawn:
    """The same of the data's labels, on which rescoring calibrated the rewards: the manifest's `calibration`."""
    note = f"On {number(calibration['pairs'], 0)} labels of the data, flips among them allowed for after calibration"
    return _diagram({"labels": calibration}, "label-reliability", "Do the rewards foretell the labels?", note)


def _diagram(models: Mapping[str, Mapping[str, Any]], name: str, title: str, note: str) -> Drawn:
    roles = ("trained", "loss", "base")
    with canvas() as (figure, (axis,)):
        axis.plot([0, 1], [0, 1], color=PALETTE["mark"], linewidth=1, linestyle=(0, (4, 2)))
        for (model, calibration), role in zip(models.items(), roles, strict=False):
            bins = calibration["reliability"]
            mass = np.asarray(bins["weight"], dtype=np.float64)
            axis.plot(bins["predicted"], bins["observed"], color=PALETTE[role], linewidth=1.2, label=model)
            axis.scatter(
                bins["predicted"], bins["observed"], s=4 + 44 * mass / mass.max(), color=PALETTE[role], linewidths=0
            )
            raw = calibration["reliability_before"]
            (line,) = axis.plot(raw["predicted"], raw["observed"], "o:", color=PALETTE[role], linewidth=0.9)
            line.set(markerfacecolor="none", markersize=4)
        for bound in (axis.set_xlim, axis.set_ylim):
            bound(-0.02, 1.02)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
        axis.set_xlabel("stated probability that the response is preferred")
        axis.set_ylabel("share that was")
        axis.grid(axis="x", visible=True)
        legend_above(axis)
        return finish(
            figure,
            name,
            title,
            f"{note} (hollow: before); larger dots stand for more pairs. On the red line stated and observed agree.",
            "Reliability diagram of "
            + " and ".join(
                f"{n}: " + ", ".join(f"{percent(p)} stated, {percent(o)} observed" for p, o in _ends(c["reliability"]))
                for n, c in models.items()
            ),
        )


def learning_curves(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Drawn:
    """Held-out accuracy against the number of pairs, {name: points with "pairs", "accuracy", "interval"}."""
    roles = ("trained", "loss", "base")
    with canvas() as (figure, (axis,)):
        said = []
        for (name, points), role in zip(models.items(), roles, strict=False):
            pairs = [p["pairs"] for p in points]
            low, high = ([p["interval"][i] for p in points] for i in (0, 1))
            axis.fill_between(pairs, low, high, color=PALETTE[role], alpha=0.15, linewidth=0)
            axis.plot(pairs, [p["accuracy"] for p in points], "o-", color=PALETTE[role], markersize=3.5, label=name)
            said.append(f"{name}: " + ", ".join(f"{percent(p['accuracy'])} with {p['pairs']}" for p in points))
        axis.axhline(0.5, color=PALETTE["mark"], linewidth=1, linestyle=(0, (4, 2)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: percent(v)))
        axis.set_xlabel("pairs fitted on")
        axis.set_ylabel("held-out pairs judged right")
        legend_above(axis)
        note = " ".join(f"{name}: {more_pairs_note(points)}" for name, points in models.items())
        return finish(
            figure,
            "reward-learning-curve",
            "Would more pairs help the reward models?",
            f"{note} Bands: 95% intervals; red: chance.",
            f"Line chart of accuracy over the number of pairs. {'; '.join(said)}.",
        )


def more_pairs_note(points: Sequence[Mapping[str, Any]]) -> str:
    """What the last step of the curve brought; it is called a gain where it is beyond half the interval."""
    if len(points) < 2:
        return "too few pairs for a curve."
    before, last = points[-2], points[-1]
    gain = last["accuracy"] - before["accuracy"]
    half = (last["interval"][1] - last["interval"][0]) / 2
    verdict = "more pairs should help" if gain > half else "no clear gain from more pairs"
    return f"{signed_points(gain)} from {before['pairs']} to {last['pairs']} pairs, {verdict}."


def signed_points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{number(100 * share, 1, True)} points"


def _ends(bins: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    points = list(zip(bins["predicted"], bins["observed"], strict=True))
    return [points[0], points[-1]] if len(points) > 1 else points


def reward_against_length(points: Mapping[str, tuple[Floats, Floats]], name: str, title: str, ylabel: str) -> Drawn:
    """Reward against length in tokens: {"base" or "trained": (lengths [N], rewards [N])}; a single entry has no legend.

    The rank correlation in the caption is over all points together.
    """
    with canvas() as (figure, (axis,)):
        for role, (x, y) in points.items():
            at = some_rows(len(x))
            color = PALETTE[role]
            axis.scatter(x[at], y[at], s=9, color=color, alpha=0.65, linewidths=0, label=role)
            if np.ptp(x) > 0:
                slope, offset = np.polyfit(x, y, 1)
                ends = np.array([x.min(), x.max()])
                axis.plot(ends, offset + slope * ends, color=color, linewidth=1.8)
        axis.set_xlabel("length in tokens")
        axis.set_ylabel(ylabel)
        axis.grid(axis="x", visible=True)
        if len(points) > 1:
            legend_above(axis)
        lengths, rewards = (np.concatenate([p[i] for p in points.values()]) for i in (0, 1))
        note = length_note(rank_correlation(lengths, rewards))
        return finish(
            figure, name, title, f"{note} Lines: least squares.", f"Scatter plot of reward against length. {note}"
        )
