"""CLHA and its baselines as pure functions of summed response log-probabilities.

Shapes: B prompts, n candidates each, in rank order (best first). `sum_logps` are in nats. Every loss is a sum over
prompts, or pairs, divided by a count; the count may be given, so that the micro-batches of one optimizer batch add
up to the same loss however it is cut.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ClhaLoss(NamedTuple):
    """The two parts of the CLHA loss and their sum, scalars."""

    contrastive: Tensor
    sft: Tensor
    total: Tensor


class RankedLoss(NamedTuple):
    """A ranking part, a likelihood part and their sum, scalars."""

    ranking: Tensor
    sft: Tensor
    total: Tensor


def clha_loss(
    sum_logps: Tensor,
    response_lengths: Tensor,
    rewards: Tensor,
    *,
    sft_index: Tensor | None = None,
    pair_weights: Tensor | None = None,
    sft_lambda: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    pair_counts: Tensor | None = None,
    prompt_count: Tensor | float | None = None,
    margin: float = 3.0,
    reward_gap: float = 3.0,
    sft_weight: float = 0.05,
    sft_by: str = "sum",
) -> ClhaLoss:
    """The loss of "A Simple yet Effective Contrastive Learning Framework for Human Alignment" (arXiv 2403.16649).

    With s = sum_logps / response_lengths, the hinge of the pair (k, j), k ranked i places before j, is
    max(0, s_j - s_k + margin * i). Each rank distance i contributes sum(w * hinge) / (its pairs with w > 0), nothing
    where there are none. Entries below the diagonal weigh the reverse hinge, max(0, s_k - s_j + margin * i), of the
    same pair (soft labels); a pair counts once. The other part is
    sft_weight * mean over prompts of (n_b - 1)^2 * sft_lambda * -sum_logps[sft_index].

    Args:
        sum_logps: [B, n], summed log-probability of each response, in nats.
        response_lengths: [B, n], number of response tokens.
        rewards: [B, n], best first. Read only where `pair_weights` or `sft_lambda` is not given.
        sft_index: [B], position of the response that the SFT part raises; default: the best-ranked one.
        pair_weights: [B, n, n], in rank order; default: 1 above the diagonal where |reward difference| > reward_gap.
        sft_lambda: [B], in [0, 1]; default: 1 where the reward of the SFT response is above 0.
        candidate_mask: [B, n], False where a prompt has no such candidate. What stands in those cells is not read,
            and rank distances count present candidates only.
        pair_counts: [n - 1], pairs with w > 0 at each rank distance of the whole optimizer batch; default: of this one.
        prompt_count: prompts of the whole optimizer batch; default: B.
        margin: of the hinge, in nats per token and rank.
        reward_gap: reward differences up to this are noise.
        sft_weight: weight of the SFT part.
        sft_by: "sum" (the paper's) takes the summed, "mean" the mean log-probability in the SFT part.

    Raises:
        ValueError: unsorted or NaN rewards where they are needed, an sft_index on an absent candidate, a present
            candidate without tokens, negative weights, or shapes that do not fit.
    """
    _check_shapes(sum_logps, response_lengths, rewards, pair_weights, candidate_mask)
    batch, n = sum_logps.shape
    mask = _mask(candidate_mask, sum_logps)
    sums, scores = _scores(sum_logps, response_lengths, mask)
    index = _sft_index(sft_index, mask)
    if pair_weights is None or sft_lambda is None:
        rewards = torch.where(mask, rewards, torch.zeros_like(rewards))
        if pair_weights is None:
            _check_sorted(rewards, mask)
            gap = (rewards[:, :, None] - rewards[:, None, :]).abs() > reward_gap
            pair_weights = torch.triu(gap, diagonal=1).to(sums.dtype)
        if sft_lambda is None:
            sft_lambda = rewards.gather(1, index[:, None])[:, 0] > 0
    present = mask[:, :, None] & mask[:, None, :]
    weights = torch.where(present, pair_weights, torch.zeros_like(pair_weights)).to(sums.dtype)
    if not bool((weights >= 0).all()):
        raise ValueError("pair_weights must be numbers >= 0")

    rank = mask.long().cumsum(1) - 1
    distance = (rank[:, None, :] - rank[:, :, None]).abs()  # [B, n, n]
    # Entry (k, j) asks for k above j, whichever side of the diagonal it is on.
    hinge = F.relu(scores[:, None, :] - scores[:, :, None] + margin * distance)
    weighted = weights * hinge
    per_distance = sums.new_zeros(n).index_add(0, distance.reshape(-1), weighted.reshape(-1))[1:]
    counts = count_pairs(weights, mask) if pair_counts is None else pair_counts
    if counts.shape != (n - 1,):
        raise ValueError(f"pair_counts must have shape [{n - 1}], not {list(counts.shape)}")
    contrastive = (per_distance / counts.to(sums).clamp(min=1)).sum()

    target = sums if sft_by == "sum" else scores
    nll = -target.gather(1, index[:, None])[:, 0]
    scale = (mask.sum(1) - 1).clamp(min=0).to(sums) ** 2
    prompts = batch if prompt_count is None else prompt_count
    sft = sft_weight * (scale * sft_lambda.to(sums) * nll).sum() / prompts
    return ClhaLoss(contrastive, sft, contrastive + sft)


def count_pairs(pair_weights: Tensor, candidate_mask: Tensor | None = None) -> Tensor:
    """Pairs with a weight above zero at each rank distance 1..n-1: [B, n, n] -> [n - 1]; a pair counts once."""
    n = pair_weights.shape[1]
    mask = _mask(candidate_mask, pair_weights[:, :, 0])
    kept = (pair_weights > 0) & mask[:, :, None] & mask[:, None, :]
    kept = torch.triu(kept | kept.transpose(1, 2), diagonal=1)
    rank = mask.long().cumsum(1) - 1
    distance = (rank[:, None, :] - rank[:, :, None]).abs()
    counts = torch.zeros(n, dtype=pair_weights.dtype, device=pair_weights.device)
    return counts.index_add(0, distance[kept], torch.ones_like(distance[kept], dtype=counts.dtype))[1:]


def sft_loss(
    sum_logps: Tensor,
    response_lengths: Tensor,
    *,
    sft_index: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    token_count: Tensor | float | None = None,
) -> Tensor:
    """Supervised fine-tuning on one response per prompt: its negative log-likelihood per token.

    Args:
        sum_logps, response_lengths, sft_index, candidate_mask: as in `clha_loss`.
        token_count: tokens of those responses in the whole optimizer batch; default: in this one.
    """
    mask = _mask(candidate_mask, sum_logps)
    sums, _ = _scores(sum_logps, response_lengths, mask)
    index = _sft_index(sft_index, mask)[:, None]
    tokens = response_lengths.gather(1, index).sum() if token_count is None else token_count
    return -sums.gather(1, index).sum() / tokens


def dpo_loss(
    sum_logps: Tensor,
    reference_sum_logps: Tensor,
    *,
    beta: float = 0.1,
    pair_weights: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    pair_count: Tensor | float | None = None,
) -> Tensor:
    """Direct Preference Optimization (arXiv 2305.18290, equation 7) over the pairs of each prompt.

    The loss of k above j is -log sigmoid(x), x = beta * (h_k - h_j), h = sum_logps - reference_sum_logps; of the
    reverse, j above k, that of -x.

    Args:
        sum_logps, reference_sum_logps: [B, n], nats; the reference is frozen.
        beta: strength of the tie to the reference.
        pair_weights: [B, n, n]; entry (k, j) weighs k above j, so a flipped pair, and the other half of a soft label,
            stand below the diagonal; a pair counts once. Default: 1 above the diagonal.
        candidate_mask: [B, n].
        pair_count: pairs with w > 0 in either direction of the whole optimizer batch; default: of this one.
    """
    logits, weights = _dpo_logits(sum_logps, reference_sum_logps, beta, pair_weights, candidate_mask)
    return _pair_mean(-F.logsigmoid(logits), weights, pair_count)


def dpo_smoothed_loss(
    sum_logps: Tensor,
    reference_sum_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    pair_weights: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    pair_count: Tensor | float | None = None,
) -> Tensor:
    """Conservative DPO (E. Mitchell, "A note on DPO with noisy preferences", 2023, equation 3).

    (1 - e) * -log sigmoid(x) + e * -log sigmoid(-x), with e the share of flipped labels and x as in `dpo_loss`,
    whose arguments it shares.
    """
    logits, weights = _dpo_logits(sum_logps, reference_sum_logps, beta, pair_weights, candidate_mask)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return _pair_mean(losses, weights, pair_count)


def dpo_robust_loss(
    sum_logps: Tensor,
    reference_sum_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
    pair_weights: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    pair_count: Tensor | float | None = None,
) -> Tensor:
    """Provably robust DPO (arXiv 2403.00409, equation 12): unbiased when a share e of the labels is flipped.

    ((1 - e) * -log sigmoid(x) + e * log sigmoid(-x)) / (1 - 2 e), x as in `dpo_loss`, whose arguments it shares.

    Raises:
        ValueError: e is not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    logits, weights = _dpo_logits(sum_logps, reference_sum_logps, beta, pair_weights, candidate_mask)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return _pair_mean(losses / (1 - 2 * label_smoothing), weights, pair_count)


def rrhf_loss(
    sum_logps: Tensor,
    response_lengths: Tensor,
    *,
    candidate_mask: Tensor | None = None,
    prompt_count: Tensor | float | None = None,
) -> RankedLoss:
    """RRHF (arXiv 2304.05302, equations 2 to 4).

    Per prompt: the sum over all pairs of max(0, s_worse - s_better), s = sum_logps / response_lengths, plus the
    negative log-likelihood (token sum) of the best response. Mean over `prompt_count` prompts.
    """
    mask = _mask(candidate_mask, sum_logps)
    sums, scores = _scores(sum_logps, response_lengths, mask)
    pairs = torch.triu(mask[:, :, None] & mask[:, None, :], diagonal=1)
    prompts = sum_logps.shape[0] if prompt_count is None else prompt_count
    ranking = (F.relu(scores[:, None, :] - scores[:, :, None]) * pairs).sum() / prompts
    sft = -sums.gather(1, _sft_index(None, mask)[:, None]).sum() / prompts
    return RankedLoss(ranking, sft, ranking + sft)


def pro_loss(
    sum_logps: Tensor,
    response_lengths: Tensor,
    rewards: Tensor,
    *,
    candidate_mask: Tensor | None = None,
    prompt_count: Tensor | float | None = None,
    sft_weight: float = 0.05,
) -> RankedLoss:
    """Preference Ranking Optimization (arXiv 2306.17492, equations 6 to 8).

    Per prompt, for t = 1..n-1: -log(e^{s_t T+} / (e^{s_t T+} + sum over j > t of e^{s_j T_j})) with
    s = sum_logps / response_lengths, T_j = r_t - r_j and T+ the largest T_j; plus
    sft_weight * (n_b - 1)^2 times the negative log-likelihood (token sum) of the best. Mean over `prompt_count`
    prompts.

    Raises:
        ValueError: unsorted or NaN rewards.
    """
    batch, n = sum_logps.shape
    mask = _mask(candidate_mask, sum_logps)
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards)).to(sum_logps.dtype)
    _check_sorted(rewards, mask)
    sums, scores = _scores(sum_logps, response_lengths, mask)
    ranking = sums.new_zeros(())
    for t in range(n - 1):
        later = mask[:, t + 1 :] & mask[:, t, None]
        gaps = torch.where(later, rewards[:, t, None] - rewards[:, t + 1 :], torch.zeros_like(rewards[:, t + 1 :]))
        own = scores[:, t] * gaps.amax(1)
        others = (scores[:, t + 1 :] * gaps).masked_fill(~later, -torch.inf)
        terms = torch.logsumexp(torch.cat([own[:, None], others], dim=1), dim=1) - own
        ranking = ranking + torch.where(later.any(1), terms, torch.zeros_like(terms)).sum()
    prompts = batch if prompt_count is None else prompt_count
    scale = (mask.sum(1) - 1).clamp(min=0).to(sums) ** 2
    best = sums.gather(1, _sft_index(None, mask)[:, None])[:, 0]
    ranking, sft = ranking / prompts, -sft_weight * (scale * best).sum() / prompts
    return RankedLoss(ranking, sft, ranking + sft)


