"""The verdict says better or worse only where the interval leaves zero out, and doubts name what weakens it."""

from typing import Any

import pytest

from clha.evaluation.verdict import digits_for, doubts, p_text, signed, verdict


def metrics(gain: float, low: float, high: float, prompts: int = 96, p: float = 0.01, **changes: Any) -> dict[str, Any]:
    """Metrics of a run without anything else to doubt."""
    side = {"mean": 30.0}
    finish = {"truncation_rate": 0.1}
    return {
        "split": "test",
        "reward": {
            "gain": gain,
            "interval": [low, high],
            "prompts": prompts,
            "p_value": p,
            "gain_in_sd": {"gain": gain / 2, "interval": [low / 2, high / 2]},
        },
        "judge": {"unseen": True, "agreement": 0.7, "agreement_interval": [0.6, 0.8], "held_out_accuracy": None},
        "training_reward": {"gain": 0.5, "interval": [0.3, 0.7]},
        "lengths": {"base": side, "trained": side, "gain": 0.0, "interval": [-1.0, 1.0]},
        "length_adjusted": {"gain": gain, "interval": [low, high], "per_token": 0.0},
        "finish": {"base": finish, "trained": finish},
        "silent": {"base": 0, "trained": 0, "prompts": prompts},
        "repetition": {"base": {"repetition_4": 0.1}, "trained": {"repetition_4": 0.1}},
    } | changes


def test_better_needs_an_interval_above_zero() -> None:
    said = verdict(metrics(0.31, 0.12, 0.5))
    assert said.outcome == "better"
    assert said.sentence == (
        "The trained policy is better: its mean reward is 0.31 higher under a reward model that training never saw "
        "(95% interval +0.12 to +0.50, +0.15 standard deviations, p = 0.010, 96 prompts)."
    )


def test_a_policy_that_falls_silent_is_not_believed() -> None:
    # 3 of 100 prompts lost is above MUCH_SILENCE, 2 are not but are said; the base's own silence is not held against it
    said = verdict(metrics(0.31, 0.12, 0.5, silent={"base": 0, "trained": 3, "prompts": 100}))
    assert said.outcome == "better" and "empty answer to 3 of 100 prompts (the base to 0)" in said.caution
    few = metrics(0.31, 0.12, 0.5, silent={"base": 0, "trained": 2, "prompts": 100})
    assert verdict(few).caution == "" and any("empty answer to 2 of 100 prompts" in d for d in doubts(few))
    same = metrics(0.31, 0.12, 0.5, silent={"base": 5, "trained": 5, "prompts": 100})
    assert verdict(same).caution == "" and not any("empty answer" in d for d in doubts(same))


def test_answers_that_grow_alike_are_doubted() -> None:
    """0.20 is below 0.7 x 0.44 = 0.308, 0.31 is not."""
    for variety, said in ((0.20, True), (0.31, False)):
        sides = {"base": {"distinct_2": 0.44}, "trained": {"distinct_2": variety}}
        found = doubts(metrics(0.6, 0.5, 0.7, repetition=sides))
        assert any("are more alike: 20% of all their bigrams are distinct, 44%" in d for d in found) is said


def test_worse_needs_an_interval_below_zero() -> None:
    said = verdict(metrics(-0.2, -0.35, -0.05))
    assert said.outcome == "worse"
    assert "is 0.20 lower" in said.sentence


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (0.0, 0.3), (-0.3, 0.0)])
def test_an_interval_that_includes_zero_is_said_plainly(low: float, high: float) -> None:
    found = metrics(0.1, low, high, p=0.3)
    assert verdict(found).outcome == "not told apart"
    assert "includes zero" in verdict(found).sentence
    assert any("96 prompts a true gain anywhere from" in d for d in doubts(found))


def test_no_change_at_all_is_not_told_apart() -> None:
    said = verdict(metrics(0.0, 0.0, 0.0, p=1.0))
    assert said.outcome == "not told apart"
    assert "reward is unchanged" in said.sentence


