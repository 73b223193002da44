"""What the sections work out beyond the tables that they show."""

from pathlib import Path
from typing import Any

from fabricated import Fabricated, settings

from clha.reporting import overview, sections
from clha.runs import Run
from clha.store import Artifact


def run_with(**rescore: Any) -> Run:
    return Run("r", "demo", settings(rescore=rescore).model_dump(mode="json"))


def test_probabilities_are_promised_where_the_scale_of_rewards_is_known() -> None:
    raw = {"reward": {"type": "sequence_classification", "model": "somewhere"}}
    assert sections.scale_is_known(run_with(sft_threshold="fitted"))
    assert not sections.scale_is_known(run_with(**raw))
    head = {"type": "encoder_head", "model": "a/head", "encoder": "an/encoder"}
    own = {"type": "fitted"}
    assert sections.scale_is_known(run_with(reward={"type": "ensemble", "members": [own, head]}))
    for odd in ({"type": "fitted", "scale": 2.0}, raw["reward"]):
        assert not sections.scale_is_known(run_with(reward={"type": "ensemble", "members": [own, odd]}))
    for calibration in ("labels", 0.5):
        noise = {"method": "calibrated", "calibration": calibration}
        assert sections.scale_is_known(run_with(noise=noise, **raw))


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
