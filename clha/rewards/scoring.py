"""Running a model over many token sequences: batches by token budget, sorted by length, halved on out of memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from clha.errors import StageFailure
from clha.padding import row_width
from clha.progress import Progress

# A batch ends where a row would be shorter than this share of its longest one: at most a quarter of it is padding.
_LIKE_LENGTH = 0.75

# Rows of a batch -> one result for each of them.
Run = Callable[[Sequence[int]], Sequence[NDArray[np.float64]]]


@dataclass
class Padding:
    """Tokens that were computed and those among them that were padding."""

    tokens: int = 0
    padded: int = 0

    def add(self, lengths: Sequence[int]) -> None:
        """Count a batch of sequences of these lengths."""
        computed = max(lengths) * len(lengths)
        self.tokens += computed
        self.padded += computed - sum(lengths)

    @property
    def fraction(self) -> float:
        return self.padded / self.tokens if self.tokens else 0.0


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut sequences into batches of like length, longest first, each of at most `tokens_per_batch` padded tokens.

    Less than a quarter of a batch is padding: no sequence is shorter than three quarters of the longest beside it. A
    sequence that is longer than the budget gets a batch of its own. Longest first: what does not fit into memory shows
    at once.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if current:
            longest = lengths[current[0]]
            if longest * (len(current) + 1) > tokens_per_batch or lengths[row] < _LIKE_LENGTH * longest:
                batches.append(current)
                current = []
        current.append(row)
    return [*batches, current] if current else batches


def computed_tokens(lengths: Sequence[int], tokens_per_batch: int) -> int:
    """Tokens that a model computes in the batches of `length_batches`, padding included."""
    return sum(len(rows) * lengths[rows[0]] for rows in length_batches(lengths, tokens_per_batch))


def run_batches(
    lengths: Sequence[int],
    run: Run,
    *,
    tokens_per_batch: int,
    batches: list[list[int]] | None = None,
    padding: Padding | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[NDArray[np.float64]]:
    """The result of every sequence, in the order given, whatever the batches were.

    A batch that does not fit into memory is halved until it does; one sequence that does not is a StageFailure.
    `lengths`: tokens of each sequence; `batches` overrides the cut by length; `padding` is added to; `progress`
    hears how many sequences are done.
    """
    out: dict[int, NDArray[np.float64]] = {}
    pending = list(reversed(length_batches(lengths, tokens_per_batch) if batches is None else batches))
    while pending:
        rows = pending.pop()
        try:
            with torch.inference_mode():
                results = run(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise too_long(lengths[rows[0]]) from error
            half = len(rows) // 2
            pending += [rows[half:], rows[:half]]
            release_cache()
            continue
        out.update(zip(rows, results, strict=True))
        if padding is not None:
            padding.add([lengths[i] for i in rows])
        if progress:
            progress(len(out))
    return [out[i] for i in range(len(lengths))]


def padded(sequences: Sequence[Sequence[int]], fill: int, device: torch.device, *, left: bool = False) -> torch.Tensor:
    """[B, T] on `device`, filled up on the right, or on the left."""
    width = row_width(max(len(s) for s in sequences), device)
    out = torch.full((len(sequences), width), fill, dtype=torch.long)
    for k, sequence in enumerate(sequences):
        start = width - len(sequence) if left else 0
        out[k, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return out.to(device)


def lengths_mask(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool = False) -> torch.Tensor:
    """[B, T], 1 for tokens, 0 for padding, which is on the right, or on the left."""
    return padded([[1] * len(s) for s in sequences], 0, device, left=left)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out, on a GPU or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def too_long(tokens: int) -> StageFailure:
    """What is said of one sequence that does not fit into memory alone."""
    return StageFailure(f"out of memory with one sequence of {tokens} tokens; lower max_tokens")


def release_cache() -> None:
    """Give freed memory of a GPU back before something smaller is tried."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report_to(progress: Progress, total: int, unit: str, before: int = 0) -> Callable[[int], None]:
    """A callback for scorers: how many are done, to `before + done` of `total` on `progress`."""
    return lambda done: progress.update(before + done, total, unit)


def in_chunks(count: int, size: int) -> Iterator[range]:
    """0..count cut into ranges of `size`, the last one shorter."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
