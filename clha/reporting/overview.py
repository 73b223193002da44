"""What stands at the top of the report: key figures, and doubts about how they came to be."""

from typing import Any

from clha.reporting.sections import Nodes, Section
from clha.reporting.text import duration, number, percent, size


def chain_doubts(noise: Section | None, training: Section | None, nodes: Nodes) -> list[str]:
    """What the stages before evaluation give reason to doubt."""
    out = []
    if training and training["contrastive"]:
        first, last = training["contrastive"]
        if last >= first:
            out.append(
                f"The contrastive loss did not fall ({number(first)} in the first quarter of training, {number(last)} "
                "in the last): the learning rate may be too high, or the pairs too noisy."
            )
    if noise and noise["share"] is not None and noise["share"] < 0.25:
        out.append(f"Only {percent(noise['share'])} of the pairs passed the noise rule: training saw little contrast.")
    for name, artifact in nodes.items():
        rows, bad = artifact.manifest["rows_in"], artifact.manifest["rows_quarantined"]
        if rows and bad / rows >= 0.05:
            out.append(f"{name} put {percent(bad / rows)} of its rows into quarantine: the rest may not stand for all.")
    return out


def tiles(result: Section | None, noise: Section | None, training: Section | None) -> list[dict[str, Any]]:
    """The key figures: label, value, note; `bar` holds shares of wins, ties and losses."""
    out: list[dict[str, Any]] = []
    if result:
        m = result["metrics"]
        reward, judge, lengths, finish = m["reward"], m["judge"], m["lengths"], m["finish"]
        in_sd = reward["gain_in_sd"] or {"gain": reward["gain"], "interval": reward["interval"]}
        unit = "SD" if reward["gain_in_sd"] else ""
        low, high = in_sd["interval"]
        note = f"95% interval {number(low, 2, True)} to {number(high, 2, True)}"
        out.append(
            {"label": "Gain in reward", "value": f"{number(in_sd['gain'], 2, True)} {unit}".strip(), "note": note}
        )
        total = m["wins"] + m["ties"] + m["losses"]
        bar = [m["wins"] / total, m["ties"] / total, m["losses"] / total]
        note = f"{m['wins']} wins, {m['ties']} ties, {m['losses']} losses"
        out.append({"label": "Better answers", "value": percent(bar[0]), "note": note, "bar": bar})
        seen = m["training_reward"]["gain_in_sd"]
        if seen:
            low, high = seen["interval"]
            note = f"seen in training; {number(low, 2, True)} to {number(high, 2, True)}"
            out.append({"label": "Training reward", "value": f"{number(seen['gain'], 2, True)} SD", "note": note})
        value = f"{number(lengths['base']['mean'], 1)} → {number(lengths['trained']['mean'], 1)}"
        ends = [percent(finish[p]["eos_rate"]) for p in ("base", "trained")]
        note = f"tokens; {ends[0]} → {ends[1]} end by themselves"
        out.append({"label": "Answer length", "value": value, "note": note})
        before, after = (m["repetition"][p]["repetition_4"] for p in ("base", "trained"))
        note = "4-grams seen before in the answer"
        out.append({"label": "Repetition", "value": f"{percent(before)} → {percent(after)}", "note": note})
        if judge["agreement"] is not None:
            low, high = judge["agreement_interval"]
            note = f"{percent(low)} to {percent(high)}; chance is 50%"
            out.append({"label": "Reward models agree", "value": percent(judge["agreement"]), "note": note})
    if noise and noise["share"] is not None:
        note = f"{noise['kept']:,} of {noise['pairs']:,}"
        out.append({"label": "Pairs kept", "value": percent(noise["share"]), "note": note})
    if training:
        note = f"{training['steps']:,} steps, peak memory {size(training['memory'])}"
        out.append({"label": "Training", "value": duration(training["seconds"]), "note": note})
    return out
