"""From a micro-batch and its log-probabilities to a loss: which pure function, with which denominators."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clha import losses
from clha.training.batches import MicroBatch, RankedPrompt

LOSSES = ("clha", "sft", "dpo", "dpo_smoothed", "dpo_robust", "rrhf", "pro")
REFERENCE_LOSSES = ("dpo", "dpo_smoothed", "dpo_robust")


@dataclass(frozen=True)
class Denominators:
    """What the terms of a loss are divided by, counted over an optimizer batch."""

    pair_counts: Tensor  # [n_max - 1] kept pairs at each rank distance
    prompts: float
    sft_tokens: float  # tokens of the responses at sft_index
    all_pairs: float  # pairs, kept or not

    def tensor(self) -> Tensor:
        """[n_max + 2] float64, for sums over processes."""
        return torch.cat([self.pair_counts.double(), torch.tensor([self.prompts, self.sft_tokens, self.all_pairs])])

    @staticmethod
    def from_tensor(values: Tensor) -> "Denominators":
        *_, prompts, tokens, pairs = values.tolist()
        return Denominators(values[:-3], prompts, tokens, pairs)

    @property
    def pairs(self) -> float:
        """Kept pairs at all distances."""
        return float(self.pair_counts.sum())


def count(prompts: Iterable[RankedPrompt], max_candidates: int) -> Denominators:
    """The denominators of some prompts; `max_candidates` sets the length, equal in all processes."""
    pair_counts = torch.zeros(max(max_candidates - 1, 0), dtype=torch.float64)
    number = tokens = all_pairs = 0
    for prompt in prompts:
        n = len(prompt)
        weights = torch.from_numpy(prompt.pair_weights.copy())[None]
        pair_counts[: n - 1] += losses.count_pairs(weights)
        number += 1
        tokens += len(prompt.responses[prompt.sft_index])
        all_pairs += n * (n - 1) // 2
    return Denominators(pair_counts, float(number), float(tokens), float(all_pairs))


def objective(
    sum_logps: Tensor,
    batch: MicroBatch,
    over: Denominators,
    *,
    loss: str,
    margin: float,
    sft_weight: float,
    sft_by: str,
    beta: float,
    label_smoothing: float,
) -> dict[str, Tensor]:
    """The part of the loss that this micro-batch adds: {"total", ...} with the parts that the loss has.

    Args:
        sum_logps: [B, n] summed log-probabilities of the responses.
        batch: the micro-batch they come from, on the same device.
        over: the denominators of the optimizer batch.
        loss, ...: see `ClhaConfig`.
    """
    mask, lengths = batch.candidate_mask, batch.response_lengths
    if loss == "clha":
        parts = losses.clha_loss(
            sum_logps,
            lengths,
            batch.rewards,
            sft_index=batch.sft_index,
            pair_weights=batch.pair_weights,
            sft_lambda=batch.sft_lambda,
            candidate_mask=mask,
            pair_counts=over.pair_counts[: sum_logps.shape[1] - 1].to(sum_logps),
            prompt_count=max(over.prompts, 1.0),
            margin=margin,
            sft_weight=sft_weight,
            sft_by=sft_by,
        )
        return parts._asdict()
    if loss == "sft":
        index = batch.sft_index
        total = losses.sft_loss(
            sum_logps, lengths, sft_index=index, candidate_mask=mask, token_count=max(over.sft_tokens, 1.0)
        )
        return {"total": total}
    if loss in REFERENCE_LOSSES:
        if batch.reference_logps is None:
            raise ValueError(f"{loss} needs the reference's log-probabilities of every response")
        reference = batch.reference_logps.to(sum_logps)
        shared: dict[str, Any] = {
            "beta": beta,
            "pair_weights": batch.pair_weights,
            "candidate_mask": mask,
            "pair_count": max(over.pairs, 1.0),
        }
        if loss == "dpo":
            return {"total": losses.dpo_loss(sum_logps, reference, **shared)}
        function = losses.dpo_smoothed_loss if loss == "dpo_smoothed" else losses.dpo_robust_loss
        return {"total": function(sum_logps, reference, label_smoothing=label_smoothing, **shared)}
    prompts = max(over.prompts, 1.0)
    if loss == "rrhf":
        return losses.rrhf_loss(sum_logps, lengths, candidate_mask=mask, prompt_count=prompts)._asdict()
    return losses.pro_loss(
        sum_logps, lengths, batch.rewards, candidate_mask=mask, prompt_count=prompts, sft_weight=sft_weight
    )._asdict()
