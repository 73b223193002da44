"""Losses against numbers worked out by hand, the reference's goldens, and their own gradients."""

import json
import math
from pathlib import Path

import pytest
import torch

from clha import losses


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


ONE = torch.ones(1, 1, dtype=torch.float64)


def test_goldens_of_the_reference_are_met_to_1e_9(shared: Path):
    cases = json.loads((shared / "golden" / "clha_loss.json").read_text())["cases"]
    assert len(cases) == 7
    for case in cases:
        sums = tensor(case["sum_logps"]).requires_grad_()
        result = losses.clha_loss(
            sums,
            torch.tensor(case["response_lengths"]),
            tensor(case["rewards"]),
            sft_index=torch.tensor(case["sft_index"]),
            margin=case["margin"],
            reward_gap=case["margin"],
            sft_weight=case["sft_weight"],
        )
        result.total.backward()
        for name in ("contrastive", "sft", "total"):
            assert float(getattr(result, name).detach()) == pytest.approx(case[name], abs=1e-9)
        torch.testing.assert_close(sums.grad, tensor(case["grad_sum_logps"]), atol=1e-9, rtol=0)


def test_margin_and_reward_gap_are_two_settings():
    """s = -1, -1.5, -0.8; rewards 5, 3, 1; margin 0.5, gap 2.5: only the pair (0, 2), distance 2, is kept.

    hinge = max(0, -0.8 - -1 + 0.5 * 2) = 1.2; one pair at distance 2, none at distance 1: contrastive = 1.2
    sft = 0.1 * (3 - 1)^2 * 1 * -(-2) = 0.8 (S_0 = -1 * 2 tokens)
    """
    sums, lengths = tensor([[-2.0, -3.0, -2.4]]), torch.tensor([[2, 2, 3]])
    result = losses.clha_loss(sums, lengths, tensor([[5.0, 3.0, 1.0]]), margin=0.5, reward_gap=2.5, sft_weight=0.1)
    assert float(result.contrastive) == pytest.approx(1.2)
    assert float(result.sft) == pytest.approx(0.8)
    assert float(result.total) == pytest.approx(2.0)


def test_a_pair_exactly_at_the_gap_is_noise_and_a_reward_of_zero_switches_sft_off():
    """Rewards 0 and -3 with gap 3: |d| = 3 is not > 3; lambda is 0 because r_sft = 0 is not > 0."""
    result = losses.clha_loss(tensor([[-1.0, -1.0]]), torch.tensor([[1, 1]]), tensor([[0.0, -3.0]]))
    assert float(result.total) == 0.0


def test_a_satisfied_hinge_adds_nothing_but_stays_in_the_denominator():
    """s = -1, -5 | -1, -1.5, margin 1: hinges max(0, -5+1+1) = 0 and max(0, -1.5+1+1) = 0.5, mean 0.25."""
    sums = tensor([[-1.0, -5.0], [-1.0, -1.5]]).requires_grad_()
    result = losses.clha_loss(sums, torch.ones(2, 2), tensor([[9.0, 1.0], [9.0, 1.0]]), margin=1.0, sft_weight=0.0)
    assert float(result.contrastive.detach()) == pytest.approx(0.25)
    result.total.backward()
    torch.testing.assert_close(sums.grad, tensor([[0.0, 0.0], [-0.5, 0.5]]))


def test_weights_replace_the_gap_rule_and_the_lower_triangle_is_the_reverse_hinge():
    """s = -1, -2; margin 1; weights 0.7 above, 0.3 below the diagonal; the pair counts once.

    0.7 * max(0, -2+1+1) + 0.3 * max(0, -1+2+1) = 0.3 * 2 = 0.6. Rewards are not read, not even NaN.
    """
    weights = tensor([[[0.0, 0.7], [0.3, 0.0]]])
    result = losses.clha_loss(
        tensor([[-1.0, -2.0]]),
        torch.ones(1, 2),
        tensor([[math.nan, 7.0]]),
        pair_weights=weights,
        sft_lambda=tensor([0.0]),
        margin=1.0,
    )
    assert float(result.total) == pytest.approx(0.6)
    assert losses.count_pairs(weights).tolist() == [1.0]