def _dpo_logits(
    sum_logps: Tensor, reference: Tensor, beta: float, pair_weights: Tensor | None, candidate_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """beta * (h_k - h_j) and the weights of k above j, both [B, n, n]."""
    if reference.shape != sum_logps.shape:
        raise ValueError(f"reference_sum_logps has shape {list(reference.shape)}, not {list(sum_logps.shape)}")
    mask = _mask(candidate_mask, sum_logps)
    log_ratios = torch.where(mask, sum_logps - reference, torch.zeros_like(sum_logps))
    weights = sum_logps.new_ones(*mask.shape, mask.shape[1]).triu(1) if pair_weights is None else pair_weights
    present = mask[:, :, None] & mask[:, None, :] & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    weights = torch.where(present, weights, torch.zeros_like(weights)).to(sum_logps.dtype)
    return beta * (log_ratios[:, :, None] - log_ratios[:, None, :]), weights


def _pair_mean(losses: Tensor, weights: Tensor, pair_count: Tensor | float | None) -> Tensor:
    count = count_pairs(weights).sum().clamp(min=1) if pair_count is None else pair_count
    return (weights * losses).sum() / count


def _mask(candidate_mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if candidate_mask is None else candidate_mask.bool()


def _scores(sum_logps: Tensor, response_lengths: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and means with zeros in absent cells; `where` before the division keeps NaN out of the gradients."""
    if bool((mask & ~(response_lengths > 0)).any()):
        raise ValueError("a present candidate has no response tokens")
    sums = torch.where(mask, sum_logps, torch.zeros_like(sum_logps))
    lengths = torch.where(mask, response_lengths, torch.ones_like(response_lengths))
    return sums, sums / lengths.to(sums.dtype)


def _sft_index(sft_index: Tensor | None, mask: Tensor) -> Tensor:
    if sft_index is None:
        index = mask.long().argmax(1)
    else:
        index = sft_index.long()
        if index.shape != mask.shape[:1] or bool(((index < 0) | (index >= mask.shape[1])).any()):
            raise ValueError(f"sft_index must be [{mask.shape[0]}] with values in 0..{mask.shape[1] - 1}")
    if not bool(mask.gather(1, index[:, None]).all()):
        raise ValueError("sft_index points at an absent candidate")
    return index


def _check_sorted(rewards: Tensor, mask: Tensor) -> None:
    """Present rewards must not rise along a row; an absent cell takes the value before it."""
    if bool(torch.isnan(rewards).any()):
        raise ValueError("rewards hold NaN")
    lowest = torch.where(mask, rewards, torch.full_like(rewards, torch.inf)).cummin(1).values
    if bool((mask & (rewards > lowest)).any()):
        raise ValueError("rewards must be sorted, best first")


def _check_shapes(
    sum_logps: Tensor,
    response_lengths: Tensor,
    rewards: Tensor,
    pair_weights: Tensor | None,
    candidate_mask: Tensor | None,
) -> None:
    if sum_logps.dim() != 2:
        raise ValueError(f"sum_logps must be [B, n], not {list(sum_logps.shape)}")
    batch, n = sum_logps.shape
    named = {"response_lengths": response_lengths, "rewards": rewards, "candidate_mask": candidate_mask}
    for name, value in named.items():
        if value is not None and value.shape != sum_logps.shape:
            raise ValueError(f"{name} must be [{batch}, {n}], not {list(value.shape)}")
    if pair_weights is not None and pair_weights.shape != (batch, n, n):
        raise ValueError(f"pair_weights must be [{batch}, {n}, {n}], not {list(pair_weights.shape)}")
