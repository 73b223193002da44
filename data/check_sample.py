"""Figures of the sample data: `python data/check_sample.py [folder]`; exit code 1 when one is out of bounds.

What the figures guard against: pairs that can be told apart by length or by single words (a reward model would learn
those instead of quality), and texts that come twice (a held-out prompt would have been seen in training).
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clha.rewards.fitting import assign_folds, fit_head, wilson_interval

MIN_PAIRS, MIN_PROMPTS = 400, 120
LENGTH_ONLY = (0.45, 0.60)
BAG_OF_WORDS = 0.85
PROMPT_SIMILARITY, RESPONSE_SIMILARITY = 0.5, 0.4
FOLDS = 10

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+")


@dataclass(frozen=True)
class Rate:
    """A share of `n` cases with its 95% Wilson interval."""

    share: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.share, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} [{low:.1%}, {high:.1%}] of {self.n}"


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return _WORD.findall(text.lower())


def load(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(pairs, prompts without responses) of a folder with pairs.jsonl and prompts.jsonl."""
    pairs, prompts = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("pairs.jsonl", "prompts.jsonl")
    )
    return pairs, prompts


def length_only(pairs: list[dict[str, Any]], size: Any = lambda text: len(words(text))) -> Rate:
    """How often the longer response is the chosen one; ties count one half."""
    right = [
        (size(p["chosen"]) > size(p["rejected"])) + 0.5 * (size(p["chosen"]) == size(p["rejected"])) for p in pairs
    ]
    return Rate(float(np.mean(right)), len(pairs))


def count_differences(pairs: list[dict[str, Any]], min_pairs: int = 3) -> tuple[np.ndarray, list[str]]:
    """Word counts of chosen minus rejected [pairs, words], for words that occur in at least `min_pairs` pairs."""
    differences = []
    for pair in pairs:
        counts = Counter(words(pair["chosen"]))
        counts.subtract(words(pair["rejected"]))
        differences.append(counts)
    seen = Counter(word for d in differences for word in d)
    vocabulary = sorted(word for word, n in seen.items() if n >= min_pairs)
    return np.array([[d[word] for word in vocabulary] for d in differences], dtype=float), vocabulary


def bag_of_words(pairs: list[dict[str, Any]], strength: float = 0.1, seed: int = 0) -> Rate:
    """Cross-validated accuracy of a Bradley-Terry model on word count differences."""
    x, _ = count_differences(pairs)
    fold = assign_folds(range(len(pairs)), FOLDS, seed)
    right = np.zeros(len(pairs))
    for k in range(FOLDS):
        score = x[fold == k] @ _weights(x[fold != k], strength)
        right[fold == k] = (score > 0) + 0.5 * (score == 0)
    return Rate(float(right.mean()), len(pairs))


def telling_words(pairs: list[dict[str, Any]], top: int = 15, strength: float = 0.1) -> tuple[list[str], list[str]]:
    """The words that weigh most for the chosen and for the rejected response."""
    x, vocabulary = count_differences(pairs)
    weights = _weights(x, strength)
    order = np.argsort(weights)
    return [vocabulary[i] for i in order[::-1][:top]], [vocabulary[i] for i in order[:top]]


def _weights(x: np.ndarray, strength: float) -> np.ndarray:
    """The weight of each word; `strength` is the C of a logistic regression that reads each pair in both directions."""
    return fit_head(x, 1 / (4 * strength * len(x)))


def near_duplicates(texts: list[str], least: float, size: int = 3) -> list[tuple[float, int, int]]:
    """Pairs of texts whose sets of word 3-grams have a Jaccard similarity of at least `least`, the nearest first.

    Exact: every pair with a 3-gram in common is compared.
    """
    grams = [shingles(text, size) for text in texts]
    holders: dict[tuple[str, ...], list[int]] = {}
    for i, own in enumerate(grams):
        for gram in own:
            holders.setdefault(gram, []).append(i)
    shared: Counter[tuple[int, int]] = Counter()
    for where in holders.values():
        shared.update((a, b) for n, a in enumerate(where) for b in where[n + 1 :])
    found = [(n / (len(grams[a]) + len(grams[b]) - n), a, b) for (a, b), n in shared.items()]
    return sorted((f for f in found if f[0] >= least), reverse=True)


