"""Figures of the evaluation: gains, differences, lengths, and how far the judges agree."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clha.reporting.drawing import HEIGHT, PALETTE, Drawn, canvas, count_axis, finish, legend_above, some_rows
from clha.reporting.text import number, percent

Floats = NDArray[np.float64]


class Bar(NamedTuple):
    """One row of the overview: a gain in standard deviations with its interval."""

    label: str
    value: float
    low: float
    high: float
    main: bool


def gain_overview(bars: Sequence[Bar]) -> Drawn:
    """The gain by every view of it, side by side on one scale."""
    with canvas(height=max(HEIGHT, 0.75 + 0.27 * len(bars))) as (figure, (axis,)):
        places = np.arange(len(bars))[::-1]
        axis.axvline(0, color=PALETTE["mark"], linewidth=1)
        for place, bar in zip(places, bars, strict=True):
            color = PALETTE["trained"] if bar.main else PALETTE["base"]
            axis.plot([bar.low, bar.high], [place, place], color=color, linewidth=3.5 if bar.main else 2)
            axis.plot([bar.value], [place], "o", color=color, markersize=6 if bar.main else 4.5)
        axis.set_yticks(places, [b.label for b in bars])
        axis.set_ylim(-0.6, len(bars) - 0.4)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        figure.supxlabel("gain in standard deviations of the base's rewards", fontsize=8, color=PALETTE["muted"])
        for label, bar in zip(axis.get_yticklabels(), bars, strict=True):
            label.set_color(PALETTE["ink"])
            label.set_fontweight("bold" if bar.main else "normal")
        said = "; ".join(
            f"{b.label} {number(b.value, 2, True)} [{number(b.low, 2)}, {number(b.high, 2)}]" for b in bars
        )
        return finish(
            figure,
            "gain",
            "Gain, seen from several sides",
            "Dots: mean gain; lines: 95% interval over prompts. What crosses the red line is not told apart from no "
            "change.",
            f"Dot plot of gains in standard deviations. {said}.",
        )


def reward_differences(difference: Floats, gain: float, interval: Sequence[float], tie: float) -> Drawn:
    """Reward of the trained policy's answer minus that of the base's, over prompts: [P]."""
    wins, losses = int((difference > tie).sum()), int((difference < -tie).sum())
    with canvas() as (figure, (axis,)):
        edges = _symmetric_edges(difference)
        better = np.histogram(difference[difference > 0], edges)[0]
        worse = np.histogram(difference[difference < 0], edges)[0]
        same = np.histogram(difference[difference == 0], edges)[0]
        width = np.diff(edges)
        for heights, bottom, role in (
            (same, np.zeros_like(same), "dropped"),
            (better, same, "trained"),
            (worse, same, "loss"),
        ):
            axis.bar(edges[:-1], heights, width, bottom, align="edge", color=PALETTE[role], linewidth=0)
        top = max(1, int((better + worse + same).max()))
        axis.set_ylim(0, top * 1.3)
        axis.plot(interval, [top * 1.14] * 2, color=PALETTE["ink"], linewidth=3)
        axis.plot([gain], [top * 1.14], "o", color=PALETTE["ink"], markersize=5.5)
        axis.axvline(0, color=PALETTE["mark"], linewidth=1)
        axis.annotate(
            f"mean {number(gain, None, True)}",
            (max(interval[1], gain), top * 1.14),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        axis.set_xlabel("reward of trained minus base, per prompt")
        count_axis(axis, "prompts")
        note = f"{wins} prompts got a better answer (blue), {losses} a worse one (orange)"
        rest = len(difference) - wins - losses
        note += f", {rest} one of equal reward." if rest else "."
        return finish(
            figure,
            "reward-differences",
            "Which answers got better",
            f"{note} The dot is the mean with its 95% interval.",
            f"Histogram of paired reward differences over {len(difference)} prompts. {note} Mean "
            f"{number(gain, None, True)}, interval {number(interval[0])} to {number(interval[1])}.",
        )


def lengths(base: Floats, trained: Floats, cut: tuple[float, float]) -> Drawn:
    """Answer lengths of both policies, [P] each, tokens; `cut`: shares of their answers cut at the token limit."""
    with canvas() as (figure, (axis,)):
        top = max(1, int(max(base.max(), trained.max())))
        step = -(-top // 24)  # whole tokens, or the bars would come out uneven
        edges = np.arange(0, top + 2 * step, step).tolist()
        for values, role, label in ((base, "base", "base"), (trained, "trained", "trained")):
            axis.hist(values, edges, histtype="stepfilled", color=PALETTE[role], alpha=0.18, linewidth=0)
            axis.hist(values, edges, histtype="step", color=PALETTE[role], linewidth=1.6, label=label)
            axis.axvline(float(values.mean()), color=PALETTE[role], linewidth=1, linestyle=(0, (4, 2)))
        axis.set_xlabel("answer length in tokens")
        count_axis(axis, "prompts")
        legend_above(axis)
        note = (
            f"Mean {number(float(base.mean()), 1)} tokens before and {number(float(trained.mean()), 1)} after training"
        )
        return finish(
            figure,
            "lengths",
            "Answer lengths",
            f"{note} (dashed).",
            f"Histograms of answer lengths. {note}.",
        )


def judges_agree(judge: Floats, training: Floats, share: float | None, correlation: float | None) -> Drawn:
    """Reward differences that the unseen and the training reward model see, [P] each."""
    with canvas() as (figure, (axis,)):
        at = some_rows(len(judge))
        same = np.sign(judge) == np.sign(training)
        for mask, role, label in ((same, "trained", "agree"), (~same, "loss", "disagree")):
            rows = at[mask[at]]
            axis.scatter(training[rows], judge[rows], s=9, color=PALETTE[role], alpha=0.6, linewidths=0, label=label)
        axis.axhline(0, color=PALETTE["line"], linewidth=1)
        axis.axvline(0, color=PALETTE["line"], linewidth=1)
        axis.set_xlabel("difference by the training reward model")
        axis.set_ylabel("difference by the judge")
        axis.grid(visible=False)
        legend_above(axis)
        note = (
            f"Both prefer the same answer on {percent(share)} of the prompts (chance: 50%); correlation within a "
            f"prompt {number(correlation, 2, True)}."
        )
        return finish(
            figure,
            "judges",
            "Do the two reward models agree?",
            note,
            f"Scatter plot of trained minus base reward by two reward models. {note}",
        )


def _symmetric_edges(values: Floats) -> Floats:
    """Bin edges with one at zero, so that no bar holds better and worse alike."""
    reach = float(np.abs(values).max()) or 1.0
    half = min(20, max(5, int(len(values) ** 0.5)))
    return np.linspace(-reach, reach, 2 * half + 1) * 1.0001
