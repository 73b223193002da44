"""Figures draw what they are given, also at the edges: one prompt, no spread, names of strangers."""

import re
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from matplotlib.image import imread

from clha.reporting import evaluation_figures, noise_figures, reward_figures, training_figures
from clha.reporting.drawing import PALETTE, Drawn
from clha.reporting.length_bias import length_note

RNG = np.random.default_rng(0)


def draw_all(count: int) -> dict[str, Drawn | None]:
    """Every figure, over `count` prompts."""
    x, y = RNG.normal(size=(2, count))
    length = RNG.integers(1, 60, count).astype(float)
    steps = np.arange(1.0, count + 1)
    curves = {"step": steps, "loss": y, "rewards/accuracies": x, "rewards/chosen": x, "rewards/rejected": y}
    bins = {"predicted": [0.2, 0.8], "observed": [0.3, 0.7], "weight": [3.0, 3.0]}
    return {
        "gain": evaluation_figures.gain_overview([evaluation_figures.Bar("judge", 0.3, 0.1, 0.5, True)] * 3),
        "differences": evaluation_figures.reward_differences(y, float(y.mean()), (-0.1, 0.2), 0.0),
        "lengths": evaluation_figures.lengths(length, length + 1, (0.1, 0.2)),
        "length": reward_figures.reward_against_length({"base": (length, y)}, "length", "t", "reward"),
        "judges": evaluation_figures.judges_agree(x, y, 0.5, 0.1),
        "candidates": noise_figures.candidate_rewards({"generated": x, "dataset_chosen": y}, y, 0.1),
        "pairs": noise_figures.pair_gaps(np.abs(x), np.abs(x) > 0.5, 0.5),
        "weights": noise_figures.pair_weights(np.abs(x) + 0.1, 0.8 * count),
        "distance": noise_figures.kept_by_distance({1: 0.5, 2: 1.0}),
        "curves": training_figures.learning_curves(curves),
        "better": training_figures.better_and_worse(curves),
        "label-reliability": reward_figures.label_reliability(
            {"reliability": bins, "reliability_before": bins, "pairs": count}
        ),
        "reliability": reward_figures.reliability({"a": {"reliability": bins, "reliability_before": bins}}),
    }


def test_what_was_measured_on_dev_is_drawn_under_the_name_that_training_gives_it() -> None:
    steps = np.arange(1.0, 9)
    metrics = {"step": steps, "loss": steps, "eval_loss": np.where(steps == 8, 3.0, np.nan)}
    drawn = training_figures.learning_curves(metrics)
    assert drawn is not None and "dev split" in drawn.caption


@pytest.mark.parametrize("count", [1, 2, 300])
def test_every_figure_can_be_drawn_for_any_number_of_prompts(count: int) -> None:
    for name, drawn in draw_all(count).items():
        assert drawn is not None, name
        pixels = imread(BytesIO(drawn.png))
        assert pixels.shape[0] > 200 and pixels.std() > 0.02, name
        assert drawn.svg.startswith("<svg viewBox=") and drawn.svg.rstrip().endswith("</svg>"), name
        assert drawn.alt and drawn.caption, name


@pytest.mark.parametrize(
    "draw",
    [
        lambda same: evaluation_figures.reward_differences(same * 0, 0.0, (0.0, 0.0), 0.0),
        lambda same: evaluation_figures.lengths(same, same, (0.0, 1.0)),
        lambda same: reward_figures.reward_against_length({"base": (same, same)}, "length", "t", "reward"),
        lambda same: noise_figures.pair_gaps(same * 0, same > 5, 0.4),
        lambda same: noise_figures.candidate_rewards({"generated": same}, same, None),
    ],
)
def test_values_that_do_not_vary_are_drawn_too(draw: Callable[[np.ndarray], Drawn]) -> None:
    assert draw(np.ones(9)).png


def test_colours_follow_the_page_and_ids_are_a_figures_own() -> None:
    drawn = [d for d in draw_all(20).values() if d]
    ids: set[str] = set()
    for d in drawn:
        assert not [c for c in PALETTE.values() if c in d.svg]
        assert "var(--muted)" in d.svg
        assert "DejaVu" not in d.svg and "<metadata" not in d.svg and "<style" not in d.svg
        own = set(re.findall(r'\bid="([^"]+)"', d.svg))
        assert not own & ids
        ids |= own
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', d.svg))
        assert used <= own


def test_names_of_strangers_are_text_in_a_figure() -> None:
    bar = evaluation_figures.Bar("<script>x</script> $\\frac{1}{2}$ & é", 0.3, 0.1, 0.5, True)
    svg = evaluation_figures.gain_overview([bar]).svg
    assert "<script" not in svg
    assert "&lt;script&gt;x&lt;/script&gt; $\\frac{1}{2}$ &amp; é" in svg


def test_the_cut_is_an_edge_of_the_bars_so_that_none_is_both_kept_and_dropped() -> None:
    gap = np.abs(RNG.normal(size=400))
    edges = np.array(noise_figures._edges_with(gap, 0.37))
    assert 0.37 in edges
    assert edges[0] <= gap.min() and edges[-1] >= gap.max()
    assert np.all(np.diff(edges) > 0)


def test_a_length_biased_reward_model_is_named_as_such() -> None:
    assert "length-biased, towards longer" in length_note(0.45)
    assert "leans towards shorter" in length_note(-0.2)
    assert "hardly follows length" in length_note(0.05)
    assert "do not vary" in length_note(None)


def test_no_known_metrics_give_no_curves() -> None:
    assert training_figures.learning_curves({"step": np.arange(3.0), "other": np.ones(3)}) is None
    assert training_figures.better_and_worse({"step": np.arange(3.0)}) is None


def test_a_learning_curve_says_what_its_last_step_brought() -> None:
    """60% to 70%, interval [0.66, 0.74]: 10 points are beyond 4; 69% to 70% is not."""
    last = {"pairs": 80, "accuracy": 0.70, "interval": [0.66, 0.74]}
    steep = reward_figures.more_pairs_note([{"pairs": 40, "accuracy": 0.60, "interval": [0.5, 0.7]}, last])
    assert steep == "+10.0 points from 40 to 80 pairs, more pairs should help."
    flat = reward_figures.more_pairs_note([{"pairs": 40, "accuracy": 0.69, "interval": [0.6, 0.7]}, last])
    assert flat.endswith("no clear gain from more pairs.")
    assert reward_figures.more_pairs_note([last]) == "too few pairs for a curve."
