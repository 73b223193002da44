"""What is read off answers: lengths, endings, repetition, BLEU, each against a case worked by hand."""

import pytest

from clha.evaluation import metrics


def test_lengths_are_summarised() -> None:
    """1, 2, 3, 10: the 90th percentile lies 0.7 of the way from 3 to 10."""
    assert metrics.length_summary([1, 2, 3, 10]) == pytest.approx({"mean": 4.0, "median": 2.5, "p90": 7.9})


def test_endings_are_shares_of_all_answers() -> None:
    assert metrics.finish_rates(["eos", "eos", "length", "stop_string"]) == {
        "eos_rate": 0.5,
        "stop_string_rate": 0.25,
        "truncation_rate": 0.25,
    }


def test_distinct_n_counts_over_all_answers() -> None:
    """Bigrams 12, 21, 12 and 12: two of four are distinct."""
    assert metrics.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 0.5
    assert metrics.distinct_n([[1], []], 2) is None


def test_repetition_is_a_mean_over_answers_that_are_long_enough() -> None:
    """1 1 1 1 1 1 has three 4-grams, two of them seen before; 1 2 3 4 has one; 1 2 3 has none and does not count."""
    assert metrics.repetition_rate([[1] * 6, [1, 2, 3, 4], [1, 2, 3]]) == pytest.approx((2 / 3 + 0) / 2)
    assert metrics.repetition_rate([[1, 2, 3]]) is None


def test_legacy_bleu_is_one_of_characters() -> None:
    """abcde against abcdf: 4/5 characters, 3/4 pairs, 2/3 triples, 1/2 fours; the fourth root of 0.2."""
    assert metrics.bleu_char_legacy(["abcde"], ["abcdf"]) == pytest.approx(100 * 0.2**0.25)


def test_legacy_bleu_is_a_mean_of_sentences_and_an_empty_answer_counts_as_zero() -> None:
    assert metrics.bleu_char_legacy(["same text", ""], ["same text", "other"]) == pytest.approx(50.0)


def test_legacy_bleu_punishes_short_answers() -> None:
    """abcd against abcdefgh: all n-grams match; the brevity penalty is exp(1 - 8/4)."""
    assert metrics.bleu_char_legacy(["abcd"], ["abcdefgh"]) == pytest.approx(100 * 0.36787944)


def test_sacrebleu_is_one_of_words_and_says_how_it_was_made() -> None:
    """the cat sat on the mat, of 6 words, against the same and one word more: exp(1 - 7/6)."""
    found = metrics.sacrebleu_score(["the cat sat on the mat"], ["the cat sat on the mat today"])
    assert found["score"] == pytest.approx(100 * 0.84648172)
    assert "tok:13a" in found["signature"]
