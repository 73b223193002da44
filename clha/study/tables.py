"""The results of a noise study as tables, for the terminal, for Markdown and for the Prefect UI."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """A table of text: title, column names, rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


_DETECTION = (
    "flips",
    "seed",
    "reward model's pairs",
    "its accuracy",
    "AUROC",
    "theory",
    "AUPRC",
    "estimated flips",
)
_TRAINING = (
    "flips",
    "weights",
    "held-out accuracy",
    "gain over no weights",
    "smallest effect it could show",
    "s of the slowest run",
)

# The labels ask for no calibration, or for a boundless one: they do not tell noise from a weak reward model.
_AT_LIMIT = ", factor at its limit"


def study_grids(results: Mapping[str, Any]) -> list[Grid]:
    """One table of detection and, where policies were trained, one of training."""
    found = [_detection_row(d) for d in results["detection"]]
    grids = [Grid("Finding flipped labels", _DETECTION, found)]
    if results["training"]:
        trained = [_training_row(t) for t in results["training"]]
        grids.append(Grid("Training on flipped labels", _TRAINING, trained))
    return grids


def _detection_row(d: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{d['rate']:.0%}",
        str(d["seed"]),
        str(d["arm"]),
        _with(d["accuracy"], d["accuracy_interval"]),
        _with(d.get("auroc"), d.get("auroc_interval")),
        f"{d['theory_auroc']:.3f}",
        _with(d.get("auprc"), d.get("auprc_interval")),
        _with(d["flip_rate"], d["flip_rate_interval"]) + (_AT_LIMIT if d["factor_at_limit"] else ""),
    )


def _training_row(t: Mapping[str, Any]) -> tuple[str, ...]:
    gain = t.get("gain")
    return (
        f"{t['rate']:.0%}",
        str(t["weights"]),
        f"{t['accuracy']:.3f}",
        _with(gain["gain"], gain["interval"], sign=True) if gain else "",
        f"{gain['smallest_effect']:.3f}" if gain else "",
        f"{t['seconds']:.0f}",
    )


def _with(value: float | None, interval: Sequence[float] | None, sign: bool = False) -> str:
    if value is None or interval is None:
        return "n/a"
    form = "+.3f" if sign else ".3f"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def markdown(grids: Sequence[Grid]) -> str:
    """The tables as Markdown, one after the other."""
    parts = []
    for grid in grids:
        lines = ["| " + " | ".join(cells) + " |" for cells in (grid.columns, *grid.rows)]
        parts.append("\n".join([lines[0], "|---" * len(grid.columns) + "|", *lines[1:]]))
    return "\n\n".join(parts) + "\n"
