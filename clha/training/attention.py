"""Attention over packed rows in which the responses of a prompt share it: each sees its prompt and itself only.

On the CPU the row is computed in tiles of queries over the keys that they may see (`clha.training.tiles`). On CUDA it
is one FlexAttention call with a block mask (`clha.training.attention_cuda`). Dropout, and on the CPU scores with a soft
cap, are computed plainly, prompt by prompt.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from clha.training.attention_cuda import flex_attention
from clha.training.batches import Segments
from clha.training.tiles import TileBatch, may_see, tile_batches

NAME = "clha_shared_prompt"

# Probabilities are kept for backward up to so many keys per query on average.
_KEPT_KEYS = 256


def register() -> None:
    """Make the attention known to transformers under `NAME`; no mask is made for it, the segments say all."""
    AttentionInterface.register(NAME, shared_prompt_attention)


@torch.compiler.disable  # it is compiled by itself, or not at all: a compiled block calls it as it is
def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query [1, H, T, d], key and value [1, Hk, T, d] -> [1, T, H, d].

    `segments` reaches it through the keyword arguments of the model's forward.

    Raises:
        NotImplementedError: the architecture asks for something that is not known here.
    """
    if segments is None or query.shape[0] != 1 or query.shape[2] != segments.length or key.shape[2] != query.shape[2]:
        raise NotImplementedError("attention without segments of one packed row")
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    if torch.is_autocast_enabled(query.device.type):  # rotary positions have made queries and keys float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    segments.cache.setdefault("windows", set()).add(sliding_window)  # type: ignore[attr-defined]
    if query.is_cuda and dropout == 0.0:
        return flex_attention(query, key, value, segments, scale, sliding_window, softcap), None
    if softcap is not None or dropout > 0:
        return _plain(query, key, value, segments, scale, sliding_window, softcap, dropout), None
    return _Tiled.apply(query, key, value, segments, scale, sliding_window), None


