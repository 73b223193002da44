"""The sections of the report, worked out from the artifacts of a run: without its artifacts a section is left out."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from clha.evaluation.verdict import doubts, verdict
from clha.reporting import evaluation_figures, noise_figures, reward_figures, training_figures
from clha.reporting.drawing import Drawn
from clha.reporting.examples import answer_examples, pair_examples
from clha.reporting.length_bias import length_note
from clha.reporting.noise_facts import NOISE_NODES, noise_facts, noise_lines, read_noise, scale_is_known
from clha.reporting.tables import (
    Floats,
    paired_scores,
    quarantine_counts,
    read_json,
    split_counts,
)
from clha.reporting.text import literal, number, percent
from clha.rewards.head import fitted_config
from clha.runs import Run
from clha.schema import SPLITS
from clha.store import Artifact

Section = dict[str, Any]
Nodes = Mapping[str, Artifact]

# Prompts that a subset needs to be shown beside the whole.
SUBSET_PROMPTS = 20


def result_section(nodes: Nodes, run: Run) -> Section | None:
    """Verdict, doubts, figures and examples of the evaluation."""
    if not {"evaluate", "prepare", "answers.base", "answers.trained"} <= nodes.keys():
        return None
    metrics = read_json(nodes["evaluate"], "metrics.json")
    scores = paired_scores(nodes["evaluate"].read("scores"))
    reward = metrics["reward"]
    drawn = [
        evaluation_figures.gain_overview(_bars(metrics)),
        evaluation_figures.reward_differences(
            scores.gain, reward["gain"], reward["interval"], float(nodes["evaluate"].manifest["settings"]["tie"])
        ),
        evaluation_figures.lengths(
            scores.base_length,
            scores.trained_length,
            (metrics["finish"]["base"]["truncation_rate"], metrics["finish"]["trained"]["truncation_rate"]),
        ),
        reward_figures.reward_against_length(
            {"base": (scores.base_length, scores.base), "trained": (scores.trained_length, scores.trained)},
            "reward-against-length",
            "Does the judge like length?",
            "reward by the judge",
        ),
    ]
    said = verdict(metrics)
    return {
        "metrics": metrics,
        "outcome": said.outcome,
        "sentence": said.sentence.removesuffix(said.caution).strip(),
        "caution": said.caution,
        "doubts": doubts(metrics),
        "figures": drawn,
        "measures": _measures(metrics),
        "subsets": _subsets(metrics),
        "examples": answer_examples(scores, nodes, run.name),
    }


def _bars(metrics: Mapping[str, Any]) -> list[evaluation_figures.Bar]:
    """The gain by several views, in standard deviations of the base's rewards where there are any."""
    reward, training, adjusted = metrics["reward"], metrics["training_reward"], metrics["length_adjusted"]
    in_sd = reward["gain_in_sd"]
    bars = []
    unit = reward["gain"] / in_sd["gain"] if in_sd and in_sd["gain"] else 1.0

    def bar(label: str, gain: float, interval: list[float], scale: float, main: bool = False) -> None:
        bars.append(evaluation_figures.Bar(label, gain / scale, interval[0] / scale, interval[1] / scale, main))

    if in_sd:
        bar("unseen judge" if metrics["judge"]["unseen"] else "judge", in_sd["gain"], in_sd["interval"], 1.0, True)
    else:
        bar("judge", reward["gain"], reward["interval"], 1.0, True)
    if adjusted:
        bar("same, at equal length", adjusted["gain"], adjusted["interval"], unit)
    if training["gain_in_sd"]:
        bar("training reward", training["gain_in_sd"]["gain"], training["gain_in_sd"]["interval"], 1.0)
    # Of a subset with a handful of prompts the interval says nothing; the table has them all.
    subsets = {n: s for n, s in metrics["subsets"].items() if s["reward"]["prompts"] >= SUBSET_PROMPTS}
    if len(metrics["subsets"]) > 1:
        for name, part in sorted(subsets.items(), key=lambda s: -s[1]["reward"]["prompts"])[:6]:
            bar(f"judge: {literal(name, 24) or 'no subset'}", part["reward"]["gain"], part["reward"]["interval"], unit)
    return bars


