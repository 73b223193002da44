"""The noise study, on the tiny model: every cell once, taken up where it stopped."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from reward_cases import preference_rows, write_prompts

from clha import chat
from clha.errors import UserError
from clha.progress import Progress
from clha.settings import NoiseStudy
from clha.settings_rewards import RewardFit
from clha.stages import study_cells
from clha.stages import work as stages_work
from clha.stages.noise_study import run_study
from clha.stages.study_cells import StudyInput, count_cells
from clha.store import Home
from clha.study import policies
from clha.study.policies import ranked_pair

KINDS = ("features", "noise_detection", "noise_training")
FIT = RewardFit(encoder="tiny", layer=1, folds=3, max_tokens=128)
SMALL = NoiseStudy(
    rates=[0.3],
    seeds=[0, 1],
    weights=["none", "calibrated", "oracle"],
    reward_pairs=60,
    train_pairs=24,
    test_pairs=24,
    max_prompt_tokens=64,
    max_tokens=48,
)


def given(home: Home, model: Path) -> StudyInput:
    rows = [r for i, split in enumerate(("reward_train", "train", "test")) for r in preference_rows(60, split, seed=i)]
    unique = {r["prompt_id"]: r for r in rows}
    return StudyInput(write_prompts(home, list(unique.values())), model, model, {"policy": "p", "encoder": "e"})


def cells(home: Home) -> dict[str, int]:
    return {kind: len(list((home.artifacts / kind).glob("*/manifest.json"))) for kind in KINDS}


def test_a_study_reports_every_cell_and_a_second_one_makes_none(
    home: Home, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = given(home, tiny_model)
    report = tmp_path / "study.json"
    results = run_study(home, SMALL, FIT, work, Progress(), report)
    assert [(d["seed"], d["arm"]) for d in results["detection"]] == [
        (s, a) for s in (0, 1) for a in ("clean", "flipped")
    ]
    assert all(d["auroc"] > 0.6 for d in results["detection"] if d["arm"] == "clean")
    assert [t["weights"] for t in results["training"]] == ["before training", "none", "calibrated", "oracle"]
    assert "gain" in results["training"][2]
    assert cells(home) == {"features": 1, "noise_detection": 4, "noise_training": 7}
    assert json.loads(report.read_text()) == json.loads(json.dumps(results))
    assert "| 30% | oracle |" in report.with_suffix(".md").read_text()

    def no_more(*_: Any) -> None:
        raise AssertionError("a cell was made again")

    monkeypatch.setattr(stages_work, "ArtifactWriter", no_more)
    assert run_study(home, SMALL, FIT, work, Progress()) == results


def test_a_stopped_study_keeps_its_finished_cells(home: Home, tiny_model: Path) -> None:
    work = given(home, tiny_model)
    detection_only = SMALL.model_copy(update={"weights": []})

    class Stopped(BaseException):
        pass

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "log" and "seed 1" in event["message"]:
            raise Stopped

    with pytest.raises(Stopped):
        run_study(home, detection_only, FIT, work, Progress(stop))
    before = cells(home)
    assert 0 < before["noise_detection"] < 4
    run_study(home, detection_only, FIT, work, Progress())
    assert cells(home) == {"features": 1, "noise_detection": 4, "noise_training": 0}


def test_another_rate_adds_its_cells_only(home: Home, tiny_model: Path) -> None:
    work = given(home, tiny_model)
    one = SMALL.model_copy(update={"weights": [], "seeds": [0]})
    run_study(home, one, FIT, work, Progress())
    run_study(home, one.model_copy(update={"rates": [0.3, 0.1]}), FIT, work, Progress())
    assert cells(home) == {"features": 1, "noise_detection": 4, "noise_training": 0}


def test_too_few_pairs_are_a_clear_error(home: Home, tiny_model: Path) -> None:
    prompts = write_prompts(home, preference_rows(30))
    work = StudyInput(prompts, tiny_model, tiny_model, {})
    with pytest.raises(UserError, match="0 pairs in split train, at least 20 needed"):
        run_study(home, SMALL, FIT, work, Progress())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reward_pairs": 2},
            r"pairs of 2 dialogues to fit reward models on, at least 3 needed \(fit_reward.*reward_pairs",
        ),
        ({"test_pairs": 1}, "all held-out pairs are of one dialogue; raise noise_study.test_pairs"),
    ],
)
def test_too_few_dialogues_are_refused_before_anything_is_computed(
    home: Home, tiny_model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_study(home, SMALL.model_copy(update=changes), FIT, given(home, tiny_model), Progress())
    assert "\n" not in str(caught.value) and cells(home) == dict.fromkeys(KINDS, 0)


def test_the_fewest_dialogues_that_are_not_refused_are_enough(home: Home, tiny_model: Path) -> None:
    """As many as folds; and without gains to compare one held-out dialogue will do."""
    few = SMALL.model_copy(update={"reward_pairs": 3, "train_pairs": 4, "test_pairs": 2, "seeds": [0]})
    results = run_study(home, few, FIT, given(home, tiny_model), Progress())
    assert all(t["gain"]["pairs"] == 2 for t in results["training"] if "gain" in t)
    alone = few.model_copy(update={"test_pairs": 1, "weights": ["none"]})
    assert len(run_study(home, alone, FIT, given(home, tiny_model), Progress())["training"]) == 2


def test_held_out_pairs_that_leave_one_dialogue_as_tokens_are_refused_before_training(
    home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []

    def first_only(chat: Any, messages: Any, *rest: Any, **named: Any) -> Any:
        rows.append(messages)
        return ranked_pair(chat, messages, *rest, **named) if len(rows) == 1 else None

    monkeypatch.setattr(policies, "ranked_pair", first_only)
    with pytest.raises(UserError, match="all held-out pairs are of one dialogue"):
        run_study(home, SMALL.model_copy(update={"seeds": [0]}), FIT, given(home, tiny_model), Progress())
    assert cells(home)["noise_training"] == 1, "the policy as it was"


def test_cells_are_counted_before_they_are_made() -> None:
    """Features, 2 seeds of 2 arms and 3 policies, the policy as it was; more rates add detections where untrained."""
    assert count_cells(SMALL) == 1 + 2 * (2 + 3) + 1
    two = SMALL.model_copy(update={"rates": [0.3, 0.1], "train_rates": [0.3]})
    assert count_cells(two) == 1 + 2 * (4 + 3) + 1
    assert count_cells(SMALL.model_copy(update={"weights": []})) == 1 + 2 * 2
    assert count_cells(SMALL.model_copy(update={"arms": ["flipped"]})) == 1 + 2 * (2 + 3) + 1, "clean is trained with"


def test_policies_are_trained_at_the_chosen_rates_only(home: Home, tiny_model: Path) -> None:
    work = given(home, tiny_model)
    some = SMALL.model_copy(update={"rates": [0.3, 0.1], "train_rates": [0.3], "seeds": [0], "weights": ["none"]})
    results = run_study(home, some, FIT, work, Progress())
    assert {d["rate"] for d in results["detection"]} == {0.3, 0.1}
    assert [(t["rate"], t["weights"]) for t in results["training"]] == [(0.3, "before training"), (0.3, "none")]


def test_without_flips_there_is_nothing_to_find_but_gains_to_lose(home: Home, tiny_model: Path, tmp_path: Path) -> None:
    clean = SMALL.model_copy(update={"rates": [0.0], "seeds": [0], "weights": ["none", "calibrated"]})
    report = tmp_path / "study.json"
    results = run_study(home, clean, FIT, given(home, tiny_model), Progress(), report)
    assert [d["auroc"] for d in results["detection"]] == [None, None]
    assert all(d["flip_rate_interval"][0] <= d["flip_rate"] < 0.5 for d in results["detection"])
    assert [t["weights"] for t in results["training"]] == ["before training", "none", "calibrated"]
    low, high = results["training"][2]["gain"]["interval"]
    assert low <= results["training"][2]["gain"]["gain"] <= high
    assert "NaN" not in report.read_text() and "| 0% | 0 | clean |" in report.with_suffix(".md").read_text()


def test_the_policy_speaks_by_the_template_of_the_settings(home: Home, tiny_model: Path, tmp_path: Path) -> None:
    """A base model has no template of its own: the study takes policy.chat_template, which is in the keys."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    work = given(home, tiny_model)
    few = SMALL.model_copy(update={"seeds": [0], "arms": ["clean"], "weights": ["none"]})
    with pytest.raises(UserError, match="has no chat template"):
        run_study(home, few, FIT, replace(work, policy=base), Progress())
    run_study(home, few, FIT, replace(work, policy=base, chat_template="hh"), Progress())
    assert cells(home)["noise_training"] == 2
    run_study(home, few, FIT, work, Progress())
    assert cells(home) == {"features": 1, "noise_detection": 1, "noise_training": 4}


