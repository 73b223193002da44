"""Attention over packed rows in which the responses of a prompt share it: each sees its prompt and itself only.

On the CPU every branch is one call of PyTorch's flash kernel over exactly the keys it may see. On CUDA the row is one
FlexAttention call with a block mask. Score functions that neither kernel knows (soft-capped, with dropout) are
computed plainly, prompt by prompt.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from clha.training.batches import Segments

NAME = "clha_shared_prompt"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def register() -> None:
    """Make the attention known to transformers under `NAME`; no mask is made for it, the segments say all."""
    AttentionInterface.register(NAME, shared_prompt_attention)


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    segments.cache.setdefault("windows", set()).add(sliding_window)  # type: ignore[attr-defined]
    if query.is_cuda and dropout == 0.0:
        return _flex(module, query, key, value, segments, scale, sliding_window, softcap), None
    if softcap is not None or dropout > 0 or query.is_cuda or key.shape[-1] != value.shape[-1]:
        return _plain(query, key, value, segments, scale, sliding_window, softcap, dropout), None
    return _FlashBranches.apply(query, key, value, segments, scale, sliding_window), None


class _FlashBranches(torch.autograd.Function):
    """One flash call for each prompt with its first response, and one for each further response."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        heads, length = query.shape[1], segments.length
        repeats = heads // key.shape[1]
        keys, values = _repeat(key, repeats), _repeat(value, repeats)
        out = query.new_empty(1, length, heads, value.shape[-1])
        if sum(e - a for a, e in _covered(segments)) < length:
            out.zero_()
        logsumexps = []
        for queries, before in _branches(segments):
            mask, causal = _branch_mask(segments, queries, before, window, query)
            k, v = _seen(keys, queries, before), _seen(values, queries, before)
            part, lse = _flash(query[:, :, slice(*queries)], k, v, 0.0, causal, attn_mask=mask, scale=scale)
            out[:, slice(*queries)] = part.transpose(1, 2)
            logsumexps.append(lse)
        ctx.save_for_backward(query, key, value, out, *logsumexps)
        ctx.settings = (segments, scale, window, repeats)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *logsumexps = ctx.saved_tensors
        segments, scale, window, repeats = ctx.settings
        grad = grads[0].transpose(1, 2)
        out = out.transpose(1, 2)
        keys, values = _repeat(key, repeats), _repeat(value, repeats)
        # [T, H, d] in memory, as the projections before want it.
        dq, dk, dv = (torch.zeros_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, keys, values))
        for (queries, before), lse in zip(_branches(segments), logsumexps, strict=True):
            mask, causal = _branch_mask(segments, queries, before, window, query)
            k, v = _seen(keys, queries, before), _seen(values, queries, before)
            at = slice(*queries)
            q_part, k_part, v_part = _flash_backward(
                grad[:, :, at], query[:, :, at], k, v, out[:, :, at], lse, 0.0, causal, attn_mask=mask, scale=scale
            )
            dq[:, :, at] = q_part
            shared = 0 if before is None else before[1] - before[0]
            for total, part in ((dk, k_part), (dv, v_part)):
                total[:, :, at] += part[:, :, shared:]
                if before is not None:
                    total[:, :, slice(*before)] += part[:, :, :shared]
        if repeats > 1:
            batch, heads, length, width = dk.shape
            dk = dk.view(batch, heads // repeats, repeats, length, width).sum(2)
            dv = dv.view(batch, heads // repeats, repeats, length, dv.shape[-1]).sum(2)
        return dq, dk, dv, None, None, None


Span = tuple[int, int]


def _branches(segments: Segments) -> list[tuple[Span, Span | None]]:
    """(queries, the prompt before them): a prompt with its first response is one stretch without anything before."""
    branches: list[tuple[Span, Span | None]] = []
    for start, end, responses in segments.groups:
        first = responses[0][1] if responses else end
        branches.append(((start, first), None))
        branches += [((a, b), (start, end)) for a, b in responses[1:] if b > a]
    return branches


def _covered(segments: Segments) -> list[Span]:
    return [queries for queries, _ in _branches(segments)]


def _seen(states: Tensor, queries: Span, before: Span | None) -> Tensor:
    own = states[:, :, slice(*queries)]
    return own if before is None else torch.cat([states[:, :, slice(*before)], own], dim=2)


def _branch_mask(
    segments: Segments, queries: Span, before: Span | None, window: int | None, like: Tensor
) -> tuple[Tensor | None, bool]:
    """The additive mask of a branch [1, 1, Q, K], or None and `is_causal` where the kernel does it alone."""
    own = queries[1] - queries[0]
    shared = 0 if before is None else before[1] - before[0]
    if window is not None and window >= shared + own:
        window = None
    if before is None and window is None:
        return None, True
    name = ("mask", own, shared, window, like.dtype)
    if name not in segments.cache:
        at = torch.arange(shared, shared + own, device=like.device)[:, None]
        seen = torch.arange(shared + own, device=like.device)[None, :]
        hidden = seen > at
        if window is not None:
            hidden |= at - seen >= window
        mask = torch.zeros(own, shared + own, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
        segments.cache[name] = mask[None, None]
    return segments.cache[name], False  # type: ignore[return-value]


def _repeat(states: Tensor, repeats: int) -> Tensor:
    """[1, Hk, T, d] -> [1, Hk * repeats, T, d], each head `repeats` times in a row."""
    if repeats == 1:
        return states
    batch, heads, length, width = states.shape
    wide = states[:, :, None].expand(batch, heads, repeats, length, width)
    return wide.permute(0, 3, 1, 2, 4).reshape(batch, length, heads * repeats, width).transpose(1, 2)


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
    """Softmax attention written out, for one branch after the other."""
    repeats = query.shape[1] // key.shape[1]
    keys, values = _repeat(key, repeats), _repeat(value, repeats)
    parts, at = [], 0
    for queries, before in _branches(segments):
        mask, causal = _branch_mask(segments, queries, before, window, query)
        scores = query[:, :, slice(*queries)] @ _seen(keys, queries, before).transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if causal:
            size = scores.shape[-1]
            later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        elif mask is not None:
            scores = scores + mask
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        shares = torch.nn.functional.dropout(shares, p=dropout)
        parts.append(shares @ _seen(values, queries, before))
        at = queries[1]
    if at < segments.length:
        parts.append(query.new_zeros(1, query.shape[1], segments.length - at, value.shape[-1]))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _flex(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """FlexAttention with a block mask that all layers with the same window share."""
    from transformers.integrations.flex_attention import flex_attention_forward

    name = ("block_mask", window)
    if name not in segments.cache:
        segments.cache[name] = block_mask(segments, window, query.device)
    attended, _ = flex_attention_forward(
        module, query, key, value, segments.cache[name], scaling=scale, softcap=softcap  # type: ignore[arg-type]
    )
    return attended


def block_mask(segments: Segments, window: int | None, device: torch.device | str) -> Any:
    """FlexAttention's block mask of a packed row. Padding tokens see themselves, so that no row is empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    group, branch, position = segments.token_maps(device)

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (group[q] == group[k]) & ((branch[k] == 0) | (branch[k] == branch[q])) & (group[q] >= 0)
        seen = same & (q >= k)
        if window is not None:
            seen = seen & (position[q] - position[k] < window)
        return seen | (q == k)

    return create_block_mask(may_see, None, None, segments.length, segments.length, device=str(device))
