"""What the figures of an evaluation say in plain words: better, worse or not told apart, and what is unsure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

# Below this no sign-flip test can reach p < 0.05 (2 / 2**5 = 0.0625), and a bootstrap interval is too narrow.
MIN_PROMPTS = 6

# Above this rise of the share of repeated 4-grams a better reward is not taken for better answers.
MUCH_REPETITION = 0.15

# Above this rise of the share of empty answers, which nobody can judge, the judged ones do not speak for all.
MUCH_SILENCE = 0.02

OutcomeName = Literal["better", "worse", "not told apart"]


class Verdict(NamedTuple):
    """`outcome` for programs and headings, `sentence` for people.

    `caution`: what makes a better reward hard to believe, or "" where nothing does; `sentence` ends with it.
    """

    outcome: OutcomeName
    sentence: str
    caution: str = ""


def digits_for(low: float, high: float) -> int:
    """Decimals that show an interval with two digits of its half-width, at least 2 and at most 4."""
    half = (high - low) / 2
    return 2 if half <= 0 else min(4, max(2, 1 - math.floor(math.log10(half))))


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign: +0.31, -0.02; zero is +0.00."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "+", 1) if float(text) == 0 else text


def span(interval: Sequence[float]) -> str:
    """An interval in words: "+0.06 to +0.33"."""
    low, high = interval
    digits = digits_for(low, high)
    return f"{signed(low, digits)} to {signed(high, digits)}"


def p_text(p: float) -> str:
    """A p value for a sentence: "p = 0.012", "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Read the gain of `metrics["reward"]`: told apart only where its 95% interval leaves zero out."""
    reward = metrics["reward"]
    gain, (low, high), prompts = reward["gain"], reward["interval"], reward["prompts"]
    digits = digits_for(low, high)
    seen = not metrics["judge"].get("unseen", True)
    judge = "a reward model that training used too" if seen else "a reward model that training never saw"
    in_sd = reward.get("gain_in_sd")
    size = f", {signed(in_sd['gain'])} standard deviations" if in_sd else ""
    facts = f"95% interval {span((low, high))}{size}, {p_text(reward['p_value'])}, {_prompts(prompts)}"
    moved = "unchanged" if gain == 0 else f"{abs(gain):.{digits}f} {'higher' if gain > 0 else 'lower'}"
    if prompts < MIN_PROMPTS:
        return Verdict(
            "not told apart",
            f"Too few prompts to tell ({prompts}; at least {MIN_PROMPTS} are needed): the mean reward is {moved} "
            f"under {judge}.",
        )
    if low > 0:
        said = f"The trained policy is better: its mean reward is {moved} under {judge} ({facts})."
        caution = _caution(metrics)
        return Verdict("better", f"{said} {caution}".strip(), caution)
    if high < 0:
        return Verdict("worse", f"The trained policy is worse: its mean reward is {moved} under {judge} ({facts}).")
    return Verdict(
        "not told apart",
        f"The two policies are not told apart: the trained policy's mean reward is {moved} under {judge}, but the "
        f"interval includes zero ({facts}).",
    )


def _caution(metrics: Mapping[str, Any]) -> str:
    """What a reward cannot see and a reader would: silence, and text that has fallen apart (reward hacking)."""
    silent = metrics["silent"]
    if silent["trained"] - silent["base"] > MUCH_SILENCE * silent["prompts"]:
        return f"But {_silence(silent)} Silence is no answer: do not believe the gain."
    before, after = _repetition(metrics)
    if after - before < MUCH_REPETITION:
        return ""
    return (
        f"But it repeats itself far more: {after:.0%} of its 4-grams occurred before in the answer, {before:.0%} in "
        "the base's. Read the answers before you believe the gain."
    )


def _silence(silent: Mapping[str, int]) -> str:
    return (
        f"it gave an empty answer to {silent['trained']:,} of {_prompts(silent['prompts'])} (the base to "
        f"{silent['base']:,}), which no reward model can judge: they are in no figure here."
    )


def _repetition(metrics: Mapping[str, Any]) -> tuple[float, float]:
    """Share of repeated 4-grams of base and trained; 0 where answers are too short to have any."""
    sides = metrics["repetition"]
    return tuple(sides[p].get("repetition_4") or 0.0 for p in ("base", "trained"))  # type: ignore[return-value]


