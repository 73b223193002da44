"""Attention over packed rows in which the responses of a prompt share it: each sees its prompt and itself only.

On the CPU the row is computed in tiles of matrix products over the keys that they may see. On CUDA it is one
FlexAttention call with a block mask. Scores with a soft cap or dropout are computed plainly on the CPU, prompt by
prompt.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from clha.training.batches import Segments

NAME = "clha_shared_prompt"

# Queries of a tile. Measured on SmolLM2's shapes: 64 is faster than 128 and 256 for prompts of 60 to 350 tokens.
_TILE = 64
# Probabilities are kept for backward up to so many keys per query on average.
_KEPT_KEYS = 256


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
    if torch.is_autocast_enabled(query.device.type):  # rotary positions have made queries and keys float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    segments.cache.setdefault("windows", set()).add(sliding_window)  # type: ignore[attr-defined]
    if query.is_cuda and dropout == 0.0:
        return _flex(module, query, key, value, segments, scale, sliding_window, softcap), None
    if softcap is not None or dropout > 0 or query.is_cuda:
        return _plain(query, key, value, segments, scale, sliding_window, softcap, dropout), None
    return _Tiles.apply(query, key, value, segments, scale, sliding_window), None


class _Tiles(torch.autograd.Function):
    """Attention tile by tile, as batched matrix products; the heads that share keys are one product.

    Tiles are stretches of at most `_TILE` queries, so that little of what the mask hides is computed. States are held
    as [Hk, T, G, d] (G query heads for each of Hk key heads), where a tile is a matrix without copying.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        heads, length, groups = key.shape[1], segments.length, query.shape[1] // key.shape[1]
        queries = _by_key_head(query, heads).mul_(scale)
        keys, values = key[0].contiguous(), value[0].contiguous()
        out = query.new_zeros(heads, length, groups, value.shape[-1])
        tiles = _tiles(segments, window)
        # Probabilities are kept for backward where they are small beside the other activations.
        keep = sum((t.end - t.start) * t.width for t in tiles) <= _KEPT_KEYS * length
        kept = []
        for tile in tiles:
            shares = _shares(tile, queries, keys, segments, window)
            part = _flat(out, tile)
            torch.bmm(shares[:, :, tile.shared_width :], values[:, tile.first : tile.end], out=part)
            if tile.shared_width:
                part.baddbmm_(shares[:, :, : tile.shared_width], values[:, tile.shared[0] : tile.shared[1]])
            kept += [shares] if keep else []
        ctx.save_for_backward(queries, key, value, *kept)
        ctx.settings = (segments, scale, window, tiles)
        return out.transpose(0, 1).reshape(1, length, heads * groups, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, key, value, *kept = ctx.saved_tensors
        keys, values = key[0].contiguous(), value[0].contiguous()
        segments, scale, window, tiles = ctx.settings
        heads, length, groups, _ = queries.shape
        grad = _by_key_head(grads[0].transpose(1, 2), heads)
        dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for i, tile in enumerate(tiles):
            shares = kept[i] if kept else _shares(tile, queries, keys, segments, window)
            grad_out, query, grad_query = _flat(grad, tile), _flat(queries, tile), _flat(dq, tile)
            slope = _products(grad_out, values, tile)
            slope = torch._softmax_backward_data(slope, shares, -1, shares.dtype)
            spans = [(tile.first, tile.end, tile.shared_width, tile.width)]
            if tile.shared_width:
                spans.append((*tile.shared, 0, tile.shared_width))
            for start, end, low, high in spans:
                dv[:, start:end].baddbmm_(shares[:, :, low:high].transpose(1, 2), grad_out)
                dk[:, start:end].baddbmm_(slope[:, :, low:high].transpose(1, 2), query)
                grad_query.baddbmm_(slope[:, :, low:high], keys[:, start:end])
        dq = dq.mul_(scale).transpose(0, 1).reshape(1, length, heads * groups, -1).transpose(1, 2)
        return dq, dk[None], dv[None], None, None, None


class _Tile(NamedTuple):
    """Queries start..end see the keys of `shared` (part of their prompt) and first..end, causally at its end."""

    start: int
    end: int
    first: int
    shared: tuple[int, int]  # (0, 0): nothing

    @property
    def shared_width(self) -> int:
        return self.shared[1] - self.shared[0]

    @property
    def width(self) -> int:
        return self.shared_width + self.end - self.first


def _tiles(segments: Segments, window: int | None) -> list[_Tile]:
    """All tiles of a row; keys that the window hides from every query of a tile are left out."""
    name = ("tiles", window)
    if name in segments.cache:
        return segments.cache[name]  # type: ignore[return-value]
    tiles = []
    reach = segments.length if window is None else window - 1
    for start, end, responses in segments.groups:
        for a in range(start, end, _TILE):
            tiles.append(_Tile(a, min(end, a + _TILE), max(start, a - reach), (0, 0)))
        for first, last in responses:
            for a in range(first, last, _TILE):
                behind = a - first  # tokens of the response before this tile
                shared = (max(start, end + behind - reach), end)
                tiles.append(
                    _Tile(a, min(last, a + _TILE), max(first, a - reach), shared if shared[0] < end else (0, 0))
                )
    segments.cache[name] = tiles
    return tiles


def _shares(tile: _Tile, queries: Tensor, keys: Tensor, segments: Segments, window: int | None) -> Tensor:
    """Attention probabilities of a tile, [Hk, L * G, keys]: the shared ones first, then its own."""
    scores = _products(_flat(queries, tile), keys, tile)
    size = tile.end - tile.start
    by_query = scores.view(scores.shape[0], size, -1, tile.width)
    if window is None:
        by_query[..., tile.width - size :] += _causal(size, segments, scores)
    else:
        by_query += _windowed(tile, window, segments, scores)
    return _softmax(scores)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least."""
    return torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)


def _products(rows: Tensor, states: Tensor, tile: _Tile) -> Tensor:
    """rows [Hk, L * G, d] times the states that the tile sees: [Hk, L * G, keys]."""
    own = states[:, tile.first : tile.end].transpose(1, 2)
    if not tile.shared_width:
        return torch.bmm(rows, own)
    out = rows.new_empty(rows.shape[0], rows.shape[1], tile.width)
    torch.bmm(rows, states[:, tile.shared[0] : tile.shared[1]].transpose(1, 2), out=out[:, :, : tile.shared_width])
    torch.bmm(rows, own, out=out[:, :, tile.shared_width :])
    return out


def _causal(size: int, segments: Segments, like: Tensor) -> Tensor:
    """[L, 1, L], -inf where the key comes after the query."""
    name = ("causal", size, like.dtype)
    if name not in segments.cache:
        later = torch.ones(size, size, dtype=torch.bool).triu(1)
        segments.cache[name] = torch.zeros(size, size, dtype=like.dtype).masked_fill_(later, -math.inf)[:, None]
    return segments.cache[name]  # type: ignore[return-value]


def _windowed(tile: _Tile, window: int, segments: Segments, like: Tensor) -> Tensor:
    """[L, 1, keys], -inf where the key comes after the query or is out of its window."""
    name = ("windowed", tile, window, like.dtype)
    if name not in segments.cache:
        _, _, position = segments.token_maps()
        own = torch.arange(tile.first, tile.end)
        seen = position[torch.cat([torch.arange(*tile.shared), own])]
        gap = position[tile.start : tile.end][:, None] - seen[None, :]
        hidden = (gap < 0) | (gap >= window)
        mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -math.inf)
        segments.cache[name] = mask[:, None]
    return segments.cache[name]  # type: ignore[return-value]


def _by_key_head(states: Tensor, key_heads: int) -> Tensor:
    """[1, H, T, d] -> a new [Hk, T, G, d]."""
    _, heads, length, width = states.shape
    grouped = states[0].transpose(0, 1).view(length, key_heads, heads // key_heads, width)
    return grouped.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _flat(states: Tensor, tile: _Tile) -> Tensor:
    """The tile's part of [Hk, T, G, d] as a view [Hk, L * G, d]."""
    part = states[:, tile.start : tile.end]
    return part.view(part.shape[0], -1, part.shape[-1])


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
        shares = _softmax(scores)
        parts.append(torch.nn.functional.dropout(shares, p=dropout) @ values[:, :, start:at])
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
        segments.cache[name] = _may_see(group, branch, position, window, q, k)
    return segments.cache[name]  # type: ignore[return-value]


def _may_see(group: Tensor, branch: Tensor, position: Tensor, window: int | None, q: Tensor, k: Tensor) -> Tensor:
    """The rule: the own prompt and the own response, nothing later, nothing out of the window."""
    seen = (group[q] == group[k]) & (group[q] >= 0) & ((branch[k] == 0) | (branch[k] == branch[q])) & (q >= k)
    return seen if window is None else seen & (position[q] - position[k] < window)


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
    mask: Any = segments.cache[name]
    attended, _ = flex_attention_forward(module, query, key, value, mask, scaling=scale, softcap=softcap)
    return attended


def block_mask(segments: Segments, window: int | None, device: torch.device | str) -> Any:
    """FlexAttention's block mask of a packed row. Padding tokens see themselves, so that no row is empty."""
    from torch.nn.attention.flex_attention import create_block_mask

    group, branch, position = segments.token_maps(device)

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _may_see(group, branch, position, window, q, k) | (q == k)

    return create_block_mask(may_see, None, None, segments.length, segments.length, device=str(device))
