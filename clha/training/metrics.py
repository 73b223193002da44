"""What is measured while training, as sums that add up over micro-batches and processes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clha.training.batches import MicroBatch

_SUMS = (
    "pairs",
    "chosen",
    "rejected",
    "right",
    "chosen_logps",
    "rejected_logps",
    "weights",
    "squared_weights",
    "all_pairs",
    "contrastive",
    "sft",
    "total",
    "tokens",
    "flops",
    "prompts",
)
_LOSSES_IN_PARTS = ("clha", "rrhf", "pro")  # a contrastive (or ranking) part and an SFT part


class Sums:
    """Sums of what the metrics of `loss` are made of; float64."""

    def __init__(self, loss: str) -> None:
        self.values = torch.zeros(len(_SUMS), dtype=torch.float64)
        # By its name: a process that got no prompt must write the same columns as the others.
        self._has_parts = loss in _LOSSES_IN_PARTS

    def add(self, **sums: float) -> None:
        for name, value in sums.items():
            self.values[_SUMS.index(name)] += value

    def add_batch(self, sum_logps: Tensor, batch: MicroBatch, parts: dict[str, Tensor]) -> None:
        """Add a micro-batch: the kept pairs' scores (the better one is "chosen"), and the parts of its loss."""
        sums = sum_logps.detach().double().cpu()
        lengths, mask = batch.response_lengths.cpu(), batch.candidate_mask.cpu()
        scores = sums / lengths.clamp(min=1)
        weights = batch.pair_weights.double().cpu()
        present = torch.triu(mask[:, :, None] & mask[:, None, :], diagonal=1)
        strength = torch.maximum(weights, weights.transpose(1, 2))
        kept = present & (strength > 0)
        # With a soft label the better one is the one that the larger weight prefers.
        ahead = weights >= weights.transpose(1, 2)
        prompt, k, j = kept.nonzero(as_tuple=True)
        swap = ~ahead[prompt, k, j]
        better, worse = torch.where(swap, j, k), torch.where(swap, k, j)
        chosen, rejected = scores[prompt, better], scores[prompt, worse]
        self.add(
            pairs=len(prompt),
            chosen=float(chosen.sum()),
            rejected=float(rejected.sum()),
            right=float((chosen > rejected).sum()),
            chosen_logps=float(sums[prompt, better].sum()),
            rejected_logps=float(sums[prompt, worse].sum()),
            weights=float(strength[kept].sum()),
            squared_weights=float((strength[kept] ** 2).sum()),
            all_pairs=float(present.sum()),
            tokens=batch.tokens,
            prompts=len(batch.prompt_ids),
            **{
                name: float(parts[part].detach())
                for name, part in (("contrastive", "contrastive"), ("contrastive", "ranking"), ("sft", "sft"))
                if part in parts
            },
            total=float(parts["total"].detach()),
        )

    def __getitem__(self, name: str) -> float:
        return float(self.values[_SUMS.index(name)])

    def metrics(self, steps: int) -> dict[str, float]:
        """The metrics over `steps` optimizer steps, under the names that users know from TRL."""
        pairs = max(self["pairs"], 1.0)
        out: dict[str, float] = {
            "rewards/chosen": self["chosen"] / pairs,
            "rewards/rejected": self["rejected"] / pairs,
            "rewards/margins": (self["chosen"] - self["rejected"]) / pairs,
            "rewards/accuracies": self["right"] / pairs,
            "logps/chosen": self["chosen_logps"] / pairs,
            "logps/rejected": self["rejected_logps"] / pairs,
            "noise/kept_fraction": self["pairs"] / max(self["all_pairs"], 1.0),
            "noise/effective_sample_size": self["weights"] ** 2 / max(self["squared_weights"], 1e-12),
        }
        if self._has_parts:
            out["loss/contrastive"] = self["contrastive"] / max(steps, 1)
            out["loss/sft"] = self["sft"] / max(steps, 1)
        return out


class Pace:
    """The sums of the steps since the last log, and the time that the steps themselves took."""

    def __init__(self, loss: str) -> None:
        self.sums, self.steps, self._since = Sums(loss), 0, 0.0

    def step(self) -> None:
        """A step begins."""
        self._since = self._since or time.perf_counter()
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here is no part of a step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += (time.perf_counter() - began) if self._since else 0.0

    def metrics(self, peak_flops: float) -> dict[str, float]:
        """The metrics, and how fast it went; `peak_flops`: operations per second that the devices could do."""
        seconds = time.perf_counter() - self._since
        return self.sums.metrics(self.steps) | {
            "perf/tokens_per_second": self.sums["tokens"] / seconds,
            "perf/mfu": self.sums["flops"] / seconds / peak_flops,
        }


def metric_rows(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """One row per logged step from a trainer's history, by step; an evaluation joins the row of its step."""
    rows: dict[int, dict[str, float]] = {}
    for entry in log_history:
        values = {
            name: float(value)
            for name, value in entry.items()
            if name != "step" and isinstance(value, int | float) and not name.startswith("train_")
        }
        if "loss" in values or any(name.startswith("eval_") for name in values):
            rows.setdefault(int(entry["step"]), {}).update(values)
    return [{"step": step, **rows[step]} for step in sorted(rows)]