def test_a_soft_lambda_and_the_mean_form_of_the_sft_part():
    """S = -6 over 3 tokens, lambda 0.5, weight 0.2, n = 2: sum 0.2 * 1 * 0.5 * 6 = 0.6, mean 0.2 * 0.5 * 2 = 0.2."""
    arguments = (tensor([[-6.0, -9.0]]), torch.tensor([[3, 3]]), tensor([[2.0, 1.0]]))
    for by, want in (("sum", 0.6), ("mean", 0.2)):
        result = losses.clha_loss(*arguments, sft_lambda=tensor([0.5]), sft_weight=0.2, sft_by=by)
        assert float(result.sft) == pytest.approx(want)


def test_ragged_prompts_equal_the_sum_of_their_own_losses_whatever_stands_in_absent_cells():
    """Prompt 1 has three candidates, prompt 2 two. Distance 1: three pairs, distance 2: one; two prompts."""
    full = tensor([[-2.0, -3.0, -1.0], [-4.0, -1.0, math.nan]]).requires_grad_()
    lengths = torch.tensor([[2, 2, 1], [2, 1, 0]])
    rewards = tensor([[9.0, 5.0, 1.0], [4.0, 0.5, math.nan]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    result = losses.clha_loss(full, lengths, rewards, candidate_mask=mask, margin=1.0)
    counts = tensor([3.0, 1.0])
    parts = [
        losses.clha_loss(
            full[b : b + 1, :n],
            lengths[b : b + 1, :n],
            rewards[b : b + 1, :n],
            margin=1.0,
            pair_counts=counts[: n - 1],
            prompt_count=2,
        ).total
        for b, n in ((0, 3), (1, 2))
    ]
    assert float(result.total.detach()) == pytest.approx(float(sum(parts).detach()), abs=1e-12)
    result.total.backward()
    assert torch.isfinite(full.grad).all()
    assert float(full.grad[1, 2]) == 0.0
    # (n - 1)^2 is the prompt's own: 4 * 2 and 1 * 4, weight 0.05, over two prompts
    assert float(result.sft.detach()) == pytest.approx(0.05 * (4 * 2 + 1 * 4) / 2)


def test_one_candidate_alone_costs_nothing():
    result = losses.clha_loss(-ONE, ONE, ONE)
    assert float(result.total) == 0.0


def test_micro_batches_with_the_denominators_of_the_whole_batch_add_up():
    torch.manual_seed(0)
    sums = -torch.rand(6, 4, dtype=torch.float64) * 20
    lengths = torch.randint(1, 9, (6, 4))
    rewards = torch.randn(6, 4, dtype=torch.float64).mul(4).sort(dim=1, descending=True).values
    whole = losses.clha_loss(sums, lengths, rewards)
    gap = torch.triu((rewards[:, :, None] - rewards[:, None]).abs() > 3, 1).double()
    counts = losses.count_pairs(gap)
    parts = [
        losses.clha_loss(sums[i : i + 2], lengths[i : i + 2], rewards[i : i + 2], pair_counts=counts, prompt_count=6)
        for i in (0, 2, 4)
    ]
    assert float(sum(p.total for p in parts)) == pytest.approx(float(whole.total), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rewards": tensor([[1.0, 2.0]])}, "sorted"),
        ({"rewards": tensor([[2.0, math.nan]])}, "NaN"),
        ({"sft_index": torch.tensor([1]), "candidate_mask": torch.tensor([[True, False]])}, "absent"),
        ({"sft_index": torch.tensor([2])}, "sft_index"),
        ({"response_lengths": torch.tensor([[3, 0]])}, "no response tokens"),
        ({"pair_weights": tensor([[[0.0, -1.0], [0.0, 0.0]]])}, ">= 0"),
        ({"pair_weights": tensor([[0.0, 1.0]])}, "pair_weights must be"),
        ({"pair_counts": tensor([1.0, 1.0])}, "pair_counts must have shape"),
        ({"rewards": tensor([[2.0, 1.0, 0.0]])}, "rewards must be"),
    ],
)
def test_what_cannot_be_right_is_refused(change: dict, match: str):
    arguments = {
        "sum_logps": tensor([[-1.0, -2.0]]),
        "response_lengths": torch.tensor([[1, 1]]),
        "rewards": tensor([[2.0, 1.0]]),
    }
    with pytest.raises(ValueError, match=match):
        losses.clha_loss(**(arguments | change))


def test_the_last_micro_batch_may_have_fewer_candidates_than_the_counts_are_long():
    with pytest.raises(ValueError, match="pair_counts"):
        losses.clha_loss(-ONE.expand(1, 2), ONE.expand(1, 2), ONE.expand(1, 2), pair_counts=tensor([1.0, 2.0]))


def test_sft_is_the_mean_over_the_tokens_of_the_chosen_responses():
    """(6 + 2) / (3 + 1) = 2."""
    sums, lengths = tensor([[-6.0, -1.0], [-9.0, -2.0]]), torch.tensor([[3, 1], [9, 1]])
    assert float(losses.sft_loss(sums, lengths, sft_index=torch.tensor([0, 1]))) == pytest.approx(2.0)


def test_dpo_by_hand():
    """h = (-1 - -2, -3 - -2.5) = (1, -0.5), beta 0.2: x = 0.3; -log sigmoid(0.3) = 0.554355; smoothed with e = 0.1:

    0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355; robust: (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8 = 0.516855
    """
    policy, reference = tensor([[-1.0, -3.0]]), tensor([[-2.0, -2.5]])
    assert float(losses.dpo_loss(policy, reference, beta=0.2)) == pytest.approx(0.554355, abs=1e-6)
    smoothed = losses.dpo_smoothed_loss(policy, reference, beta=0.2, label_smoothing=0.1)
    assert float(smoothed) == pytest.approx(0.584355, abs=1e-6)
    robust = losses.dpo_robust_loss(policy, reference, beta=0.2, label_smoothing=0.1)
    assert float(robust) == pytest.approx(0.516855, abs=1e-6)
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.dpo_robust_loss(policy, reference, label_smoothing=0.5)


def test_dpo_over_three_candidates_is_the_weighted_mean_of_its_pairs():
    policy, reference = tensor([[-1.0, -2.0, -4.0]]), tensor([[-1.5, -1.5, -1.5]])
    weights = tensor([[[0, 1, 0.5], [0, 0, 0], [0, 0, 0]]])
    pair = [losses.dpo_loss(policy[:, [k, j]], reference[:, [k, j]]) for k, j in ((0, 1), (0, 2))]
    got = losses.dpo_loss(policy, reference, pair_weights=weights)
    assert float(got) == pytest.approx(float((pair[0] + 0.5 * pair[1]) / 2))


DPO = {
    "dpo": losses.dpo_loss,
    "dpo_smoothed": lambda *a, **k: losses.dpo_smoothed_loss(*a, label_smoothing=0.1, **k),
    "dpo_robust": lambda *a, **k: losses.dpo_robust_loss(*a, label_smoothing=0.1, **k),
}
# x = 0.3 of the pair as ranked, -0.3 turned round: -log sigmoid is 0.554355 and 0.854355. Smoothed, e = 0.1:
# 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355 and 0.9 * 0.854355 + 0.1 * 0.554355 = 0.824355. Robust:
# (0.9 * 0.554355 - 0.1 * 0.854355) / 0.8 = 0.516855 and (0.9 * 0.854355 - 0.1 * 0.554355) / 0.8 = 0.891855.
BOTH_WAYS = {"dpo": (0.554355, 0.854355), "dpo_smoothed": (0.584355, 0.824355), "dpo_robust": (0.516855, 0.891855)}


@pytest.mark.parametrize("name", DPO)
def test_a_weight_below_the_diagonal_is_the_dpo_loss_of_the_pair_turned_round(name: str):
    """Flipped, weight 0.6: 0.6 of the reverse loss; soft, 0.7 and 0.3: 0.7 of one and 0.3 of the other, one pair.

    A flipped pair beside one that is kept: both in the sum, two in the denominator.
    """
    policy, reference = tensor([[-1.0, -3.0]]), tensor([[-2.0, -2.5]])
    straight, reverse = BOTH_WAYS[name]
    for weights, want in (
        ([[0.0, 0.0], [0.6, 0.0]], 0.6 * reverse),
        ([[0.0, 0.7], [0.3, 0.0]], 0.7 * straight + 0.3 * reverse),
        ([[5.0, 1.0], [0.0, 5.0]], straight),  # a response is no pair with itself
    ):
        got = DPO[name](policy, reference, beta=0.2, pair_weights=tensor([weights]))
        assert float(got) == pytest.approx(want, abs=1e-6)
    both = tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.6, 0.0]]])
    got = DPO[name](policy.expand(2, 2), reference.expand(2, 2), beta=0.2, pair_weights=both)
    assert float(got) == pytest.approx((straight + 0.6 * reverse) / 2, abs=1e-6)