class _Tiled(torch.autograd.Function):
    """Attention as batched matrix products over tiles; the query heads that share keys are one product.

    States are gathered from [T * Hk, ...] into tiles [B * Hk, ...], which makes each of them a matrix, with G query
    heads for each of Hk key heads.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        heads, length, groups = key.shape[1], segments.length, query.shape[1] // key.shape[1]
        queries, keys, values = (_by_token(states, heads) for states in (query, key, value))
        batches = tile_batches(segments, window, heads, query.dtype)
        out = _results(queries, groups * value.shape[-1], segments, heads)
        # Probabilities are kept for backward where they are small beside the other activations.
        keep = sum(math.prod(batch.size) for batch in batches) <= _KEPT_KEYS * length
        kept = []
        for batch in batches:
            probabilities = _probabilities(batch, queries, keys, scale, query.shape[3])
            attended = torch.bmm(probabilities, _tiled(values, batch.keys, len(probabilities), value.shape[3]))
            out.index_copy_(0, batch.results, attended.view(-1, out.shape[1]))
            kept += [probabilities] if keep else []
        ctx.save_for_backward(query, key, value, *kept)
        ctx.settings = (segments, scale, batches)
        return out[: length * heads].view(1, length, heads * groups, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        segments, scale, batches = ctx.settings
        heads, length, (width, value_width) = key.shape[1], segments.length, (query.shape[3], value.shape[3])
        queries, keys, values = (_by_token(states, heads) for states in (query, key, value))
        grad = _by_token(grads[0].transpose(1, 2), heads)
        dq, dk, dv = _results(grad, queries.shape[1], segments, heads), torch.zeros_like(keys), torch.zeros_like(values)
        for i, batch in enumerate(batches):
            probabilities = kept[i] if kept else _probabilities(batch, queries, keys, scale, width)
            matrices = len(probabilities)
            grad_out = grad.index_select(0, batch.queries)
            if batch.filled is not None:
                grad_out.index_fill_(0, batch.filled, 0.0)
            grad_out = grad_out.view(matrices, -1, value_width)
            dv.index_add_(0, batch.keys, torch.bmm(probabilities.transpose(1, 2), grad_out).view(-1, value_width))
            grad_scores = torch.bmm(grad_out, _tiled(values, batch.keys, matrices, value_width).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype)
            asked = _tiled(queries, batch.queries, matrices, width)
            dk.index_add_(0, batch.keys, torch.bmm(grad_scores.transpose(1, 2), asked).view(-1, width))
            part = torch.bmm(grad_scores, _tiled(keys, batch.keys, matrices, width))
            dq.index_copy_(0, batch.results, part.view(-1, dq.shape[1]))
        dq, dk = dq[: length * heads].mul_(scale), dk.mul_(scale)
        made = (states.view(1, length, -1, query.shape[3]).transpose(1, 2) for states in (dq, dk))
        return *made, dv.view(1, length, heads, -1).transpose(1, 2), None, None, None


def _by_token(states: Tensor, key_heads: int) -> Tensor:
    """[1, H, T, d] -> [T * Hk, G * d], mostly without copying."""
    _, heads, length, width = states.shape
    return states[0].transpose(0, 1).reshape(length * key_heads, heads // key_heads * width)


def _tiled(states: Tensor, rows: Tensor, matrices: int, width: int) -> Tensor:
    """Rows of [T * Hk, ...] as [matrices, rows of each, width]."""
    return states.index_select(0, rows).view(matrices, -1, width)


def _results(like: Tensor, width: int, segments: Segments, key_heads: int) -> Tensor:
    """[(T + 1) * Hk, width] to be written tile by tile. Tokens of no prompt are 0; behind them is room to fill."""
    out = like.new_empty((segments.length + 1) * key_heads, width)
    last = max((responses[-1][1] if responses else end for _, end, responses in segments.groups), default=0)
    out[last * key_heads :] = 0
    return out


def _probabilities(batch: TileBatch, queries: Tensor, keys: Tensor, scale: float, width: int) -> Tensor:
    """Attention probabilities [B * Hk, L * G, W]."""
    tiles, rows, seen = batch.size
    matrices = batch.keys.shape[0] // seen
    asked = _tiled(queries, batch.queries, matrices, width).mul_(scale)
    scores = torch.bmm(asked, _tiled(keys, batch.keys, matrices, width).transpose(1, 2))
    scores.view(tiles, -1, rows, scores.shape[1] // rows, seen).add_(batch.mask)
    if scores.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, dim=-1, out=scores)
    return _softmax(scores)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _repeat(states: Tensor, repeats: int) -> Tensor:
    """[1, Hk, T, d] -> [1, Hk * repeats, T, d], each head `repeats` times in a row."""
    return states.repeat_interleave(repeats, dim=1) if repeats > 1 else states


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Softmax attention written out, for one prompt after the other with all its responses."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = _repeat(key, repeats), _repeat(value, repeats)
    seen = _visible(segments, window, query.device)
    parts, at = [], 0
    for start, end, responses in segments.groups:
        at = responses[-1][1] if responses else end
        scores = query[:, :, start:at] @ keys[:, :, start:at].transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~seen[start:at, start:at], -math.inf)
        probabilities = _softmax(scores)
        parts.append(torch.nn.functional.dropout(probabilities, p=dropout) @ values[:, :, start:at])
    if at < segments.length:
        parts.append(query.new_zeros(1, query.shape[1], segments.length - at, value.shape[-1]))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _visible(segments: Segments, window: int | None, device: torch.device) -> Tensor:
    """[T, T], True where a query (row) may see a key."""
    name = ("visible", window, str(device))
    if name not in segments.cache:
        group, branch, position = segments.token_maps(device)
        at = torch.arange(segments.length, device=device)
        q, k = at[:, None], at[None, :]
        segments.cache[name] = may_see(group, branch, position, window, q, k)
    return segments.cache[name]  # type: ignore[return-value]