def test_keys_hold_what_changes_a_cell(home: Home, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = replace(given(home, tiny_model), chat_template="hh")
    few = SMALL.model_copy(update={"seeds": [0], "arms": ["clean"], "weights": ["none"]})
    run_study(home, few, FIT, work, Progress())
    manifests = [json.loads(p.read_text()) for p in home.artifacts.glob("noise_*/*/manifest.json")]
    assert all(set(m["key_parts"]["versions"]) == {"torch", "transformers", "numpy", "scipy"} for m in manifests)
    source = chat.shipped_template("hh")
    monkeypatch.setattr(chat, "shipped_template", lambda name: source + "{# mended #}")
    run_study(home, few, FIT, work, Progress())
    assert cells(home) == {"features": 1, "noise_detection": 1, "noise_training": 4}
    monkeypatch.setattr(study_cells, "package_version", lambda name: "another")
    run_study(home, few, FIT, work, Progress())
    assert cells(home) == {"features": 1, "noise_detection": 2, "noise_training": 6}


@pytest.mark.parametrize("name", ["rates", "seeds", "arms", "weights", "train_rates"])
def test_what_is_named_twice_is_no_second_sample(name: str) -> None:
    first = {"rates": 0.3, "seeds": 1, "arms": "clean", "weights": "none", "train_rates": 0.4}[name]
    with pytest.raises(ValidationError, match=f"names {first} more than once"):
        NoiseStudy.model_validate({name: [first, first]})


def test_a_study_of_nothing_is_refused_but_for_detection_only() -> None:
    for name in ("rates", "seeds", "arms"):
        with pytest.raises(ValidationError, match="at least 1"):
            NoiseStudy.model_validate({name: []})
    assert NoiseStudy(weights=[]).trained_rates == []
    assert NoiseStudy(train_rates=None).trained_rates == [0.4]


def test_a_rate_to_train_on_must_be_one_of_the_rates() -> None:
    with pytest.raises(ValueError, match="train_rates has 0.2, which rates has not"):
        NoiseStudy(rates=[0.4], train_rates=[0.2])
