"""Examples to read: answers side by side, and the pairs of candidates that are trusted least and most."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from clha.digests import unit_of
from clha.reporting.tables import PairedScores, Pairs, rows_by_id
from clha.reporting.text import literal
from clha.store import Artifact

# Longer texts are cut, and the rest is counted: a report is for reading.
TEXT_LIMIT = 1500
SUMMARY_LIMIT = 160

Example = dict[str, Any]


def answer_examples(
    scores: PairedScores, nodes: Mapping[str, Artifact], seed: str, count: int = 5
) -> dict[str, list[Example]]:
    """The `count` best gains and worst losses, and twice as many others at random (by the digest of `seed` and id)."""
    order = np.argsort(-scores.gain, kind="stable")
    best = [i for i in order[:count] if scores.gain[i] > 0]
    worst = [i for i in order[::-1][:count] if scores.gain[i] < 0]
    taken = {*best, *worst}
    rest = [i for i in range(len(order)) if i not in taken]
    drawn = sorted(rest, key=lambda i: unit_of("example", seed, scores.prompt_ids[i]))[: 2 * count]
    wanted = [scores.prompt_ids[i] for i in (*best, *worst, *drawn)]
    prompts = _by_id(rows_by_id(nodes["prepare"], "prompts", ["prompt_id", "subset", "messages"], wanted))
    columns = ["prompt_id", "text", "finish_reason"]
    answers = {p: _by_id(rows_by_id(nodes[f"answers.{p}"], "answers", columns, wanted)) for p in ("base", "trained")}

    def example(i: int) -> Example:
        pid = scores.prompt_ids[i]
        sides = []
        for policy, rewards, lengths in (
            ("base", scores.base, scores.base_length),
            ("trained", scores.trained, scores.trained_length),
        ):
            row = answers[policy][pid]
            sides.append(
                {
                    "label": policy,
                    "text": shown(row["text"]),
                    "reward": float(rewards[i]),
                    "tokens": int(lengths[i]),
                    "ending": ENDINGS.get(row["finish_reason"], row["finish_reason"]),
                }
            )
        return {**conversation(prompts[pid]), "gain": float(scores.gain[i]), "sides": sides}

    groups: tuple[tuple[str, Sequence[int]], ...] = (("best", best), ("worst", worst), ("random", drawn))
    return {name: [example(i) for i in rows] for name, rows in groups}


ENDINGS = {"eos": "ended by itself", "stop_string": "ended at a stop string", "length": "cut at the token limit"}

ORIGINS = {
    "generated": "generated",
    "dataset_chosen": "chosen in the data",
    "dataset_rejected": "rejected in the data",
    "external": "external",
}


def pair_examples(
    pairs: Pairs, nodes: Mapping[str, Artifact], *, known_scale: bool, count: int = 10, text_limit: int = TEXT_LIMIT
) -> dict[str, list[Example]]:
    """The `count` pairs whose order is least and most likely to be right: {"least", "most"}, one of each prompt.

    Pairs that the order says nothing about are left out. The probability is shown where the rewards' scale is known.
    Responses are cut after `text_limit` characters.
    """
    said = np.flatnonzero(np.isfinite(pairs.log_odds))
    order = said[np.argsort(pairs.log_odds[said], kind="stable")]
    chosen = {"least": _one_each(pairs.prompt, order, count), "most": _one_each(pairs.prompt, order[::-1], count)}
    wanted = {pairs.prompt_ids[pairs.prompt[m]] for rows in chosen.values() for m in rows}
    prompts = _by_id(rows_by_id(nodes["prepare"], "prompts", ["prompt_id", "subset", "messages"], wanted))
    columns = ["prompt_id", "candidate_id", "origin", "text"]
    texts = {
        (r["prompt_id"], r["candidate_id"]): r for r in rows_by_id(nodes["generate"], "candidates", columns, wanted)
    }
    rewards = {
        (r["prompt_id"], r["candidate_id"]): r["reward"]
        for r in rows_by_id(nodes["score"], "rewards", ["prompt_id", "candidate_id", "reward"], wanted)
    }

    def example(m: int) -> Example:
        pid = pairs.prompt_ids[pairs.prompt[m]]
        sides = []
        for label, candidate in (("ranked first", int(pairs.first[m])), ("ranked second", int(pairs.second[m]))):
            row = texts[pid, candidate]
            sides.append(
                {
                    "label": label,
                    "text": shown(row["text"], text_limit),
                    "reward": rewards[pid, candidate],
                    "origin": ORIGINS.get(row["origin"], row["origin"]),
                }
            )
        return {
            **conversation(prompts[pid]),
            "gap": float(pairs.gap[m]),
            "weight": float(pairs.weight[m]),
            "turned": bool(pairs.turned[m]),
            "probability": float(expit(pairs.log_odds[m])) if known_scale else None,
            "sides": sides,
        }

    return {name: [example(m) for m in rows] for name, rows in chosen.items()}


def conversation(prompt: Mapping[str, Any]) -> Example:
    """A prompt for showing: its turns, and its last turn as one line."""
    messages = prompt["messages"]
    last = " ".join(messages[-1]["content"].split())
    return {
        "summary": literal(last, SUMMARY_LIMIT) or "(empty)",
        "subset": literal(prompt["subset"] or "", 60),
        "turns": [{"role": literal(m["role"], 40), "text": shown(m["content"])} for m in messages],
    }


def shown(text: str, limit: int = TEXT_LIMIT) -> str:
    """A text for showing; an empty one says so."""
    return literal(text, limit) if text.strip() else "(empty)"


def _one_each(prompts: NDArray[np.int64], order: Iterable[int], count: int) -> list[int]:
    seen: set[int] = set()
    out: list[int] = []
    for m in order:
        if len(out) == count:
            break
        if int(prompts[m]) not in seen:
            seen.add(int(prompts[m]))
            out.append(int(m))
    return out


def _by_id(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["prompt_id"]: r for r in rows}
