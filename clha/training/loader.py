"""Which prompts each process sees in which step: a pure function of seed, epoch and step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from clha.training.batches import RankedPrompt


class PromptSampler(Sampler[list[int]]):
    """Batches of dataset indices for one process.

    Each epoch is one permutation of all prompts, drawn from (seed, epoch) alone, so that resuming needs no state; with
    `shuffle` off it is the order that they have. It is cut into units of `batch * processes` prompts, and each unit is
    dealt to the processes as evenly as it goes: no prompt is repeated and none is left out; the last unit may leave a
    process without any. With `whole`, the last unit is dealt in batches that are full as long as it lasts, so that
    batches do not depend on the processes.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        whole: bool = False,
        shuffle: bool = True,
    ) -> None:
        self.size, self.batch, self.seed, self.whole, self.shuffle = size, batch, seed, whole, shuffle
        self.process, self.processes = process, processes
        self.epoch = 0

    @staticmethod
    def of(args: Any, size: int) -> "PromptSampler":
        """The sampler that a `ClhaConfig` asks for, over `size` prompts."""
        seed, whole = args.seed if args.data_seed is None else args.data_seed, args.normalization == "reference"
        batch, shuffle = args.per_device_train_batch_size, args.train_sampling_strategy == "random"
        return PromptSampler(size, batch, seed, args.process_index, args.world_size, whole, shuffle)

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
        order = torch.randperm(self.size, generator=generator).tolist() if self.shuffle else list(range(self.size))
        unit = self.batch * self.processes
        for start in range(0, self.size, unit):
            part = order[start : start + unit]
            ends = (self.process, self.process + 1)
            low, high = (self.batch * p if self.whole else len(part) * p // self.processes for p in ends)
            yield part[low:high]


def prompt_loader(dataset: Any, sampler: PromptSampler, args: Any) -> DataLoader[list[RankedPrompt]]:
    """A loader that yields lists of `RankedPrompt`; `args` is a `ClhaConfig`.

    `dataloader_pin_memory` has no meaning here: prompts are arrays of NumPy, laid out as tensors by the trainer.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_they_are,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def _as_they_are(prompts: list[RankedPrompt]) -> list[RankedPrompt]:
    return prompts
