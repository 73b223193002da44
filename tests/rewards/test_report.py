"""What is said of a reward model: the figures of TRL's RewardTrainer and those of the model that is used."""

import math

import numpy as np
import pytest

from clha.rewards.report import fit_pairs, judgement
from clha.settings_rewards import RewardFit


def test_the_figures_of_trls_reward_trainer_worked_by_hand() -> None:
    """Rewards (1, 0) weigh 1, (0, 2) weigh 1/2: margins 1 and -2, 1 of 1.5 right, mean margin (1 - 1) / 1.5.

    Loss: (log(1 + e^-1) + log(1 + e^2) / 2) / 1.5 = 1.376726 / 1.5.
    """
    rewards, weights = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([1.0, 0.5])
    margins = rewards[:, 0] - rewards[:, 1]
    found = judgement(rewards / 4, rewards, margins, 4.0, weights, ["a", "b"], np.array([[3, 2], [5, 9]]))
    assert found["metrics"] == pytest.approx(
        {
            "eval_loss": 1.376726 / 1.5,
            "eval_accuracy": 2 / 3,
            "eval_margin": 0.0,
            "eval_min_reward": 0.0,
            "eval_mean_reward": 0.75,
            "eval_max_reward": 2.0,
        },
        abs=1e-6,
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    quarter = (math.log1p(math.exp(-0.25)) + math.log1p(math.exp(0.5)) / 2) / 1.5
    assert found["calibration"]["before"]["nll"] == pytest.approx(quarter)
    assert found["calibration"]["after"]["nll"] == pytest.approx(1.376726 / 1.5, abs=1e-6)


def test_with_several_members_every_figure_is_of_their_mean() -> None:
    """The loss under TRL's name and the likelihood after calibration are of the same rewards: those that are used."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(160, 8))
    features[::2, 0] += 1.0  # the chosen ones
    pairs = np.arange(160).reshape(-1, 2)
    given = {
        "weights": np.ones(80),
        "groups": [f"g{i}" for i in range(80)],
        "lengths": draw.integers(5, 90, 160),
        "config": {},
    }
    reports, heads = {}, {}
    for members in (1, 5):
        fit = RewardFit(encoder="e", members=members, l2=0.01, folds=4)
        heads[members], reports[members] = fit_pairs(features, pairs, fit=fit, **given)  # type: ignore[arg-type]
    one, five = reports[1], reports[5]
    assert five["calibration"]["after"]["nll"] == pytest.approx(five["metrics"]["eval_loss"], abs=1e-9)
    assert five["accuracy"] == five["metrics"]["eval_accuracy"] > 0.6
    assert five["members"] == {"count": 5}
    assert five["calibration"]["factor"] == pytest.approx(np.mean(heads[5].config["calibration"]["factor"]))
    assert five["calibration"]["after"] != one["calibration"]["after"]
    assert five["sft_threshold"] != one["sft_threshold"]
    assert five["l2_path"] == one["l2_path"] and five["learning_curve"] == one["learning_curve"]