@pytest.mark.parametrize("name", DPO)
def test_turning_the_responses_and_their_weights_round_changes_no_dpo_loss(name: str):
    torch.manual_seed(2)
    policy, reference = -torch.rand(3, 4, dtype=torch.float64) * 9, -torch.rand(3, 4, dtype=torch.float64) * 9
    weights = torch.rand(3, 4, 4, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, True, False], [True, True, False, False]])
    one = DPO[name](policy, reference, pair_weights=weights, candidate_mask=mask)
    other = DPO[name](policy.flip(1), reference.flip(1), pair_weights=weights.flip(1, 2), candidate_mask=mask.flip(1))
    assert float(one) == pytest.approx(float(other), abs=1e-12)


def test_rrhf_by_hand():
    """s = -2, -1, -3: pairs (0,1): 1, (0,2): 0, (1,2): 0; NLL of the best = 4 (two tokens). Total 5."""
    result = losses.rrhf_loss(tensor([[-4.0, -1.0, -6.0]]), torch.tensor([[2, 1, 2]]))
    assert float(result.ranking) == pytest.approx(1.0)
    assert float(result.total) == pytest.approx(5.0)


def test_pro_by_hand():
    """s = -1, -2, -1.5; r = 3, 1, 0. t = 1: T = (2, 3), T+ = 3: -log(e^-3 / (e^-3 + e^-4 + e^-4.5));

    t = 2: T = (1), T+ = 1: -log(e^-2 / (e^-2 + e^-1.5)); sft 0.05 * 4 * 2 = 0.4 (S = -2).
    """
    first = math.log(1 + math.exp(-1) + math.exp(-1.5))
    second = math.log(1 + math.exp(0.5))
    result = losses.pro_loss(tensor([[-2.0, -2.0, -3.0]]), torch.tensor([[2, 1, 2]]), tensor([[3.0, 1.0, 0.0]]))
    assert float(result.ranking) == pytest.approx(first + second)
    assert float(result.total) == pytest.approx(first + second + 0.4)


