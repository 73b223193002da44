"""Prompts with their ranked responses, laid out for one forward pass: packed with a shared prompt, or padded.

Packed: one row holds several prompts, each followed by its responses. Every response continues the prompt as if it
stood right behind it (positions restart), so the prompt is computed once. The last token of a response predicts
nothing that is trained on, so it is a target but not an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clha.padding import row_width

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RankedPrompt:
    """One prompt with its n responses in rank order, as stored token IDs."""

    prompt_id: str
    prompt: np.ndarray  # [P] int32
    responses: list[np.ndarray]  # n times [T_k] int32, best first
    rewards: np.ndarray  # [n] float64
    pair_weights: np.ndarray  # [n, n] float32
    sft_index: int
    sft_lambda: float
    # Log-probabilities the generator reported, None where a response was not generated.
    generator_logps: list[np.ndarray | None] = field(default_factory=list)
    reference_logps: np.ndarray | None = None  # [n] summed log-probabilities under a frozen reference, for DPO

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def packed_tokens(self) -> int:
        """Input tokens with a shared prompt."""
        return len(self.prompt) + sum(len(r) - 1 for r in self.responses)

    @property
    def longest(self) -> int:
        """Input tokens of the longest prompt-with-response."""
        return len(self.prompt) + max(len(r) - 1 for r in self.responses)


class Segments:
    """Where prompts and responses lie in one packed row; attention needs nothing else.

    Plain on purpose: the wrappers of data parallelism copy tensors and dataclasses in keyword arguments, not this.

    Attributes:
        length: tokens of the row, padding included.
        groups: per prompt (start, end, [(start, end) of each response]).
    """

    def __init__(self, length: int, groups: list[tuple[int, int, list[tuple[int, int]]]]) -> None:
        self.length = length
        self.groups = groups
        self.cache: dict[object, object] = {}  # masks made from this layout, shared by all layers

    def token_maps(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Per token: its prompt (-1 for padding), its branch (0: the prompt, k: response k) and its position, [T]."""
        key = ("maps", str(device))
        if key not in self.cache:
            group = np.full(self.length, -1, dtype=np.int64)
            branch, position = np.zeros_like(group), np.zeros_like(group)
            for g, (start, end, responses) in enumerate(self.groups):
                group[start:end], position[start:end] = g, np.arange(end - start)
                for k, (a, b) in enumerate(responses, start=1):
                    group[a:b], branch[a:b], position[a:b] = g, k, np.arange(b - a) + end - start
            self.cache[key] = tuple(torch.from_numpy(x).to(device) for x in (group, branch, position))
        return self.cache[key]  # type: ignore[return-value]

    def attended_pairs(self, window: int | None = None) -> int:
        """Number of (query, key) pairs that attention has to compute, for counting FLOPs."""
        total = 0
        for start, end, responses in self.groups:
            total += causal_pairs(0, end - start, window)
            total += sum(causal_pairs(end - start, b - a, window) for a, b in responses)
        return total


def causal_pairs(before: int, length: int, window: int | None) -> int:
    """Pairs of `length` queries with the keys up to each, `before` keys ahead of them, within a window of keys."""
    seen = np.arange(before + 1, before + length + 1)
    return int((seen if window is None else np.minimum(seen, window)).sum())