def _measures(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of measures: label, base, trained, change and its interval, note."""
    out: list[dict[str, str]] = []

    def row(label: str, base: str, trained: str, change: str = "", note: str = "") -> None:
        out.append({"label": label, "base": base, "trained": trained, "change": change, "note": note})

    def reward_row(label: str, r: Mapping[str, Any], note: str) -> None:
        change = f"{number(r['gain'], 3, True)} [{number(r['interval'][0], 3)}, {number(r['interval'][1], 3)}]"
        row(label, number(r["base"], 3), number(r["trained"], 3), change, note)

    reward, training, adjusted = metrics["reward"], metrics["training_reward"], metrics["length_adjusted"]
    reward_row("Reward", reward, "by the judge")
    reward_row("Reward, sigmoid", reward["sigmoid"], "mean of sigmoid(reward), as the paper reports it")
    if adjusted:
        change = f"{number(adjusted['gain'], 3, True)} [{number(adjusted['interval'][0], 3)}, "
        change += f"{number(adjusted['interval'][1], 3)}]"
        row("Reward at equal length", "", "", change, f"{number(adjusted['per_token'], None, True)} per token more")
    reward_row("Training reward", training, "by the model that training used: seen")
    lengths, finish = metrics["lengths"], metrics["finish"]
    change = f"{number(lengths['gain'], 1, True)} [{number(lengths['interval'][0], 1)}, "
    change += f"{number(lengths['interval'][1], 1)}]"
    row("Length, mean", number(lengths["base"]["mean"], 1), number(lengths["trained"]["mean"], 1), change, "tokens")
    row("Length, median", number(lengths["base"]["median"], 0), number(lengths["trained"]["median"], 0), "", "tokens")
    for key, label in (
        ("eos_rate", "Ended by itself"),
        ("stop_string_rate", "Ended at a stop string"),
        ("truncation_rate", "Cut at the token limit"),
        ("empty_rate", "Empty, yet judged"),
    ):
        if key in ("eos_rate", "truncation_rate") or finish["base"][key] or finish["trained"][key]:
            row(label, percent(finish["base"][key], 1), percent(finish["trained"][key], 1))
    silent = metrics["silent"]
    if silent["base"] or silent["trained"]:
        note = f"of {silent['prompts']:,} prompts; no reward model can judge them, so they are in no other row"
        row("Empty, not judged", f"{silent['base']:,}", f"{silent['trained']:,}", "", note)
    repetition, overlap = metrics["repetition"], metrics["overlap"]
    for key, label, note in (
        ("repetition_4", "Repetition", "4-grams that occurred before in the answer"),
        ("distinct_2", "distinct-2", "distinct bigrams over all; falls with length"),
    ):
        row(label, percent(repetition["base"][key], 1), percent(repetition["trained"][key], 1), "", note)
    if overlap["prompts"]:
        on = f"against the chosen response of {overlap['prompts']:,} prompts"
        bleu, legacy = overlap["sacrebleu"], overlap["bleu_char_legacy"]
        row("sacrebleu", number(bleu["base"], 2), number(bleu["trained"], 2), "", on)
        row("bleu_char_legacy", number(legacy["base"], 2), number(legacy["trained"], 2), "", f"of characters, {on}")
    return out


def _subsets(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"name": literal(name, 60) or "–", **part} for name, part in metrics["subsets"].items()]
    return sorted(rows, key=lambda r: -r["reward"]["prompts"]) if len(rows) > 1 else []


def noise_section(nodes: Nodes) -> Section | None:
    """Rewards of the candidates, pairs kept and dropped, the least and the most trusted ones."""
    if not {"prepare", *NOISE_NODES} <= nodes.keys():
        return None
    data = read_noise(nodes)
    facts = noise_facts(nodes, data)
    pairs, candidates = data.pairs, data.candidates
    drawn = [
        noise_figures.candidate_rewards(
            _by_origin(candidates), pairs.best_reward, nodes["weigh"].manifest.get("sft_threshold")
        )
    ]
    if len(pairs.gap):
        drawn.append(noise_figures.pair_gaps(pairs.gap, pairs.kept, facts["cut"]))
        drawn.append(noise_figures.kept_by_distance(facts["kept_by_distance"]))
        kept = pairs.weight[pairs.kept]
        if len(kept) and float(np.ptp(kept)) > 1e-6:
            drawn.append(noise_figures.pair_weights(kept, pairs.effective_sample_size))
    calibration = nodes["weigh"].manifest.get("calibration")
    if calibration:
        drawn.append(reward_figures.label_reliability(calibration))
    drawn.append(
        reward_figures.reward_against_length(
            {"base": (candidates["length"].to_numpy().astype(np.float64), candidates["reward"].to_numpy())},
            "candidate-length",
            "Does the training reward model like length?",
            "reward of the candidate",
        )
    )
    return facts | {
        "figures": drawn,
        "table": noise_lines(facts),
        "examples": pair_examples(pairs, nodes, known_scale=scale_is_known(nodes)) if len(pairs.gap) else {},
    }


def _by_origin(candidates: pa.Table) -> dict[str, Floats]:
    """Rewards by origin."""
    names = np.asarray(candidates["origin"].to_pylist())
    values = candidates["reward"].to_numpy().astype(np.float64)
    return {str(name): np.sort(values[names == name]) for name in sorted(set(names.tolist()))}


def reward_section(nodes: Nodes) -> Section | None:
    """Cards of the fitted reward models, their calibration, and how far they agree."""
    cards, bins, curves = [], {}, {}
    for node, title, use in (
        ("fit_reward.train", "Training reward model", "ranks candidates; training sees it"),
        ("fit_reward.eval", "Judge", "evaluation only; training never sees it"),
    ):
        if node not in nodes:
            continue
        fit = read_json(nodes[node], "fit.json")
        config = fitted_config(nodes[node].folder / "reward_model")
        length = length_note(fit["length_bias"]["correlation"])
        cards.append({"title": title, "use": use, "fit": fit, "config": config, "length": length})
        bins[title.lower()] = fit["calibration"]
        if fit.get("learning_curve"):
            curves[title.lower()] = fit["learning_curve"]
    drawn = [reward_figures.reliability(bins)] if bins else []
    if curves:
        drawn.append(reward_figures.learning_curves(curves))
    if "evaluate" in nodes:
        scores = paired_scores(nodes["evaluate"].read("scores"))
        judge = read_json(nodes["evaluate"], "metrics.json")["judge"]
        seen = scores.trained_training - scores.base_training
        drawn.append(evaluation_figures.judges_agree(scores.gain, seen, judge["agreement"], judge["correlation"]))
    return {"cards": cards, "figures": drawn} if drawn else None


def training_section(nodes: Nodes) -> Section | None:
    """Learning curves and what training took."""
    if "train" not in nodes:
        return None
    table = nodes["train"].read("metrics")
    columns = {name: table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in table.column_names}
    drawn = [f for f in (training_figures.learning_curves(columns), training_figures.better_and_worse(columns)) if f]
    manifest = nodes["train"].manifest
    last = {name: values[np.isfinite(values)][-1] for name, values in columns.items() if np.isfinite(values).any()}
    return {
        "figures": drawn,
        "steps": int(columns["step"].max()) if len(columns["step"]) else 0,
        "seconds": manifest["seconds"],
        "memory": manifest.get("peak_memory_bytes"),
        "contrastive": _quarters(columns),
        "notes": [literal(str(n), 300) for n in manifest.get("notes", [])],
        "last": {name: float(v) for name, v in last.items() if name != "step"},
    }


def _quarters(columns: Mapping[str, Floats]) -> tuple[float, float] | None:
    """Mean contrastive loss over the first and the last quarter of the logged steps; None for too few of them."""
    values = columns.get("loss/contrastive", np.empty(0))
    values = values[np.isfinite(values)]
    quarter = len(values) // 4
    return (float(values[:quarter].mean()), float(values[-quarter:].mean())) if quarter >= 3 else None


def data_section(nodes: Nodes) -> Section | None:
    """Prompts per split and subset; what was quarantined, and why."""
    if "prepare" not in nodes:
        return None
    prompts = nodes["prepare"].read("prompts", ["prompt_id", "subset", "split"])
    rows = split_counts(prompts)
    splits = [s for s in SPLITS if any(s in r for r in rows)]
    total = {"subset": "all subsets", "total": sum(r["total"] for r in rows)} | {
        s: sum(r.get(s, 0) for r in rows) for s in splits
    }
    return {
        "splits": splits,
        "total": total,
        "rows": [{**r, "subset": literal(r["subset"], 60) or "–"} for r in rows],
        "quarantine": quarantine_counts(nodes),
    }


def making_section(nodes: Nodes, run: Run) -> Section:
    """Where time and memory went, settings and versions."""
    rows = [
        {
            "node": name,
            "key": a.key,
            "created": a.manifest["created"],
            "seconds": a.manifest["seconds"],
            "memory": a.manifest.get("peak_memory_bytes"),
            "device": a.manifest.get("device") or "–",
            "speed": a.manifest.get("tokens_per_second"),
        }
        for name, a in nodes.items()
    ]
    longest = max((r["seconds"] for r in rows), default=0) or 1
    for row in rows:
        row["share"] = row["seconds"] / longest
    versions: dict[str, str] = {}
    for artifact in nodes.values():
        versions |= artifact.manifest.get("versions", {})
    return {
        "nodes": rows,
        "seconds": sum(r["seconds"] for r in rows),
        "versions": dict(sorted(versions.items())),
        "settings": literal(yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True, width=100)),
    }


def all_figures(sections: Mapping[str, Section | None]) -> list[Drawn]:
    """Every figure of the report, in order."""
    return [f for s in sections.values() if s for f in s.get("figures", ())]
