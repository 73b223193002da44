"""How attention over a packed row is cut on the CPU: equal tiles of queries, so that few large products compute it.

A tile is a stretch of queries of one prompt and its responses, with the keys that any of them may see. Tiles that see
about as many keys form a batch, filled up to equal sizes.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clha.training.batches import Segments

Ints = NDArray[np.int64]

# Queries of a tile. Measured on SmolLM2's shapes: about as fast as 32 and 64, faster than 96, for prompts of 60 to 350
# tokens with two to eight responses.
_QUERIES = 48
# A batch takes one more tile while what fills it up is at most this share of its keys.
_FILLING = 0.2
# Numbers of keys are multiples of this: whole vector registers.
_KEYS_MULTIPLE = 16
# Probabilities of a batch for each query head, unless one tile has more: memory, which long prompts would need most.
_LARGEST = 1 << 20


@dataclass(frozen=True)
class TileBatch:
    """B tiles of L queries that see W keys each. States are rows of [T * Hk, ...], the heads of a token together.

    Attributes:
        queries: [B * Hk * L] rows of the queries, a short tile filled up with its last one.
        results: [B * Hk * L] the same rows for writing: what only fills up goes behind the last token.
        filled: places in `queries` that only fill up, None where there are none.
        keys: [B * Hk * W] rows of the keys.
        mask: [B, 1, L, 1, W], 0 where a query may see a key, -inf elsewhere.
    """

    queries: Tensor
    results: Tensor
    filled: Tensor | None
    keys: Tensor
    mask: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """(B, L, W)."""
        return self.mask.shape[0], self.mask.shape[2], self.mask.shape[4]


def tile_batches(segments: Segments, window: int | None, key_heads: int, dtype: torch.dtype) -> list[TileBatch]:
    """All tiles of a row; keys that the window hides from every query of a tile are left out. Made once per row."""
    name = ("tiles", window, key_heads, dtype)
    if name not in segments.cache:
        tiles = _tiles(segments, window)
        segments.cache[name] = [_batch(part, segments, window, key_heads, dtype) for part in _alike(tiles)]
    return segments.cache[name]  # type: ignore[return-value]


@dataclass(frozen=True)
class _Tile:
    start: int
    end: int
    keys: Ints


def _tiles(segments: Segments, window: int | None) -> list[_Tile]:
    reach = segments.length if window is None else window - 1
    tiles = []
    for start, end, responses in segments.groups:
        last = responses[-1][1] if responses else end
        count = -(-(last - start) // _QUERIES)
        edges = [start + (last - start) * i // count for i in range(count + 1)]
        for a, b in itertools.pairwise(edges):
            first = next((f for f, stop in responses if stop > a), end)  # of the response that the tile begins in
            if a < end:
                keys = np.arange(max(start, a - reach), b)
            else:
                # The query at a has a - first tokens of its response before it; others may reach back further.
                alone = any(f == first and b <= stop for f, stop in responses)
                shared = max(start, end - reach + (a - first if alone else 0))
                keys = np.concatenate([np.arange(min(shared, end), end), np.arange(max(first, a - reach), b)])
            tiles.append(_Tile(a, b, keys))
    return tiles


def _alike(tiles: list[_Tile]) -> list[list[_Tile]]:
    """Tiles by their number of keys, in batches that little fills up."""
    batches: list[list[_Tile]] = []
    for tile in sorted(tiles, key=lambda t: len(t.keys)):
        taken = batches[-1] if batches else []
        wanted, width = sum(len(t.keys) for t in taken), _whole(len(tile.keys))
        fits = (len(taken) + 1) * _QUERIES * width <= _LARGEST
        if taken and fits and len(taken) * width - wanted <= _FILLING * wanted:
            taken.append(tile)
        else:
            batches.append([tile])
    return batches


def _whole(keys: int) -> int:
    return -(-keys // _KEYS_MULTIPLE) * _KEYS_MULTIPLE


def _batch(tiles: list[_Tile], segments: Segments, window: int | None, key_heads: int, dtype: torch.dtype) -> TileBatch:
    length, width = max(t.end - t.start for t in tiles), _whole(max(len(t.keys) for t in tiles))
    queries, keys = np.empty((len(tiles), length), np.int64), np.empty((len(tiles), width), np.int64)
    real, there = np.zeros(queries.shape, bool), np.zeros(keys.shape, bool)
    for i, tile in enumerate(tiles):
        queries[i] = np.minimum(np.arange(tile.start, tile.start + length), tile.end - 1)
        real[i, : tile.end - tile.start] = True
        keys[i] = tile.keys[0]
        keys[i, : len(tile.keys)], there[i, : len(tile.keys)] = tile.keys, True
    q, k = torch.from_numpy(queries)[:, :, None], torch.from_numpy(keys)[:, None, :]
    seen = may_see(*segments.token_maps(), window, q, k) & torch.from_numpy(there)[:, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
    filled = np.flatnonzero(np.repeat(~real[:, None], key_heads, axis=1))
    return TileBatch(
        queries=_by_head(queries, key_heads),
        results=_by_head(np.where(real, queries, segments.length), key_heads),
        filled=torch.from_numpy(filled) if filled.size else None,
        keys=_by_head(keys, key_heads),
        mask=mask[:, None, :, None],
    )


def _by_head(tokens: Ints, key_heads: int) -> Tensor:
    """[B, N] tokens as rows of [T * Hk, ...], [B * Hk * N]."""
    heads = np.arange(key_heads)[None, :, None]
    return torch.from_numpy((tokens[:, None] * key_heads + heads).reshape(-1))


def may_see(group: Tensor, branch: Tensor, position: Tensor, window: int | None, q: Tensor, k: Tensor) -> Tensor:
    """The rule: a query sees the own prompt and the own response, nothing later, nothing out of the window.

    `group`, `branch`, `position` [T] are `Segments.token_maps`; `q` and `k` are tokens, broadcast to each other.
    """
    seen = (group[q] == group[k]) & (group[q] >= 0) & ((branch[k] == 0) | (branch[k] == branch[q])) & (q >= k)
    return seen if window is None else seen & (position[q] - position[k] < window)
