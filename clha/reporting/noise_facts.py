"""What a run's rewards and weights say about noise, in figures: for the report, the terminal and the Prefect UI."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clha.reporting.length_bias import length_note, rank_correlation
from clha.reporting.tables import Floats, Ordering, Pairs, pairs_of, read_json, scored_candidates
from clha.reporting.text import number, percent
from clha.rewards.trust import LabelTrust
from clha.store import Artifact

Nodes = Mapping[str, Artifact]

# Without them there is nothing to say.
NOISE_NODES = ("generate", "score", "weigh")

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class NoiseData:
    """All pairs of candidates that may count, and the candidates themselves (origin, length in tokens, reward)."""

    pairs: Pairs
    candidates: pa.Table


def read_noise(nodes: Nodes) -> NoiseData:
    """Read the artifacts `NOISE_NODES`."""
    candidates = scored_candidates(nodes)
    rewards = nodes["score"].read("rewards", ["prompt_id", "candidate_id", "reward", "member_rewards"])
    pairs = pairs_of(candidates, rewards, nodes["weigh"].read("weights"), ordering_of(nodes))
    return NoiseData(pairs, candidates)


def ordering_of(nodes: Nodes) -> Ordering:
    """What the order of candidates rests on, by the weights' own settings: the run's may have changed since."""
    facts = nodes["weigh"].manifest
    rescore = facts["settings"]
    trust = LabelTrust(np.array(facts["calibration_factors"]), (facts.get("flip_rate") or {}).get("used"))
    by_label = rescore["rank_by"] == "label"
    return Ordering(rescore["rank_by"], trust, by_label and rescore["noise"]["method"] != "from_column")


def scale_is_known(nodes: Nodes) -> bool:
    """Whether differences of rewards are log-odds: those of models that fit_reward made, or calibrated ones."""
    if nodes["weigh"].manifest["settings"]["noise"]["calibration"] != "reward_model":
        return True
    reward = nodes["score"].manifest["settings"]["reward"]
    parts = reward["members"] if reward["type"] == "ensemble" else [reward]
    return all(part["type"] in ("fitted", "encoder_head") and part["scale"] == 1 for part in parts)


def fitted_model(nodes: Nodes) -> Artifact | None:
    """The fitted reward model that the rewards are of: the run may have another one since, or none."""
    used = nodes["score"].manifest.get("key_parts", {}).get("inputs", {}).get("fit_reward.train")
    fitted = nodes.get("fit_reward.train")
    return fitted if fitted is not None and fitted.content == used else None


def noise_facts(nodes: Nodes, data: NoiseData) -> dict[str, Any]:
    """The figures, as plain JSON values; None for what the artifacts cannot tell."""
    pairs, facts = data.pairs, nodes["weigh"].manifest
    rescore = facts["settings"]
    kept = pairs.weight[pairs.kept]
    length = data.candidates["length"].to_numpy().astype(np.float64)
    correlation = rank_correlation(length, data.candidates["reward"].to_numpy())
    return {
        "method": rescore["noise"]["method"],
        "rank_by": rescore["rank_by"],
        "prompts": len(pairs.prompt_ids),
        "candidates": data.candidates.num_rows,
        "pairs": len(pairs.gap),
        "kept": int(pairs.kept.sum()),
        "share": float(pairs.kept.mean()) if len(pairs.gap) else None,
        "kept_by_distance": {int(d): float(pairs.kept[pairs.distance == d].mean()) for d in np.unique(pairs.distance)},
        "cut": facts.get("gap"),
        "gaps": dict(zip(map(str, _QUANTILES), np.quantile(pairs.gap, _QUANTILES).tolist(), strict=True))
        if len(pairs.gap)
        else None,
        "effective": pairs.effective_sample_size,
        "weight_mean": float(kept.mean()) if len(kept) else None,
        "prompts_without_pairs": len(pairs.prompt_ids) - len(np.unique(pairs.prompt[pairs.kept])),
        "sft_share": float((pairs.sft_lambda > 0).mean()) if len(pairs.prompt_ids) else None,
        "flip_rate": facts.get("flip_rate"),
        "calibration": _without_diagrams(facts.get("calibration")),
        "labels": {name: facts[f"labels_{name}"] for name in ("judged", "doubted", "p_right")}
        if facts.get("labels_judged")
        else None,
        "flags": _flag_counts(nodes["weigh"].read("weights", ["flags"])),
        "length_correlation": correlation,
        "length_note": length_note(correlation),
        "members_agree": _members_agree(nodes["score"].read("rewards", ["prompt_id", "member_rewards"])),
        "reward_model": _reward_model(nodes),
        "judge": _judge(nodes),
    }


def _without_diagrams(calibration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return {name: calibration[name] for name in ("pairs", "before", "after")} if calibration else None


def _flag_counts(weights: pa.Table) -> list[tuple[str, int]]:
    """Prompts by the flags of their weights, the commonest first."""
    counts = pc.value_counts(pc.list_flatten(weights["flags"]))
    return sorted(((c["values"].as_py(), c["counts"].as_py()) for c in counts), key=lambda c: (-c[1], c[0]))


def _members_agree(rewards: pa.Table) -> float | None:
    """Mean correlation, within prompts, of the rewards of each two members; None for a single reward model."""
    members = rewards["member_rewards"].combine_chunks()
    values = members.flatten().to_numpy().reshape(len(members), -1)
    if values.shape[1] < 2:
        return None
    prompt = rewards["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    count = np.bincount(prompt)[:, None]
    centred = values - np.stack([np.bincount(prompt, v) for v in values.T], axis=1)[prompt] / count[prompt]
    varied = centred.std(axis=0) > 0
    if varied.sum() < 2:
        return None
    between: Floats = np.corrcoef(centred[:, varied].T)
    return float(between[np.triu_indices(len(between), 1)].mean())


def _reward_model(nodes: Nodes) -> dict[str, Any] | None:
    """What fitting measured of the reward model that rescoring used; None where it was given."""
    fitted = fitted_model(nodes)
    if fitted is None:
        return None
    fit = read_json(fitted, "fit.json")
    names = ("accuracy", "accuracy_interval", "pairs", "length_bias")
    calibration = {when: fit["calibration"][when] for when in ("before", "after")}
    halves = fit.get("agreement_between_halves")  # of linear heads only
    return {name: fit[name] for name in names} | {"agreement_between_halves": halves, "calibration": calibration}


def _judge(nodes: Nodes) -> dict[str, Any] | None:
    """How far the evaluation's reward model agrees with that of rescoring on the answers of both policies."""
    if "evaluate" not in nodes:
        return None
    judge = read_json(nodes["evaluate"], "metrics.json")["judge"]
    return {name: judge[name] for name in ("agreement", "agreement_interval", "correlation")}


