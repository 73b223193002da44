"""The figures of the report, each from plain arrays. Captions say what is to be seen, with its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from clha.reporting.drawing import HEIGHT, PALETTE, Drawn, canvas, finish
from clha.reporting.text import number, percent

Floats = NDArray[np.float64]

# Points of a scatter: more make the page heavy and the picture no clearer.
_MAX_POINTS = 800


class Bar(NamedTuple):
    """One row of the overview: a gain in standard deviations with its interval."""

    label: str
    value: float
    low: float
    high: float
    main: bool


def gain_overview(bars: Sequence[Bar]) -> Drawn:
    """The gain by every view of it, side by side on one scale."""
    with canvas(height=0.75 + 0.27 * len(bars)) as (figure, (axis,)):
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
        _counts(axis, "prompts")
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


def lengths(base: Floats, trained: Floats) -> Drawn:
    """Answer lengths of both policies, [P] each, tokens."""
    with canvas() as (figure, (axis,)):
        top = max(1, int(max(base.max(), trained.max())))
        step = -(-top // 24)  # whole tokens, or the bars would come out uneven
        edges = np.arange(0, top + 2 * step, step).tolist()
        for values, role, label in ((base, "base", "base"), (trained, "trained", "trained")):
            axis.hist(values, edges, histtype="stepfilled", color=PALETTE[role], alpha=0.18, linewidth=0)
            axis.hist(values, edges, histtype="step", color=PALETTE[role], linewidth=1.6, label=label)
            axis.axvline(float(values.mean()), color=PALETTE[role], linewidth=1, linestyle=(0, (4, 2)))
        axis.set_xlabel("answer length in tokens")
        _counts(axis, "prompts")
        _legend(axis)
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


def reward_against_length(points: Mapping[str, tuple[Floats, Floats]], name: str, title: str, ylabel: str) -> Drawn:
    """Reward against length in tokens: {"base" or "trained": (lengths [N], rewards [N])}; a single entry has no legend.

    The rank correlation in the caption is over all points together.
    """
    with canvas() as (figure, (axis,)):
        for role, (x, y) in points.items():
            at = _some(len(x))
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
            _legend(axis)
        lengths, rewards = (np.concatenate([p[i] for p in points.values()]) for i in (0, 1))
        note = length_note(rank_correlation(lengths, rewards))
        return finish(
            figure, name, title, f"{note} Lines: least squares.", f"Scatter plot of reward against length. {note}"
        )


def rank_correlation(x: Floats, y: Floats) -> float | None:
    """Spearman's; None where one of the two does not vary."""
    from scipy.stats import spearmanr

    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)


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


def judges_agree(judge: Floats, training: Floats, share: float | None, correlation: float | None) -> Drawn:
    """Reward differences that the unseen and the training reward model see, [P] each."""
    with canvas() as (figure, (axis,)):
        at = _some(len(judge))
        same = np.sign(judge) == np.sign(training)
        for mask, role, label in ((same, "trained", "agree"), (~same, "loss", "disagree")):
            rows = at[mask[at]]
            axis.scatter(training[rows], judge[rows], s=9, color=PALETTE[role], alpha=0.6, linewidths=0, label=label)
        axis.axhline(0, color=PALETTE["line"], linewidth=1)
        axis.axvline(0, color=PALETTE["line"], linewidth=1)
        axis.set_xlabel("difference by the training reward model")
        axis.set_ylabel("difference by the judge")
        axis.grid(visible=False)
        _legend(axis)
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
        _counts(axis, "candidates")
        _legend(axis)
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
        _counts(axis, "pairs")
        _legend(axis)
        return finish(figure, "pair-gaps", "Pairs kept and dropped", note, f"Stacked histogram of reward gaps. {note}")


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
        _counts(axis, "pairs")
        note = (
            f"{number(len(weights), 0)} kept pairs say as much as {number(effective, 0)} of equal weight "
            f"({percent(effective / len(weights))}); mean weight {number(float(weights.mean()))} (dashed)."
        )
        return finish(figure, "pair-weights", "Weights of the kept pairs", note, f"Histogram of pair weights. {note}")


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
            held = metrics.get(f"eval/{name}")
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
        held_too = any(n.startswith("eval/") and np.isfinite(v).any() for n, v in metrics.items())
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
        _legend(axis)
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


def reliability(models: Mapping[str, Mapping[str, Any]]) -> Drawn:
    """Reliability diagrams on held-out pairs, {name: its `calibration`}: filled after, hollow before calibration.

    Each holds `reliability` and `reliability_before`: lists "predicted", "observed", "weight", one entry per bin.
    """
    roles = ("trained", "loss", "base")
    with canvas() as (figure, (axis,)):
        axis.plot([0, 1], [0, 1], color=PALETTE["mark"], linewidth=1, linestyle=(0, (4, 2)))
        for (name, calibration), role in zip(models.items(), roles, strict=False):
            bins = calibration["reliability"]
            mass = np.asarray(bins["weight"], dtype=np.float64)
            axis.plot(bins["predicted"], bins["observed"], color=PALETTE[role], linewidth=1.2, label=name)
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
        _legend(axis)
        note = "On held-out pairs, both orders of each, after calibration (hollow: before)"
        return finish(
            figure,
            "reliability",
            "Do the reward models mean what they say?",
            f"{note}; larger dots stand for more pairs. On the red line stated and observed agree.",
            "Reliability diagram of "
            + " and ".join(
                f"{n}: " + ", ".join(f"{percent(p)} stated, {percent(o)} observed" for p, o in _ends(c["reliability"]))
                for n, c in models.items()
            ),
        )


def _ends(bins: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
    points = list(zip(bins["predicted"], bins["observed"], strict=True))
    return [points[0], points[-1]] if len(points) > 1 else points


def _symmetric_edges(values: Floats) -> Floats:
    """Bin edges with one at zero, so that no bar holds better and worse alike."""
    reach = float(np.abs(values).max()) or 1.0
    half = min(20, max(5, int(len(values) ** 0.5)))
    return np.linspace(-reach, reach, 2 * half + 1) * 1.0001


def _edges_with(values: Floats, cut: float | None) -> list[float]:
    """Bin edges over `values`, moved so that one of them is `cut`."""
    edges = np.histogram_bin_edges(values, min(44, max(8, int(len(values) ** 0.5))))
    if cut is None or not edges[0] < cut < edges[-1]:
        return edges.tolist()  # type: ignore[no-any-return]
    step = edges[1] - edges[0]
    below, above = int(np.ceil((cut - edges[0]) / step)), int(np.ceil((edges[-1] - cut) / step))
    moved = cut + step * np.arange(-below, above + 1)
    moved[moved > cut] = np.nextafter(moved[moved > cut], np.inf)
    return np.unique(moved).tolist()  # type: ignore[no-any-return]


def _smoothed(values: Floats) -> Floats:
    """Running mean over a tenth of the points, shorter at the ends."""
    reach = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(0, at - reach), np.minimum(len(values), at + reach + 1)
    return (sums[high] - sums[low]) / (high - low)


def _some(count: int) -> NDArray[np.int64]:
    """At most `_MAX_POINTS` row numbers, the same ones each time."""
    if count <= _MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, _MAX_POINTS, replace=False))


def _counts(axis: Axes, what: str) -> None:
    axis.set_ylabel(what)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _legend(axis: Axes) -> None:
    """Above the axes, where it hides nothing."""
    handles: Any = axis.get_legend_handles_labels()
    axis.legend(*handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.1, columnspacing=1.2)
