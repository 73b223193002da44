"""What is said about noise: the figures of a whole run, and those of small tables worked by hand."""

import copy
import json
from dataclasses import replace

import pyarrow as pa
import pytest
from fabricated import Fabricated

from clha.errors import UserError
from clha.reporting.noise_facts import _members_agree, fitted_model, noise_lines, scale_is_known
from clha.runs import Run
from clha.schema import REWARDS
from clha.stages.report import noise_of_run


def test_the_figures_of_a_run_fit_together(made: Fabricated) -> None:
    facts = noise_of_run(made.home, made.run)
    json.dumps(facts)
    assert facts["pairs"] == facts["prompts"] * 6 and facts["candidates"] == facts["prompts"] * 4
    assert 0 < facts["kept"] < facts["pairs"] and facts["share"] == facts["kept"] / facts["pairs"]
    assert facts["effective"] == pytest.approx(facts["kept"]), "weights of 0 and 1 only"
    assert list(facts["kept_by_distance"]) == [1, 2, 3]
    gaps = list(facts["gaps"].values())
    assert gaps == sorted(gaps) and facts["cut"] == 0.4
    assert facts["reward_model"]["agreement_between_halves"] == 0.41
    assert 0 <= facts["judge"]["agreement"] <= 1


def test_the_table_names_every_figure_in_words(made: Fabricated) -> None:
    lines = dict(noise_lines(noise_of_run(made.home, made.run)))
    assert lines["rule"] == "reference, ranked by reward"
    assert "pairs within 0.40 are noise" in lines["reward gap"]
    assert "100% of those kept" in lines["effective sample size"]
    assert "two halves agree at 0.41" in lines["reward model"]
    assert lines["length"].startswith("Rank correlation of reward and length")
    assert lines["longer preferred"] == "56% of held-out pairs"
    fit = json.loads((made.nodes["fit_reward.train"].folder / "fit.json").read_text())
    before, after = (fit["calibration"][when]["nll"] for when in ("before", "after"))
    assert f"log loss {before:.3f} before, {after:.3f} after" in lines["calibration"]
    assert {"calibration", "judge agrees", "SFT part", "kept by rank distance"} <= lines.keys()


def test_method_and_order_are_those_of_the_weights_that_are_shown(made: Fabricated) -> None:
    """Settings that changed after weighing speak of weights that are still to come."""
    settings = copy.deepcopy(made.run.settings)
    settings["rescore"] |= {"rank_by": "label", "reward": {"type": "sequence_classification", "model": "/elsewhere"}}
    settings["rescore"]["sft_threshold"] = 0.0
    settings["rescore"]["noise"] |= {"method": "calibrated", "flip_rate": 0.2}
    changed = Run("demo", "demo", settings, made.run.nodes)
    assert noise_of_run(made.home, changed) == {**noise_of_run(made.home, made.run), "reward_model": None}
    lines = dict(noise_lines(noise_of_run(made.home, changed)))
    assert lines["rule"] == "reference, ranked by reward" and lines["pairs kept"].endswith("%)")
    assert scale_is_known(made.nodes), "the fitted model's rewards, which another one is to replace"


def test_a_reward_model_that_was_fitted_since_is_not_that_of_the_rewards(made: Fabricated) -> None:
    score = made.nodes["score"]
    used = {"inputs": {"fit_reward.train": "that of another fit"}}
    other = replace(score, manifest=score.manifest | {"key_parts": used})
    assert fitted_model(made.nodes) == made.nodes["fit_reward.train"]
    assert fitted_model({**made.nodes, "score": other}) is None


def test_flip_rate_labels_members_and_flags_have_lines_where_there_are_any(made: Fabricated) -> None:
    facts = noise_of_run(made.home, made.run)
    facts |= {"flip_rate": {"estimate": 0.25, "interval": [0.1, 0.4], "used": 0.25}, "members_agree": 0.5}
    facts["calibration"] = {
        "pairs": 1200,
        "before": {"ece": 0.2, "brier": 0.3, "nll": 0.9},
        "after": {"ece": 0.01, "brier": 0.2, "nll": 0.6},
    }
    facts |= {"labels": {"judged": 40, "doubted": 6, "p_right": 0.8}, "flags": [("truncated", 3)]}
    lines = dict(noise_lines(facts))
    assert lines["calibration on labels"] == (
        "error 0.200 before, 0.010 after; Brier score 0.300 before, 0.200 after; log loss 0.900 before, 0.600 after; "
        "1,200 labels, flips allowed for after"
    )
    assert lines["flipped labels"] == "25.0% [10%, 40%]; used: 25.0%"
    assert lines["labels"] == "40 judged, 6 doubted, mean p(label right) 0.80"
    assert lines["members agree"] == "correlation within prompts 0.50" and lines["flag truncated"] == "3 prompts"


def test_agreement_of_members_is_within_prompts() -> None:
    """Within p: (-1, 1) and (-2, 2); within q: (1, -1) and (-1, 1). Products 2+2-1-1 = 2; squares 4, 10."""

    def table(members: list[list[float]]) -> pa.Table:
        rows = [
            {"prompt_id": "pq"[i // 2], "candidate_id": i % 2, "reward": 0.0, "member_rewards": m, "truncated": False}
            for i, m in enumerate(members)
        ]
        return pa.Table.from_pylist(rows, schema=REWARDS)

    found = _members_agree(table([[9.0, 0.0], [11.0, 4.0], [1.0, 5.0], [-1.0, 7.0]]))
    assert found == pytest.approx(2 / (4 * 10) ** 0.5)
    assert _members_agree(table([[1.0], [2.0], [3.0], [5.0]])) is None
    assert _members_agree(table([[1.0, 3.0], [2.0, 3.0], [3.0, 4.0], [5.0, 4.0]])) is None, "one never varies"


def test_a_run_that_has_not_rescored_is_told_how(made: Fabricated) -> None:
    nodes = {name: key for name, key in made.run.nodes.items() if name != "weigh"}
    with pytest.raises(UserError, match="run demo has no finished weigh"):
        noise_of_run(made.home, Run("demo", "demo", made.run.settings, nodes))
