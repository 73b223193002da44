"""Attention over packed rows on CUDA: FlexAttention, compiled once for rows of every length.

What a token sees of its row are two runs of tokens: of its prompt, and of its own response. So the rule is three
numbers for each token, the same program for every layout and window, and nothing is compiled again but for another
precision or where gradients are needed and were not before.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clha.training.batches import Segments

BLOCK = 128  # tokens of a block of FlexAttention; rows are padded to whole blocks


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """query [1, H, T, d], key and value [1, Hk, T, d] -> [1, T, H, d]; all layers with one window share its mask."""
    name = ("block_mask", window, str(query.device))
    if name not in segments.cache:
        segments.cache[name] = block_mask(segments, window, query.device)
    usual = query.shape[-1] ** -0.5
    if scale != usual:  # a number that is handed over would be part of what is compiled
        query = query * (scale / usual)
    for states in (query, key, value):  # heads and width; else a row of as many blocks would stand for them
        torch._dynamo.mark_static(states, [1, 3])
    attended = _compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap, query.device),
        block_mask=segments.cache[name],
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options={"IS_DIVISIBLE": True},
    )
    return attended.transpose(1, 2)


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention import flex_attention as flex

    # One model needs up to seven programs, and a process may train several. Beyond the limit, eight where nobody sets
    # it, PyTorch would go on uncompiled, with whole score matrices; of the full graph it says so by an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex.flex_attention, dynamic=True, fullgraph=True)


@functools.cache
def _capped(softcap: float, device: torch.device) -> Any:
    """Soft-capped scores; the cap is a tensor, as a number would be part of what is compiled."""
    cap = torch.tensor(softcap, device=device)

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


def block_mask(segments: Segments, window: int | None, device: torch.device | str) -> Any:
    """FlexAttention's block mask of a packed row, from counts per block: the mask itself is never made."""
    from torch.nn.attention.flex_attention import BlockMask

    first, end, own = (torch.from_numpy(x).to(device) for x in runs(segments, window))

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= first[q]) & (k < end[q])) | ((k >= own[q]) & (k <= q))

    blocks = segments.length // BLOCK
    edges = torch.arange(blocks, dtype=torch.int32, device=device) * BLOCK

    def within(start: Tensor, stop: Tensor) -> Tensor:
        """[T, blocks] how many of the tokens from `start` to `stop` [T] lie in each block."""
        return (torch.minimum(stop[:, None], edges + BLOCK) - torch.maximum(start[:, None], edges)).clamp_(min=0)

    at = torch.arange(segments.length, dtype=torch.int32, device=device)
    seen = (within(first, end) + within(own, at + 1)).view(blocks, BLOCK, blocks).sum(1)
    full = seen == BLOCK * BLOCK
    part = (seen > 0) & ~full
    kv, full_kv, q, full_q = (_listed(which) for which in (part, full, part.t(), full.t()))
    return BlockMask(
        seq_lengths=(segments.length, segments.length),
        kv_num_blocks=kv[0],
        kv_indices=kv[1],
        full_kv_num_blocks=full_kv[0],
        full_kv_indices=full_kv[1],
        q_num_blocks=q[0],
        q_indices=q[1],
        full_q_num_blocks=full_q[0],
        full_q_indices=full_q[1],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of [Q, K] how many are true [1, 1, Q], and their places first [1, 1, Q, K]."""
    places = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], places.int()[None, None].contiguous()


def runs(segments: Segments, window: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """first, end, own [T] int32: a token q sees those of first[q] to end[q] - 1 and of own[q] to q.

    The former lie in its prompt, where it is of a response. Padding sees itself, so that no row is empty.
    """
    first, end = np.zeros(segments.length, np.int32), np.zeros(segments.length, np.int32)
    own = np.arange(segments.length, dtype=np.int32)
    reach = segments.length if window is None else window
    for start, stop, responses in segments.groups:
        own[start:stop] = np.maximum(start, np.arange(start, stop) - reach + 1)
        for a, b in responses:
            own[a:b] = np.maximum(a, np.arange(a, b) - reach + 1)
            end[a:b] = stop
            first[a:b] = np.minimum(stop, np.maximum(start, np.arange(stop, stop + b - a) - reach + 1))
    return first, end, own