def test_five_prompts_are_too_few_whatever_they_say() -> None:
    said = verdict(metrics(1.0, 0.9, 1.1, prompts=5, p=0.0625))
    assert said.outcome == "not told apart"
    assert said.sentence.startswith("Too few prompts to tell (5; at least 6")


def test_a_judge_that_training_used_is_named_as_such() -> None:
    found = metrics(0.3, 0.1, 0.5)
    found["judge"]["unseen"] = False
    assert "a reward model that training used too" in verdict(found).sentence
    assert doubts(found)[0].startswith("The judge is the reward model that training used")


def test_a_run_without_weakness_keeps_the_doubt_that_all_single_runs_have() -> None:
    (only,) = doubts(metrics(0.31, 0.12, 0.5))
    assert "another seed" in only


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "dev"}, "prompts of the dev split"),
        (
            {"lengths": {"base": {"mean": 20.0}, "trained": {"mean": 30.0}, "gain": 10.0, "interval": [8.0, 12.0]}},
            "50% longer",
        ),
        ({"length_adjusted": {"gain": 0.02, "interval": [-0.1, 0.2], "per_token": 0.1}}, "At equal length"),
        (
            {"finish": {"base": {"truncation_rate": 0.6}, "trained": {"truncation_rate": 0.7}}},
            "70% of the trained policy's answers are cut",
        ),
        (
            {"finish": {"base": {"truncation_rate": 0.1}, "trained": {"truncation_rate": 0.3}}},
            "stops by itself less often",
        ),
        ({"repetition": {"base": {"repetition_4": 0.1}, "trained": {"repetition_4": 0.22}}}, "repeats itself more"),
    ],
)
def test_side_effects_are_doubts(changes: dict[str, Any], said: str) -> None:
    assert any(said in d for d in doubts(metrics(0.31, 0.12, 0.5, **changes)))


def test_a_better_reward_for_text_that_has_fallen_apart_is_not_left_standing_alone() -> None:
    """Repetition from 6% to 40%: the outcome stays what the interval says, the sentence ends with the caution."""
    broken = {"repetition": {"base": {"repetition_4": 0.06}, "trained": {"repetition_4": 0.4}}}
    said = verdict(metrics(0.9, 0.5, 1.2, **broken))
    assert said.outcome == "better"
    assert said.caution.startswith("But it repeats itself far more: 40% of its 4-grams")
    assert said.sentence.endswith(said.caution)
    assert verdict(metrics(0.9, 0.5, 1.2)).caution == ""
    short = {"repetition": {"base": {"repetition_4": None}, "trained": {"repetition_4": None}}}
    assert verdict(metrics(0.9, 0.5, 1.2, **short)).caution == ""
    assert any("repeats itself more" in d for d in doubts(metrics(0.1, -0.1, 0.3, p=0.3, **broken)))


def test_reward_models_that_do_not_agree_and_a_weak_judge_are_doubts() -> None:
    found = metrics(0.31, 0.12, 0.5)
    found["judge"] |= {"agreement": 0.52, "agreement_interval": [0.42, 0.62]}
    found["judge"]["held_out_accuracy"] = {"value": 0.55, "interval": [0.48, 0.62]}
    text = " ".join(doubts(found))
    assert "in 52% of the prompts, hardly more often than chance" in text
    assert "weak: on held-out pairs it is right in 55%" in text


def test_a_training_reward_that_rises_alone_is_a_doubt() -> None:
    assert any("what its reward model likes" in d for d in doubts(metrics(0.0, -0.2, 0.2, p=0.9)))


def test_interval_and_test_that_disagree_are_borderline() -> None:
    assert any("borderline" in d for d in doubts(metrics(0.2, 0.01, 0.4, p=0.06)))


def test_numbers_are_written_with_the_digits_that_the_interval_can_carry() -> None:
    assert digits_for(0.12, 0.5) == 2
    assert digits_for(0.001, 0.011) == 4
    assert digits_for(-3, 5) == 2
    assert signed(-0.001) == "+0.00"
    assert p_text(0.0004) == "p < 0.001"
