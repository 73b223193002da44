"""Frozen features of responses: hidden states of one layer of an encoder, averaged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from clha.errors import UserError
from clha.loading import load_whole
from clha.rewards.scoring import (
    Padding,
    computed_tokens,
    is_out_of_memory,
    lengths_mask,
    padded,
    release_cache,
    run_batches,
    too_long,
)
from clha.rewards.texts import ChatText, Encoded, RewardInput, encode_all, text_encoder
from clha.windows import layer_windows

Pooling = Literal["response_mean", "mean"]

# The share of the computed tokens that shared prompts must save: less than that does not pay for their masks. Measured
# on a CPU: 17% saved is 0.91 times as fast, 34% 1.34 times, 52% 2.15 times.
MIN_SAVING = 0.25


@dataclass(frozen=True)
class Features:
    """values [N, D] (NaN for what cannot be read), truncated [N], problems {row: why it cannot be read}."""

    values: NDArray[np.float64]
    truncated: NDArray[np.bool_]
    problems: dict[int, str]


class FrozenEncoder:
    """An encoder (causal or bidirectional) of which only the layers up to `layer` are kept."""

    def __init__(
        self,
        folder: Path,
        *,
        layer: int | None,
        pooling: Pooling,
        max_tokens: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`layer`: number of layers that run; null: all, and the final normalisation too.

        Raises UserError when the model has no such layer.
        """
        self.pooling = pooling
        self.device = torch.device(device)
        self.texts = text_encoder(folder, max_tokens, closed=False)
        self._model, self._tap = _cut_model(folder, layer, dtype)
        self._model.to(self.device).eval()
        self.width = int(self._model.config.hidden_size)
        self.padding = Padding()
        self.min_saving = MIN_SAVING
        # One prompt for all its responses, where only the past is seen and only responses are pooled.
        self.shares_prefixes = pooling == "response_mean" and isinstance(self.texts, ChatText) and self._can_share()

    def features(
        self,
        items: Sequence[RewardInput],
        *,
        tokens_per_batch: int,
        batches: list[list[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Features:
        """Features of the items, in float32 precision; `progress` hears how many are done.

        Responses to one prompt share its computation where the model allows (`shares_prefixes`) and where that is
        faster: where the batches have at least `min_saving` (25%) fewer tokens, padding included, than those of each
        response with a prompt of its own. Features are the same to 1e-5 either way.

        `batches` replaces the cut by length: places among the sequences (packs, where prompts are shared).
        """
        places, encoded, problems = encode_all(self.texts, items)
        packs = self._packs(encoded, tokens_per_batch)
        lengths = [_pack_length([encoded[i] for i in pack]) for pack in packs]
        done = [0]

        def run(rows: Sequence[int]) -> list[NDArray[np.float64]]:
            results = self._pooled_in_parts([[encoded[i] for i in packs[r]] for r in rows])
            done[0] += sum(len(packs[r]) for r in rows)
            return results

        results = run_batches(
            lengths,
            run,
            tokens_per_batch=tokens_per_batch,
            batches=batches,
            padding=self.padding,
            progress=progress and (lambda _: progress(done[0])),
        )
        values = np.full((len(items), self.width), np.nan)
        truncated = np.zeros(len(items), dtype=bool)
        for pack, result in zip(packs, results, strict=True):
            values[[places[i] for i in pack]] = result
        for place, e in zip(places, encoded, strict=True):
            truncated[place] = e.truncated
        return Features(values, truncated, problems)

    def _packs(self, encoded: Sequence[Encoded], tokens_per_batch: int) -> list[list[int]]:
        """Rows that are computed as one sequence: those of one prompt where that saves enough, else each alone."""
        alone = [[i] for i in range(len(encoded))]
        if not self.shares_prefixes:
            return alone
        packs = prefix_packs(encoded, tokens_per_batch)
        apart = computed_tokens([len(e.ids) for e in encoded], tokens_per_batch)
        shared = computed_tokens([_pack_length([encoded[i] for i in pack]) for pack in packs], tokens_per_batch)
        return packs if shared <= (1 - self.min_saving) * apart else alone

    def _pooled_in_parts(self, packs: list[list[Encoded]]) -> list[NDArray[np.float64]]:
        """As `_pooled`; a single pack that does not fit into memory is halved until its parts do."""
        try:
            return self._pooled(packs)
        except RuntimeError as error:
            if len(packs) > 1 or not is_out_of_memory(error):
                raise  # several packs: the caller tries fewer
            (pack,) = packs
            if len(pack) == 1:
                raise too_long(len(pack[0].ids)) from error
        release_cache()
        half = len(pack) // 2
        return [np.concatenate([self._pooled_in_parts([part])[0] for part in (pack[:half], pack[half:])])]

    def _pooled(self, packs: list[list[Encoded]]) -> list[NDArray[np.float64]]:
        """Mean states of the responses of each pack, [items of the pack, D]."""
        states = self._hidden(packs)  # (B, T, D)
        out = []
        for row, pack in enumerate(packs):
            at, means = pack[0].start, []
            for e in pack:
                # In a pack the responses stand one after the other; alone, a response stands where it was.
                start, end = (at, at + e.end - e.start) if len(pack) > 1 else (e.start, e.end)
                at = end
                span = slice(start, end) if self.pooling == "response_mean" else slice(0, len(e.ids))
                means.append(states[row, span].float().sum(dim=0) / (span.stop - span.start or float("nan")))
            out.append(torch.stack(means).double().cpu().numpy())
        return out

    def _hidden(self, packs: list[list[Encoded]]) -> torch.Tensor:
        """Hidden states (B, T, D) of packs; a pack of one is read as it is, its end included."""
        ids, positions, segments = zip(*(_lay_out(pack) for pack in packs), strict=True)
        arguments: dict[str, Any] = {"input_ids": padded(ids, self.texts.pad_id, self.device), "return_dict": True}
        if any(len(pack) > 1 for pack in packs):
            arguments["attention_mask"] = _pack_mask(padded(segments, -1, self.device))
            arguments["position_ids"] = padded(positions, 0, self.device)
        else:
            arguments["attention_mask"] = lengths_mask(ids, self.device)
        if hasattr(self._model.config, "use_cache"):
            arguments["use_cache"] = False
        last: torch.Tensor = self._model(**arguments).last_hidden_state
        return last if self._tap is None else self._tap.states

    def _can_share(self) -> bool:
        """Whether the model reads a pack as it reads its parts: tried on a small one, which no window would cut."""
        if not _only_the_mask_limits(self._model, self.texts.max_tokens):
            return False
        # The padding token may be the last one that the model knows.
        known = int(self._model.get_input_embeddings().num_embeddings)
        a, b, c, d, e = ((self.texts.pad_id + i) % known for i in range(5))
        parts = [Encoded([a, b, c, d], 2, 4, False), Encoded([a, b, e], 2, 3, False)]
        try:
            with torch.inference_mode():
                packed = self._pooled([parts])[0]
                alone = np.concatenate([self._pooled([[p]])[0] for p in parts])
        except (ValueError, RuntimeError, IndexError):  # a model that takes no such mask
            return False
        return bool(np.abs(packed - alone).max() <= 1e-3 * np.abs(alone).max())


def _only_the_mask_limits(model: Any, tokens: int) -> bool:
    """Whether each layer that runs sees all of a text of `tokens` tokens, but for what a mask hides.

    A mask of ours takes the place of a layer's window, so that a pack may be read only where no window cuts a text.
    """
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    if set((getattr(config, "layer_types", None) or ())[:layers]) - {"full_attention", "sliding_attention"}:
        return False  # chunks, or a state that is carried along
    windows = layer_windows(config)[:layers]
    # An attention of its own may have windows of its own, under other names.
    return bool(model._supports_attention_backend) and all(w is None or tokens <= w for w in windows)


def prefix_packs(encoded: Sequence[Encoded], tokens_per_batch: int) -> list[list[int]]:
    """Rows with the same prompt together, as far as their responses fit into `tokens_per_batch` with it."""
    open_packs: dict[tuple[int, ...], list[int]] = {}
    used: dict[tuple[int, ...], int] = {}
    packs: list[list[int]] = []
    for row, e in enumerate(encoded):
        prompt = tuple(e.ids[: e.start])
        size = e.end - e.start
        if prompt in open_packs and used[prompt] + size <= tokens_per_batch:
            open_packs[prompt].append(row)
            used[prompt] += size
        else:
            open_packs[prompt] = [row]
            used[prompt] = len(prompt) + size
            packs.append(open_packs[prompt])
    return packs


def _lay_out(pack: Sequence[Encoded]) -> tuple[list[int], list[int], list[int]]:
    """Token IDs, positions and segments (0 prompt, 1.. responses) of a pack."""
    first = pack[0]
    if len(pack) == 1:
        n = len(first.ids)
        return first.ids, list(range(n)), [0] * n
    ids, positions, segments = first.ids[: first.start], list(range(first.start)), [0] * first.start
    for k, e in enumerate(pack, start=1):
        response = e.ids[e.start : e.end]
        ids = ids + response
        positions += range(first.start, first.start + len(response))
        segments += [k] * len(response)
    return ids, positions, segments


def _pack_length(pack: Sequence[Encoded]) -> int:
    return len(pack[0].ids) if len(pack) == 1 else pack[0].start + sum(e.end - e.start for e in pack)


def _pack_mask(segments: torch.Tensor) -> torch.Tensor:
    """[B, 1, T, T], true where a token may look: back, at the prompt and at its own response; padding at itself."""
    t = segments.shape[1]
    back = torch.ones((t, t), dtype=torch.bool, device=segments.device).tril()
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    return (back & visible)[:, None]


class _Tap:
    """Keeps what a layer puts out, before any final normalisation."""

    states: torch.Tensor

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output


def _cut_model(folder: Path, layer: int | None, dtype: torch.dtype) -> tuple[Any, _Tap | None]:
    """The model of a folder without the layers above `layer`, and a tap on that layer (None for all layers)."""
    from transformers import AutoModel

    remedy = "give a model that was saved with all its weights"
    model = load_whole(AutoModel, folder, "encoder", remedy, new_head=True, dtype=dtype)
    if layer is None:
        return model, None
    total = int(model.config.num_hidden_layers)
    if not 1 <= layer <= total:
        raise UserError(f"fit_reward: layer is {layer}, but {folder.name} has layers 1 to {total}")
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        raise UserError(f"fit_reward: cannot tell the layers of {folder.name}; leave `layer` out to use the last one")
    del stacks[0][layer:]
    model.config.num_hidden_layers = layer
    tap = _Tap()
    stacks[0][layer - 1].register_forward_hook(tap)
    return model, tap