def test_pro_refuses_unsorted_rewards_and_names_nothing_that_it_does_not_have():
    with pytest.raises(ValueError, match="rewards must be sorted, best first") as caught:
        losses.pro_loss(tensor([[-1.0, -2.0]]), torch.ones(1, 2), tensor([[1.0, 2.0]]))
    assert "pair_weights" not in str(caught.value)


def test_the_baselines_ignore_absent_candidates():
    mask = torch.tensor([[True, True, False]])
    sums, lengths, rewards = tensor([[-4.0, -1.0, math.nan]]), torch.tensor([[2, 1, 0]]), tensor([[2.0, 1.0, math.nan]])
    reference = tensor([[-3.0, -2.0, math.nan]])
    for with_mask, without in (
        (
            losses.rrhf_loss(sums, lengths, candidate_mask=mask).total,
            losses.rrhf_loss(sums[:, :2], lengths[:, :2]).total,
        ),
        (
            losses.pro_loss(sums, lengths, rewards, candidate_mask=mask).total,
            losses.pro_loss(sums[:, :2], lengths[:, :2], rewards[:, :2]).total,
        ),
        (
            losses.dpo_loss(sums, reference, candidate_mask=mask),
            losses.dpo_loss(sums[:, :2], reference[:, :2]),
        ),
        (losses.sft_loss(sums, lengths, candidate_mask=mask), losses.sft_loss(sums[:, :2], lengths[:, :2])),
    ):
        assert float(with_mask) == pytest.approx(float(without))


@pytest.mark.parametrize("name", ["clha", "sft", "dpo", "dpo_smoothed", "dpo_robust", "rrhf", "pro"])
def test_gradients_are_those_of_finite_differences(name: str):
    torch.manual_seed(1)
    sums = (-torch.rand(3, 4, dtype=torch.float64) * 20).requires_grad_()
    lengths = torch.randint(2, 9, (3, 4))
    rewards = (torch.randn(3, 4, dtype=torch.float64) * 4).sort(dim=1, descending=True).values
    reference = -torch.rand(3, 4, dtype=torch.float64) * 20
    functions = {
        "clha": lambda s: losses.clha_loss(s, lengths, rewards).total,
        "sft": lambda s: losses.sft_loss(s, lengths),
        "dpo": lambda s: losses.dpo_loss(s, reference),
        "dpo_smoothed": lambda s: losses.dpo_smoothed_loss(s, reference),
        "dpo_robust": lambda s: losses.dpo_robust_loss(s, reference),
        "rrhf": lambda s: losses.rrhf_loss(s, lengths).total,
        "pro": lambda s: losses.pro_loss(s, lengths, rewards).total,
    }
    assert torch.autograd.gradcheck(functions[name], (sums,))