@dataclass
class MicroBatch:
    """What one forward pass needs: the model's inputs, what to predict where, and what the loss needs.

    B prompts, n the largest number of candidates, R rows of L tokens, U positions whose logits are needed,
    N response tokens.
    """

    input_ids: Tensor  # [R, L]
    position_ids: Tensor  # [R, L]
    attention_mask: Tensor | None  # [R, L] of the padded layout; None where packed
    segments: Segments | None  # of the packed layout
    predict_at: Tensor  # [U] flat positions in [R * L], ascending
    target_row: Tensor  # [N] which of the U positions predicts each response token, ascending
    targets: Tensor  # [N]
    target_cell: Tensor  # [N] the response of each token, as b * n + k
    response_lengths: Tensor  # [B, n], 0 where absent
    candidate_mask: Tensor  # [B, n]
    rewards: Tensor  # [B, n] float64, NaN where absent
    pair_weights: Tensor  # [B, n, n]
    sft_index: Tensor  # [B]
    sft_lambda: Tensor  # [B]
    reference_logps: Tensor | None  # [B, n] or None
    prompt_ids: list[str]
    generator_logps: Tensor | None  # [N], NaN where unknown; None where nothing is known

    @property
    def tokens(self) -> int:
        """Input tokens that had to be computed (padding not counted)."""
        if self.attention_mask is not None:
            return int(self.attention_mask.sum())
        assert self.segments is not None
        return sum(e - s + sum(b - a for a, b in r) for s, e, r in self.segments.groups)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def pack(prompts: Sequence[RankedPrompt], multiple_of: int = 1, pad_token_id: int = 0) -> MicroBatch:
    """Lay out prompts in one row, each followed by its responses; the row is padded to `multiple_of` tokens.

    Raises ValueError where a prompt or a response is empty.
    """
    _require_tokens(prompts)
    n = max(len(p) for p in prompts)
    length = sum(p.packed_tokens for p in prompts)
    padded = -(-length // multiple_of) * multiple_of
    ids = np.full(padded, pad_token_id, dtype=np.int64)
    positions = np.zeros(padded, dtype=np.int64)
    groups, targets = [], _Targets(n)
    at = 0
    for b, prompt in enumerate(prompts):
        start, end = at, at + len(prompt.prompt)
        ids[start:end], positions[start:end] = prompt.prompt, np.arange(end - start)
        spans, at = [], end
        for response in prompt.responses:
            stop = at + len(response) - 1
            ids[at:stop] = response[:-1]
            positions[at:stop] = np.arange(end - start, end - start + stop - at)
            spans.append((at, stop))
            at = stop
        groups.append((start, end, spans))
        # The last prompt token predicts the first token of every response.
        for k, response in enumerate(prompt.responses):
            targets.add(np.array([end - 1]), response[:1], b, k, prompt, 0)
        for k, (response, (a, stop)) in enumerate(zip(prompt.responses, spans, strict=True)):
            targets.add(np.arange(a, stop), response[1:], b, k, prompt, 1)
    return _micro_batch(prompts, n, ids[None], positions[None], None, Segments(padded, groups), targets)


def pad(prompts: Sequence[RankedPrompt], device: torch.device = _CPU, pad_token_id: int = 0) -> MicroBatch:
    """Lay out each prompt with each response in a row of its own, padded on the right, and put it on `device`.

    Raises ValueError where a prompt or a response is empty.
    """
    _require_tokens(prompts)
    n = max(len(p) for p in prompts)
    width = row_width(max(p.longest for p in prompts), device)
    rows = sum(len(p) for p in prompts)
    ids = np.full((rows, width), pad_token_id, dtype=np.int64)
    mask = np.zeros((rows, width), dtype=np.int64)
    targets, row = _Targets(n), 0
    for b, prompt in enumerate(prompts):
        start = len(prompt.prompt)
        for k, response in enumerate(prompt.responses):
            stop = start + len(response) - 1
            ids[row, :start], ids[row, start:stop], mask[row, :stop] = prompt.prompt, response[:-1], 1
            targets.add(np.arange(start - 1, stop) + row * width, response, b, k, prompt, 0)
            row += 1
    positions = np.broadcast_to(np.arange(width), (rows, width)).copy()
    return _micro_batch(prompts, n, ids, positions, torch.from_numpy(mask), None, targets).to(device)


def _require_tokens(prompts: Sequence[RankedPrompt]) -> None:
    for prompt in prompts:
        if not len(prompt.prompt) or not all(len(response) for response in prompt.responses):
            raise ValueError(f"prompt {prompt.prompt_id}: the prompt or a response is empty")


def split_by_tokens(prompts: Sequence[RankedPrompt], budget: int, packed: bool = True) -> list[list[RankedPrompt]]:
    """Divide prompts into as few micro-batches of at most `budget` tokens as first-fit finds, about equally full.

    A prompt that is longer by itself gets a micro-batch of its own. Padded layouts count padding.
    """
    sizes = [_cost([prompt], packed) for prompt in prompts]
    ordered = sorted(range(len(prompts)), key=lambda i: (-sizes[i], i))
    needed = max(1, -(-sum(sizes) // budget))
    bins: list[list[int]] = [[] for _ in range(needed)]
    for i in ordered:
        fitting = [b for b in bins if not b or _cost([prompts[j] for j in (*b, i)], packed) <= budget]
        if not fitting:
            bins.append([i])
        else:
            min(fitting, key=lambda b: sum(sizes[j] for j in b)).append(i)
    return [[prompts[i] for i in sorted(b)] for b in bins if b]


def _cost(prompts: list[RankedPrompt], packed: bool) -> int:
    if packed:
        return sum(p.packed_tokens for p in prompts)
    return sum(len(p) for p in prompts) * max(p.longest for p in prompts)


@dataclass(frozen=True)
class Layout:
    """How prompts are laid out for one model on one device."""

    packed: bool
    device: torch.device
    pad_token_id: int = 0

    def batch(self, prompts: Sequence[RankedPrompt]) -> MicroBatch:
        """One micro-batch on the device."""
        if not self.packed:
            return pad(prompts, self.device, self.pad_token_id)
        # FlexAttention works in blocks of 128, and fewer lengths mean fewer compilations.
        multiple = 128 if self.device.type == "cuda" else 1
        return pack(prompts, multiple, self.pad_token_id).to(self.device)

    def micro_batches(self, prompts: Sequence[RankedPrompt], budget: int) -> list[MicroBatch]:
        """As many as the token budget asks for; none for no prompts."""
        return [self.batch(part) for part in split_by_tokens(prompts, budget, self.packed)] if prompts else []


class _Targets:
    """Collects which position predicts which token of which response."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, at: np.ndarray, tokens: np.ndarray, b: int, k: int, prompt: RankedPrompt, first: int) -> None:
        """Position at[i] predicts tokens[i]; `first` is the place of tokens[0] in its response."""
        known = prompt.generator_logps[k] if prompt.generator_logps else None
        logps = np.full(len(tokens), np.nan) if known is None else known[first : first + len(tokens)]
        self.parts.append((at, tokens, np.full(len(tokens), b * self.n + k), logps))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """predict_at, target_row, targets, target_cell, generator_logps."""
        at, tokens, cells, logps = (np.concatenate([p[i] for p in self.parts]) for i in range(4))
        order = np.argsort(at, kind="stable")
        positions, rows = np.unique(at[order], return_inverse=True)
        known = None if np.isnan(logps).all() else torch.from_numpy(logps[order].astype(np.float32))

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))

        return tensor(positions), tensor(rows), tensor(tokens[order]), tensor(cells[order]), known


def _micro_batch(
    prompts: Sequence[RankedPrompt],
    n: int,
    ids: np.ndarray,
    positions: np.ndarray,
    mask: Tensor | None,
    segments: Segments | None,
    targets: _Targets,
) -> MicroBatch:
    size = len(prompts)
    lengths = np.zeros((size, n), dtype=np.int64)
    rewards = np.full((size, n), np.nan)
    weights = np.zeros((size, n, n), dtype=np.float32)
    reference = np.zeros((size, n), dtype=np.float64)
    for b, prompt in enumerate(prompts):
        m = len(prompt)
        lengths[b, :m] = [len(r) for r in prompt.responses]
        rewards[b, :m], weights[b, :m, :m] = prompt.rewards, prompt.pair_weights
        if prompt.reference_logps is not None:
            reference[b, :m] = prompt.reference_logps
    known = all(p.reference_logps is not None for p in prompts)
    predict_at, target_row, tokens, cells, generator_logps = targets.tensors()
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=mask,
        segments=segments,
        predict_at=predict_at,
        target_row=target_row,
        targets=tokens,
        target_cell=cells,
        response_lengths=torch.from_numpy(lengths),
        candidate_mask=torch.from_numpy(lengths > 0),
        rewards=torch.from_numpy(rewards),
        pair_weights=torch.from_numpy(weights),
        sft_index=torch.tensor([p.sft_index for p in prompts]),
        sft_lambda=torch.tensor([p.sft_lambda for p in prompts], dtype=torch.float32),
        reference_logps=torch.from_numpy(reference) if known else None,
        prompt_ids=[p.prompt_id for p in prompts],
        generator_logps=generator_logps,
    )
