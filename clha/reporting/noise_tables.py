"""What a run says about noise beyond its figures, for the Prefect UI: pairs to read, and how well rewards foretell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clha.reporting.examples import Example, pair_examples
from clha.reporting.noise_facts import Nodes, NoiseData, fitted_model, scale_is_known
from clha.reporting.tables import read_json
from clha.reporting.text import number, percent, unmarked

# Longer responses are cut: a table is for looking, the report for reading.
RESPONSE_LIMIT = 300

_BINS = 10


@dataclass(frozen=True)
class NoiseTables:
    """The figures (what, value), the pairs trusted least and most as Markdown, and reliability by bins.

    `pairs` is "" and `reliability` is empty where there is none.
    """

    figures: list[tuple[str, str]]
    pairs: str
    reliability: list[dict[str, Any]]


def pairs_markdown(nodes: Nodes, data: NoiseData) -> str:
    """The ten pairs least and the ten most likely to stand in the right order, each as a row of a table."""
    if not len(data.pairs.gap) or "prepare" not in nodes:
        return ""
    found = pair_examples(data.pairs, nodes, known_scale=scale_is_known(nodes), text_limit=RESPONSE_LIMIT)
    parts = [
        f"### {title}\n\n{_table(found[name])}"
        for name, title in (("least", "Least trusted pairs"), ("most", "Most trusted pairs"))
        if found[name]
    ]
    return "\n\n".join(parts)


def _table(examples: Sequence[Example]) -> str:
    lines = [
        "| p(order right) | gap | weight | prompt | ranked first | ranked second |",
        "|---:|---:|---:|---|---|---|",
    ]
    for e in examples:
        figures = [percent(e["probability"], 1), number(e["gap"]), number(e["weight"]) + " turned" * e["turned"]]
        texts = [e["summary"], *(f"{s['origin']}, reward {number(s['reward'])}: {s['text']}" for s in e["sides"])]
        lines.append("| " + " | ".join([*figures, *map(unmarked, texts)]) + " |")
    return "\n".join(lines)


def reliability_rows(nodes: Nodes) -> list[dict[str, Any]]:
    """Stated probabilities and shares that came true, in bins of the stated ones, before and after calibration.

    Of the held-out pairs of the reward model that rescoring used, where it was fitted, and of the labels, where
    rescoring calibrated on them. Each pair counts in both orders.
    """
    measured: dict[str, Mapping[str, Any]] = {}
    fitted = fitted_model(nodes)
    if fitted is not None:
        measured["reward model"] = read_json(fitted, "fit.json")["calibration"]
    labels = nodes["weigh"].manifest.get("calibration")
    if labels:
        measured["labels"] = labels
    return [row for name, calibration in measured.items() for row in _bins(name, calibration)]


def _bins(name: str, calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for when, diagram in (("before", "reliability_before"), ("after", "reliability")):
        bins = calibration[diagram]
        for predicted, observed, mass in zip(bins["predicted"], bins["observed"], bins["weight"], strict=True):
            place = min(int(predicted * _BINS), _BINS - 1)
            rows.setdefault(place, {})[when] = (predicted, observed, mass)
    out = []
    for place, found in sorted(rows.items()):
        row = {"of": name, "bin": f"{percent(place / _BINS)} to {percent((place + 1) / _BINS)}"}
        for when in ("before", "after"):
            predicted, observed, mass = found.get(when, (None, None, 0))
            row |= {f"predicted {when}": percent(predicted, 1), f"observed {when}": percent(observed, 1)}
            row[f"n {when}"] = number(mass, 0 if float(mass).is_integer() else 1)
        out.append(row)
    return out