def shingles(text: str, size: int = 3) -> set[tuple[str, ...]]:
    """The word n-grams of a text (of the whole text when it is shorter)."""
    w = words(text)
    return {tuple(w[i : i + size]) for i in range(max(1, len(w) - size + 1))}


def prompt_text(row: dict[str, Any]) -> str:
    """All turns of a prompt as one text."""
    return " ".join(m["content"] for m in row["messages"])


def first_user_turn(row: dict[str, Any]) -> str:
    """The turn that decides the split."""
    return str(next(m["content"] for m in row["messages"] if m["role"] == "user"))


def figures(folder: Path) -> dict[str, Any]:
    """All figures of the data card."""
    pairs, prompts = load(folder)
    rows = pairs + prompts
    prompt_texts = [prompt_text(r) for r in rows]
    responses = [p[side] for p in pairs for side in ("chosen", "rejected")]
    chosen, rejected = ([len(words(p[side])) for p in pairs] for side in ("chosen", "rejected"))
    turns = [sum(m["role"] != "system" for m in r["messages"]) for r in rows]
    return {
        "pairs": len(pairs),
        "prompts without responses": len(prompts),
        "subsets": dict(sorted(Counter(r["subset"] for r in rows).items())),
        "multi-turn share": float(np.mean([t > 1 for t in turns])),
        "with a system turn": sum(r["messages"][0]["role"] == "system" for r in rows),
        "mean words, chosen": float(np.mean(chosen)),
        "mean words, rejected": float(np.mean(rejected)),
        "length-only accuracy (words)": length_only(pairs),
        "length-only accuracy (characters)": length_only(pairs, len),
        "bag-of-words accuracy": bag_of_words(pairs),
        "first user turns that come twice": len(rows) - len({first_user_turn(r).lower().strip() for r in rows}),
        "nearest prompts": near_duplicates(prompt_texts, 0.25)[:5],
        "nearest responses": near_duplicates(responses, 0.2)[:5],
    }


def broken(found: dict[str, Any]) -> list[str]:
    """The figures that are out of bounds, one line each."""
    low, high = LENGTH_ONLY
    nearest = {kind: max((s for s, _, _ in found[f"nearest {kind}"]), default=0.0) for kind in ("prompts", "responses")}
    rules = {
        f"fewer than {MIN_PAIRS} pairs": found["pairs"] < MIN_PAIRS,
        f"fewer than {MIN_PROMPTS} prompts": found["prompts without responses"] < MIN_PROMPTS,
        "length gives the answer away (words)": not low <= found["length-only accuracy (words)"].share <= high,
        "length gives the answer away (characters)": not low
        <= found["length-only accuracy (characters)"].share
        <= high,
        "single words give the answer away": found["bag-of-words accuracy"].share > BAG_OF_WORDS,
        "a first user turn comes twice": found["first user turns that come twice"] > 0,
        "two prompts are nearly the same": nearest["prompts"] > PROMPT_SIMILARITY,
        "two responses are nearly the same": nearest["responses"] > RESPONSE_SIMILARITY,
    }
    return [line for line, bad in rules.items() if bad]


def main(folder: Path) -> int:
    """Print all figures; returns 1 when one is out of bounds."""
    found = figures(folder)
    pairs, prompts = load(folder)
    for name, value in found.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    for side, telling in zip(("chosen", "rejected"), telling_words(pairs), strict=True):
        print(f"words that weigh most for {side}: {', '.join(telling)}")
    rows = pairs + prompts
    for score, a, b in found["nearest prompts"]:
        print(f"{score:.2f}  {prompt_text(rows[a])!r}\n      {prompt_text(rows[b])!r}")
    for line in broken(found):
        print(f"out of bounds: {line}")
    return 1 if broken(found) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "sample"))
