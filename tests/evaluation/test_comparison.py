"""The figures that compare two policies, on three prompts that can be worked out by hand."""

from typing import Any

import numpy as np
import pytest

from clha.evaluation.comparison import Sampling, Scored, compare


def scored(rewards: list[float], seen: list[float], texts: list[str]) -> Scored:
    ids = [[5] * (3 + i) for i in range(len(texts))]
    return Scored(np.array(rewards), np.array(seen), texts, ids, ["eos"] * len(texts))


def compared(**changes: Any) -> dict[str, Any]:
    base = scored([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], ["a b c d", "x", "y"])
    trained = scored([1.0, 1.0, 1.0], [1.0, 0.0, 2.0], ["a b c d", "x", "z"])
    arguments: dict[str, Any] = {
        "split": "test",
        "subsets": ["u", "v", "u"],
        "references": ["a b c d", None, None],
        "judge": {"kind": "fitted", "unseen": True, "held_out_accuracy": None},
        "silent": {"base": 0, "trained": 1, "prompts": 4},
        "sampling": Sampling(200, 0, 0.0),
    }
    return compare(base, trained, **(arguments | changes))


def test_a_comparison_holds_the_figures_of_the_contract() -> None:
    """Differences 1, 0, -1: gain 0; signs of the training reward 1, 0, 2: the judges agree on one of two prompts."""
    found = compared()
    assert found["reward"]["base"] == pytest.approx(1.0)
    assert found["reward"]["trained"] == pytest.approx(1.0)
    assert found["reward"]["gain"] == pytest.approx(0.0)
    assert found["reward"]["prompts"] == 3
    assert found["reward"]["resamples"] == 200
    assert (found["wins"], found["ties"], found["losses"]) == (1, 1, 1)
    assert found["judge"]["kind"] == "fitted"
    assert found["judge"]["agreement"] == pytest.approx(0.5)
    assert (found["judge"]["compared"], found["judge"]["undecided"]) == (2, 1)


def test_the_sigmoid_reward_is_the_mean_of_sigmoids() -> None:
    """sigmoid(0) = 0.5, sigmoid(1) = 0.73106, sigmoid(2) = 0.88080."""
    found = compared()["reward"]["sigmoid"]
    assert found["base"] == pytest.approx((0.5 + 0.731059 + 0.880797) / 3, abs=1e-6)
    assert found["trained"] == pytest.approx(0.731059, abs=1e-6)


def test_each_subset_has_the_figures_of_its_own_prompts() -> None:
    """Subset u: prompts 0 and 2, gain (1 - 1) / 2; subset v: prompt 1."""
    subsets = compared()["subsets"]
    assert subsets["u"]["reward"]["prompts"] == 2
    assert (subsets["v"]["wins"], subsets["v"]["ties"], subsets["v"]["losses"]) == (0, 1, 0)
    assert subsets["v"]["reward"]["interval"] == [0.0, 0.0]
    assert set(subsets["u"]) >= {"reward", "wins", "ties", "losses", "judge"}


def test_overlap_is_measured_where_there_is_a_reference_and_says_on_how_many() -> None:
    overlap = compared()["overlap"]
    assert overlap["prompts"] == 1
    assert overlap["bleu_char_legacy"] == {"base": pytest.approx(100.0), "trained": pytest.approx(100.0)}
    assert overlap["sacrebleu"]["base"] == pytest.approx(100.0)
    without = compared(references=[None] * 3)["overlap"]
    assert without == {"prompts": 0, "bleu_char_legacy": None, "sacrebleu": None}


def test_prompts_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        compared(subsets=["u"])
