"""What the sections work out beyond the tables that they show."""

from pathlib import Path
from typing import Any

import pytest
from fabricated import Fabricated, settings

from clha.reporting import overview, sections
from clha.runs import Run
from clha.store import Artifact


def trust(facts: dict[str, Any], **rescore: Any) -> Any:
    tree = settings(rescore={"sft_threshold": "fitted"} | rescore).model_dump(mode="json")
    weigh = Artifact(Path("."), {"key": "0", "files": [], **facts})
    return sections.pair_trust({"weigh": weigh}, Run("r", "demo", tree))


def test_a_gap_in_log_odds_is_a_probability() -> None:
    """Factor 2, gap 0.5: sigmoid(1) = 0.7311."""
    assert trust({"calibration_factors": [2.0]})(0.5) == pytest.approx(0.7311, abs=1e-4)


def test_a_labels_flip_rate_enters_where_labels_order_the_pairs() -> None:
    """p = sigmoid(1) = 0.7311, e = 0.2: 0.7311 * 0.8 / (0.7311 * 0.8 + 0.2689 * 0.2) = 0.9158."""
    facts = {"calibration_factors": [1.0], "flip_rate": {"used": 0.2}}
    assert trust(facts, rank_by="label")(1.0) == pytest.approx(0.9158, abs=1e-4)
    assert trust(facts, rank_by="reward")(1.0) == pytest.approx(0.7311, abs=1e-4)


def test_rewards_of_an_unknown_scale_and_of_several_models_promise_no_probability() -> None:
    raw = {"type": "sequence_classification", "model": "somewhere"}
    assert trust({"calibration_factors": [1.0]}, reward=raw, sft_threshold=0.0) is None
    assert trust({"calibration_factors": [1.0, 2.0]}) is None
    assert trust({}) is None


def test_tiles_hold_what_there_is(made: Fabricated) -> None:
    noise = sections.noise_section(made.nodes, made.run)
    assert [t["label"] for t in overview.tiles(None, noise, None)] == ["Pairs kept"]
    labels = [t["label"] for t in overview.tiles(sections.result_section(made.nodes, made.run), noise, None)]
    assert labels[0] == "Gain in reward"
    assert "Reward models agree" in labels


def test_a_run_that_lost_many_rows_is_doubted(made: Fabricated) -> None:
    poor = Artifact(Path("."), {"key": "0", "files": [], "rows_in": 100, "rows_out": 90, "rows_quarantined": 10})
    (said,) = overview.chain_doubts({"share": 0.5}, None, {"generate": poor})
    assert said == "generate put 10% of its rows into quarantine: the rest may not stand for all."
    (few,) = overview.chain_doubts({"share": 0.1}, None, {})
    assert few.startswith("Only 10% of the pairs passed the noise rule")


def test_training_whose_contrastive_loss_did_not_fall_is_doubted(made: Fabricated) -> None:
    assert overview.chain_doubts(None, sections.training_section(made.nodes), {}) == []
    (said,) = overview.chain_doubts(None, {"contrastive": (2.0, 2.75)}, {})
    assert said.startswith(
        "The contrastive loss did not fall (2.00 in the first quarter of training, 2.75 in the last)"
    )
    assert overview.chain_doubts(None, {"contrastive": None}, {}) == []
