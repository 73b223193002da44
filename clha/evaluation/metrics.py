"""What can be read off answers without a reward model: lengths, endings, repetition, overlap with a reference."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def length_summary(lengths: Sequence[int] | NDArray[np.float64]) -> dict[str, float]:
    """Mean, median and 90th percentile of answer lengths, in tokens."""
    values = np.asarray(lengths, dtype=np.float64)
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "p90": float(np.quantile(values, 0.9)),
    }


def finish_rates(reasons: Sequence[str]) -> dict[str, float]:
    """How answers ended, as shares: by the end token, cut by a stop string, cut at the token limit."""
    count = len(reasons)
    return {
        "eos_rate": sum(r == "eos" for r in reasons) / count,
        "stop_string_rate": sum(r == "stop_string" for r in reasons) / count,
        "truncation_rate": sum(r == "length" for r in reasons) / count,
    }


def distinct_n(answers: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of all answers (Li et al. 2016, arXiv 1510.03055); None without n-grams.

    It falls with the total length: compare it at like lengths only.
    """
    grams = [tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition_rate(answers: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Mean share of an answer's n-grams that occurred before in it (Welleck et al. 2019, arXiv 1908.04319, "rep-n").

    Answers of fewer than n tokens do not count; None when all are so short.
    """
    shares = []
    for a in answers:
        grams = [tuple(a[i : i + n]) for i in range(len(a) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return float(np.mean(shares)) if shares else None


def bleu_char_legacy(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Mean of NLTK's sentence BLEU applied to raw strings, times 100: a BLEU of characters, not of words.

    The figure that the published tables of PRO and CLHA call BLEU; kept under a name of its own.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns for every answer without a common 4-gram
        scores = [float(sentence_bleu([r], h)) for h, r in zip(hypotheses, references, strict=True)]
    return 100 * float(np.mean(scores))


def sacrebleu_score(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus BLEU of words with sacrebleu (Post 2018, arXiv 1804.08771), 0 to 100, and its signature."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(effective_order=False)
    score = bleu.corpus_score(list(hypotheses), [list(references)])
    return {"score": float(score.score), "signature": str(bleu.get_signature())}
