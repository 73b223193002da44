"""The README.md of a trained model: what it was made from, with which settings, and what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

_PAPERS = {
    "clha": ("CLHA: A Simple yet Effective Contrastive Learning Framework for Human Alignment", "2403.16649"),
    "dpo": ("Direct Preference Optimization", "2305.18290"),
    "dpo_smoothed": ("Direct Preference Optimization, conservative form", "2305.18290"),
    "dpo_robust": ("Provably Robust DPO", "2403.00409"),
    "rrhf": ("RRHF: Rank Responses to Align Language Models with Human Feedback without tears", "2304.05302"),
    "pro": ("Preference Ranking Optimization for Human Alignment", "2306.17492"),
}
_SHOWN = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "noise/kept_fraction",
    "eval_loss",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
)


def model_card(
    *,
    name: str,
    base_model: str,
    loss: str,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, float]],
    versions: Mapping[str, str],
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        name: of the model.
        base_model: what was trained.
        loss: one of `clha.training.objectives.LOSSES`.
        data: facts about the data, label -> value.
        settings: of the training run.
        rows: the metrics table.
        versions: package -> version.
    """
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- clha",
        f"- {loss}",
        "- preference-alignment",
        "---",
        "",
        f"# {name}",
        "",
        f"{base_model}, aligned with ranked responses by the `{loss}` loss{_paper(loss)}.",
        "",
        "## Data",
        "",
        *_table(("", ""), data.items()),
        "",
        "## Metrics",
        "",
        *_metrics(rows),
        "",
        "`rewards/*` are mean log-probabilities per response token, in nats, of the better and the worse response of "
        "the pairs that training kept.",
        "",
        "## Settings",
        "",
        *_table(("setting", "value"), settings.items()),
        "",
        "## Versions",
        "",
        ", ".join(f"{package} {version}" for package, version in versions.items()),
        "",
    ]
    return "\n".join(lines)


def _paper(loss: str) -> str:
    if loss not in _PAPERS:
        return ""
    title, number = _PAPERS[loss]
    return f" ([{title}](https://arxiv.org/abs/{number}))"


def _table(head: tuple[str, str], rows: Any) -> list[str]:
    cells = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *cells]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _metrics(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """First and last value of each metric that says how training went."""
    if not rows:
        return ["No step was logged."]
    out = ["| metric | first | last |", "|---|---|---|"]
    for name in _SHOWN:
        values = [row[name] for row in rows if name in row]
        if values:
            out.append(f"| {name} | {values[0]:.4f} | {values[-1]:.4f} |")
    return [*out, "", f"{int(rows[-1]['step'])} optimizer steps."]