def noise_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as rows of a table: what, value."""
    lines = [
        ("rule", f"{facts['method']}, ranked by {facts['rank_by']}"),
        ("candidates", f"{number(facts['candidates'], 0)} of {number(facts['prompts'], 0)} prompts"),
    ]
    if facts["share"] is None:
        lines.append(("pairs", "none: no prompt has two candidates that can count as a pair"))
    else:
        lines += _pair_lines(facts)
    off = f"; {facts['prompts_without_pairs']} prompts have no pair left" if facts["prompts_without_pairs"] else ""
    lines.append(("SFT part", f"on for {percent(facts['sft_share'])} of the prompts{off}"))
    if facts["flip_rate"]:
        low, high = facts["flip_rate"]["interval"]
        used = facts["flip_rate"].get("used")
        note = f"; used: {percent(used, 1)}" if used is not None else ""
        note += "; factor at its limit" if facts["flip_rate"].get("factor_at_limit") else ""
        lines.append(
            ("flipped labels", f"{percent(facts['flip_rate']['estimate'], 1)} [{percent(low)}, {percent(high)}]{note}")
        )
    if facts["calibration"]:
        note = f"{number(facts['calibration']['pairs'], 0)} labels, flips allowed for after"
        lines.append(("calibration on labels", f"{_calibration(facts['calibration'])}; {note}"))
    if facts["labels"]:
        judged, doubted, right = (facts["labels"][name] for name in ("judged", "doubted", "p_right"))
        lines.append(("labels", f"{judged} judged, {doubted} doubted, mean p(label right) {number(right, 2)}"))
    if facts["reward_model"]:
        lines += _model_lines(facts["reward_model"])
    if facts["members_agree"] is not None:
        lines.append(("members agree", f"correlation within prompts {number(facts['members_agree'], 2)}"))
    if facts["judge"] and facts["judge"]["agreement"] is not None:
        low, high = facts["judge"]["agreement_interval"]
        lines.append(
            (
                "judge agrees",
                f"{percent(facts['judge']['agreement'])} [{percent(low)}, {percent(high)}] of the answers, "
                f"correlation {number(facts['judge']['correlation'], 2)}",
            )
        )
    lines.append(("length", facts["length_note"]))
    lines += [(f"flag {name}", f"{number(count, 0)} prompts") for name, count in facts["flags"]]
    return lines


def _pair_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    distances = ", ".join(f"{d}: {percent(s)}" for d, s in facts["kept_by_distance"].items())
    gaps = ", ".join(f"{percent(float(q))} {number(v)}" for q, v in facts["gaps"].items())
    cut = "no cut: pairs are weighted" if facts["cut"] is None else f"pairs within {number(facts['cut'])} are noise"
    effective = f"{number(facts['effective'], 0)}"
    if facts["kept"]:
        effective += f" ({percent(facts['effective'] / facts['kept'])} of those kept)"
    return [
        ("pairs kept", f"{number(facts['kept'], 0)} of {number(facts['pairs'], 0)} ({percent(facts['share'])})"),
        ("kept by rank distance", distances),
        ("reward gap", f"{cut}; quantiles of the gaps: {gaps}"),
        ("effective sample size", effective),
    ]


def _model_lines(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    low, high = model["accuracy_interval"]
    agreement = model["agreement_between_halves"]
    halves = "" if agreement is None else f"; two halves agree at {number(agreement, 2)}"
    return [
        (
            "reward model",
            f"{percent(model['accuracy'], 1)} [{percent(low, 1)}, {percent(high, 1)}] of {model['pairs']} held-out "
            f"pairs right{halves}",
        ),
        ("calibration", _calibration(model["calibration"])),
        ("longer preferred", f"{percent(model['length_bias']['prefers_longer'])} of held-out pairs"),
    ]


def _calibration(measured: Mapping[str, Any]) -> str:
    """Expected calibration error, Brier score and negative log-likelihood (nats a pair), before and after."""
    before, after = measured["before"], measured["after"]
    names = {"ece": "error", "brier": "Brier score", "nll": "log loss"}
    said = [f"{what} {number(before[name], 3)} before, {number(after[name], 3)} after" for name, what in names.items()]
    return "; ".join(said)
