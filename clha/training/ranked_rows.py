"""A row of the preferences form as a ranked prompt, every part of it checked."""

from typing import Any

import numpy as np

from clha.errors import UserError
from clha.training.batches import RankedPrompt


def ranked_prompt(row: dict[str, Any], i: int, reward_gap: float, sft_threshold: float) -> RankedPrompt:
    """Row number `i`; see `clha.training.datasets` for the columns and the rule that gives it weights.

    Raises UserError, which names the row and the column, where it cannot be what it should.
    """
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
