"""What the sections work out beyond the tables that they show."""

from pathlib import Path
from typing import Any

from fabricated import Fabricated, settings
from reward_cases import node_settings

from clha.reporting import overview, sections
from clha.reporting.noise_facts import scale_is_known
from clha.store import Artifact


def known(**rescore: Any) -> bool:
    """Whether probabilities are promised for artifacts that were made with these settings."""
    tree = settings(rescore=rescore)
    return scale_is_known({n: Artifact(Path("."), {"settings": node_settings(tree, n)}) for n in ("score", "weigh")})


def test_probabilities_are_promised_where_the_scale_of_rewards_is_known() -> None:
    raw = {"reward": {"type": "sequence_classification", "model": "somewhere"}}
    assert known(sft_threshold="fitted")
    assert not known(**raw)
    head = {"type": "encoder_head", "model": "a/head", "encoder": "an/encoder"}
    own = {"type": "fitted"}
    assert known(reward={"type": "ensemble", "members": [own, head]})
    for odd in ({"type": "fitted", "scale": 2.0}, raw["reward"]):
        assert not known(reward={"type": "ensemble", "members": [own, odd]})
    for calibration in ("labels", 0.5):
        noise = {"method": "calibrated", "calibration": calibration}
        assert known(noise=noise, **raw)


def test_tiles_hold_what_there_is(made: Fabricated) -> None:
    noise = sections.noise_section(made.nodes)
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
