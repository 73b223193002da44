"""Datasets that training takes: joined preferences, and `datasets.Dataset` in our form or TRL's pair formats.

The preferences form has a row per prompt: prompt_token_ids, response_token_ids (a list per response, best first),
rewards (best first) and, if it likes, prompt_id, pair_weights, sft_index, sft_lambda. Weights that it has not follow
from the rewards by the paper's rule: pairs count whose rewards are more than `reward_gap` apart, and the SFT part does
where the reward of its response is above `sft_threshold`.
Pair formats have chosen and rejected, as text or as messages, with an explicit or implicit prompt.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from clha.chat import Unusable
from clha.errors import UserError
from clha.training.batches import RankedPrompt
from clha.training.pairs import Conversation, PlainText


def as_ranked_prompts(dataset: Any, tokenizer: Any, *, reward_gap: float = 3.0, sft_threshold: float = 0.0) -> Any:
    """`dataset` as something whose items are `RankedPrompt`, with `max_candidates`. None stays None.

    `reward_gap` and `sft_threshold` give the preferences form the weights that it does not have.

    Raises:
        UserError: the columns are none of the known forms, or text comes without a tokenizer; when an item is asked
            for, its row cannot be what it should.
    """
    if dataset is None or hasattr(dataset, "max_candidates"):
        return dataset
    columns = set(getattr(dataset, "column_names", None) or ())
    if {"prompt_token_ids", "response_token_ids", "rewards"} <= columns:
        return _Rows(dataset, lambda row, i: _from_preferences(row, i, reward_gap, sft_threshold))
    if {"chosen", "rejected"} <= columns:
        if tokenizer is None:
            raise UserError("dataset: chosen and rejected are text; give the tokenizer as processing_class")
        if tokenizer.eos_token_id is None:
            raise UserError("dataset: responses end with the tokenizer's eos_token, and it has none; set it")
        return _Rows(dataset, _Pairs(tokenizer).read)
    raise UserError(
        f"dataset: has columns {', '.join(sorted(columns)) or 'none'}; wanted are prompt_token_ids, "
        "response_token_ids and rewards, or chosen and rejected"
    )


class _Rows:
    """A dataset seen as ranked prompts; each row is converted, and checked, when it is asked for."""

    def __init__(self, dataset: Any, convert: Callable[[dict[str, Any], int], RankedPrompt]) -> None:
        self._dataset, self._convert = dataset, convert

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> RankedPrompt:
        return self._convert(self._dataset[i], i)

    @property
    def max_candidates(self) -> int:
        if "response_token_ids" not in self._dataset.column_names:
            return 2
        rewards = self._dataset["rewards"]
        return max((0 if own is None else len(own) for own in rewards), default=0)


def _from_preferences(row: dict[str, Any], i: int, reward_gap: float, sft_threshold: float) -> RankedPrompt:
    given = {name: value for name, value in row.items() if value is not None}
    prompt = _tokens(given.get("prompt_token_ids", ()), f"row {i}: prompt_token_ids")
    responses = [
        _tokens(response, f"row {i}: response_token_ids[{k}]")
        for k, response in enumerate(given.get("response_token_ids", ()))
    ]
    n = len(responses)
    rewards = _numbers(given.get("rewards", ()), (n,), f"row {i}: rewards")
    if n == 0:
        raise UserError(f"dataset: row {i}: has no responses; leave it out")
    if "pair_weights" in given:
        weights = _numbers(given["pair_weights"], (n, n), f"row {i}: pair_weights")
        if (weights < 0).any():
            raise UserError(
                f"dataset: row {i}: pair_weights hold a number below 0; 0 is for a pair that does not count"
            )
    elif (np.diff(rewards) > 0).any():
        raise UserError(
            f"dataset: row {i}: rewards must be sorted, best first, where there are no pair_weights; sort the "
            "responses by them"
        )
    else:
        from clha import noise  # scipy comes with it, which nothing else here needs

        weights = noise.gap_weights(rewards[None], reward_gap)[0]
    sft_index = _numbers(given.get("sft_index", 0), (), f"row {i}: sft_index")
    if sft_index not in range(n):
        raise UserError(f"dataset: row {i}: sft_index is {sft_index:g}; it is the place of a response, 0 to {n - 1}")
    if "sft_lambda" not in given:
        from clha import noise

        given["sft_lambda"] = noise.threshold_lambda(rewards[int(sft_index)], sft_threshold)
    sft_lambda = _numbers(given["sft_lambda"], (), f"row {i}: sft_lambda")
    if not 0 <= sft_lambda <= 1:
        raise UserError(f"dataset: row {i}: sft_lambda is {sft_lambda:g}; it must be between 0 and 1")
    return RankedPrompt(
        prompt_id=str(given.get("prompt_id", i)),
        prompt=prompt,
        responses=responses,
        rewards=rewards,
        pair_weights=weights.astype(np.float32),
        sft_index=int(sft_index),
        sft_lambda=float(sft_lambda),
    )


def _tokens(values: Any, where: str) -> np.ndarray:
    """Token ids, [T] int32."""
    found = _array(values, where)
    if found.size == 0:
        raise UserError(f"dataset: {where} is empty; leave the row out")
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found < 0).any():
        raise UserError(f"dataset: {where} must be a list of token ids, whole numbers of at least 0")
    return found.astype(np.int32)


def _numbers(values: Any, shape: tuple[int, ...], where: str) -> np.ndarray:
    """Finite numbers of one shape, float64."""
    found = _array(values, where, np.float64)
    if found.shape != shape:
        wanted, has = (" x ".join(map(str, size)) or "one" for size in (shape, found.shape))
        raise UserError(f"dataset: {where} must hold {wanted} numbers (one for each response or pair), not {has}")
    if not np.isfinite(found).all():
        raise UserError(f"dataset: {where} holds NaN or infinity; mend it, or leave the row out")
    return found


def _array(values: Any, where: str, dtype: Any = None) -> np.ndarray:
    try:
        return np.asarray(values, dtype=dtype)
    except (TypeError, ValueError):
        raise UserError(f"dataset: {where} is no array of numbers; its rows must be equally long") from None


class _Pairs:
    """Reads rows of pairs; what the tokenizer is asked once is kept."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _text(self) -> PlainText:
        return PlainText(self._tokenizer)

    @cached_property
    def _messages(self) -> Conversation:
        return Conversation(self._tokenizer)

    def read(self, row: dict[str, Any], i: int) -> RankedPrompt:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        try:
            if all(isinstance(text, str) for text in (prompt or "", chosen, rejected)):
                prompt_ids, responses = self._text.encode(prompt, [chosen, rejected])
            else:
                prompt_ids, responses = self._messages.encode(row)
        except (Unusable, UserError) as error:
            raise UserError(f"dataset: row {i} cannot be used: {error}; leave it out") from None
        if not prompt_ids or not all(responses):
            raise UserError(f"dataset: row {i} has no prompt, or an empty response; leave it out")
        return RankedPrompt(
            prompt_id=str(row.get("prompt_id", i)),
            prompt=np.asarray(prompt_ids, dtype=np.int32),
            responses=[np.asarray(r, dtype=np.int32) for r in responses],
            rewards=np.array([1.0, 0.0]),
            pair_weights=np.array([[0, 1], [0, 0]], dtype=np.float32),
            sft_index=0,
            sft_lambda=1.0,
        )