def doubts(metrics: Mapping[str, Any]) -> list[str]:
    """What a careful reader would hold against the verdict, one sentence each, weightiest first."""
    reward, judge, lengths = metrics["reward"], metrics["judge"], metrics["lengths"]
    outcome = verdict(metrics).outcome
    out: list[str] = []
    if not judge.get("unseen", True):
        out.append(
            "The judge is the reward model that training used: a gain may be that model's weakness found, not better "
            "answers."
        )
    if metrics["split"] == "dev":
        out.append("These are prompts of the dev split, by which settings are chosen: the gain may be flattering.")
    if outcome == "not told apart" and reward["prompts"] >= MIN_PROMPTS:
        out.append(
            f"The interval includes zero: with {_prompts(reward['prompts'])} a true gain anywhere from "
            f"{span(reward['interval'])} would look like this."
        )
    if (outcome != "not told apart") != (reward["p_value"] < 0.05) and reward["prompts"] >= MIN_PROMPTS:
        out.append(f"Interval and sign-flip test do not agree ({p_text(reward['p_value'])}): the case is borderline.")
    out += _judge_doubts(metrics, outcome)
    adjusted = metrics.get("length_adjusted")
    length_low, length_high = lengths["interval"]
    if length_low > 0 or length_high < 0:
        change = lengths["gain"] / lengths["base"]["mean"] if lengths["base"]["mean"] else 0.0
        if abs(change) >= 0.1:
            what, liked = ("longer", "length") if change > 0 else ("shorter", "brevity")
            out.append(
                f"The trained policy's answers are {abs(change):.0%} {what}; a judge that likes {liked} would be moved "
                "by that alone."
            )
    if outcome == "better" and adjusted and adjusted["interval"][0] <= 0:
        out.append(
            f"At equal length the gain is {signed(adjusted['gain'], digits_for(*adjusted['interval']))}, and its "
            f"interval from {span(adjusted['interval'])} includes zero."
        )
    silent = metrics["silent"]
    if silent["trained"] > silent["base"] and not verdict(metrics).caution:
        out.append(f"Of the trained policy: {_silence(silent)}")
    out += _style_doubts(metrics)
    out.append(
        "The interval covers the choice of prompts, not the randomness of training: another seed may give another gain."
    )
    return out


def _judge_doubts(metrics: Mapping[str, Any], outcome: OutcomeName) -> list[str]:
    judge, out = metrics["judge"], []
    accuracy = judge.get("held_out_accuracy")
    if accuracy and accuracy["interval"][0] <= 0.5:
        out.append(
            f"The judge itself is weak: on held-out pairs it is right in {accuracy['value']:.0%}, and its interval "
            "reaches down to chance."
        )
    interval = judge.get("agreement_interval")
    if judge["agreement"] is None:
        out.append("On no prompt do both reward models prefer one answer: how far they agree cannot be said.")
    elif interval and interval[0] <= 0.5:
        word = "no more often than chance would" if judge["agreement"] <= 0.5 else "hardly more often than chance"
        out.append(
            f"The two reward models prefer the same answer in {judge['agreement']:.0%} of the prompts, {word} "
            f"(interval {interval[0]:.0%} to {interval[1]:.0%})."
        )
    seen = metrics.get("training_reward")
    if seen and seen["interval"][0] > 0 and outcome != "better":
        out.append(
            f"The training reward rose ({signed(seen['gain'])}) and the unseen one did not: training may have learnt "
            "what its reward model likes, not what is better."
        )
    return out


def _style_doubts(metrics: Mapping[str, Any]) -> list[str]:
    out = []
    finish = metrics["finish"]
    cut, cut_before = finish["trained"]["truncation_rate"], finish["base"]["truncation_rate"]
    if cut >= 0.5:
        out.append(f"{cut:.0%} of the trained policy's answers are cut at the token limit: the judge read beginnings.")
    elif cut - cut_before >= 0.1:
        out.append(
            f"The trained policy stops by itself less often: {cut:.0%} of its answers are cut, {cut_before:.0%} before."
        )
    before, after = _repetition(metrics)
    if after - before >= 0.1 and not verdict(metrics).caution:
        out.append(
            f"The trained policy repeats itself more: {after:.0%} of its 4-grams occurred before in the answer, "
            f"{before:.0%} in the base's."
        )
    sides = metrics["repetition"]
    variety, variety_before = (sides[p].get("distinct_2") or 0.0 for p in ("trained", "base"))
    if variety < 0.7 * variety_before:
        out.append(
            f"The trained policy's answers are more alike: {variety:.0%} of all their bigrams are distinct, "
            f"{variety_before:.0%} in the base's. It may have found one answer that the reward models like."
        )
    return out


def _prompts(count: int) -> str:
    return f"{count:,} prompt{'' if count == 1 else 's'}"
