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
    no prompt is repeated and none is left out; the last unit may leave a process without any. With `whole`, the last
    unit is dealt in batches that are full as long as it lasts, so that batches do not depend on the processes.
    """

    def __init__(
        self, size: int, batch: int, seed: int, process: int = 0, processes: int = 1, whole: bool = False
    ) -> None:
        self.size, self.batch, self.seed, self.whole = size, batch, seed, whole
        self.process, self.processes = process, processes
        self.epoch = 0

    @staticmethod
    def of(args: Any, size: int) -> "PromptSampler":
        """The sampler that a `ClhaConfig` asks for, over `size` prompts."""
        seed, whole = args.seed if args.data_seed is None else args.data_seed, args.normalization == "reference"
        return PromptSampler(size, args.per_device_train_batch_size, seed, args.process_index, args.world_size, whole)

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
            ends = (self.process, self.process + 1)
            low, high = (self.batch * p if self.whole else len(part) * p // self.processes for p in ends)
            yield part[low:high]


def prompt_loader(dataset: Any, sampler: PromptSampler, args: Any) -> DataLoader[list[RankedPrompt]]:
    """A loader that yields lists of `RankedPrompt`; `args` is a `ClhaConfig`."""
    workers = args.dataloader_num_workers
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_they_are, num_workers=workers)


def _as_they_are(prompts: list[RankedPrompt]) -> list[RankedPrompt]:
    return prompts
