"""Which prompts each process sees in which step: a pure function of seed, epoch and step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from clha.training.batches import RankedPrompt


class PromptSampler(Sampler[list[int]]):
    """Batches of dataset indices for one process.

    Each epoch is one permutation of all prompts, drawn from (seed, epoch) alone, so that resuming needs no state. It
    is cut into units of `batch * processes` prompts, and each unit is dealt to the processes as evenly as it goes:
    no prompt is repeated and none is left out; the last unit may leave a process without any.
    """

    def __init__(self, size: int, batch: int, seed: int, process: int = 0, processes: int = 1) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.process, self.processes = process, processes
        self.epoch = 0

    @property
    def batch_sampler(self) -> "PromptSampler":
        """Itself: transformers looks here for whom to tell the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // (self.batch * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(self.size, generator=generator).tolist()
        unit = self.batch * self.processes
        for start in range(0, self.size, unit):
            part = order[start : start + unit]
            low, high = (len(part) * p // self.processes for p in (self.process, self.process + 1))
            yield part[low:high]


def prompt_loader(dataset: Any, sampler: PromptSampler, workers: int = 0) -> DataLoader[list[RankedPrompt]]:
    """A loader that yields lists of `RankedPrompt`."""
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_they_are, num_workers=workers)


def _as_they_are(prompts: list[RankedPrompt]) -> list[RankedPrompt]:
    return prompts
