"""Datasets that training takes: joined preferences, and `datasets.Dataset` in our form or TRL's pair formats.

The preferences form has a row per prompt: prompt_token_ids, response_token_ids (a list per response, best first),
rewards (best first) and, if it likes, prompt_id, pair_weights, sft_index, sft_lambda.
Pair formats have chosen and rejected, as text or as messages, with an explicit or implicit prompt.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import numpy as np

from clha.chat import Chat, Unusable
from clha.errors import UserError
from clha.training.batches import RankedPrompt


def as_ranked_prompts(dataset: Any, tokenizer: Any) -> Any:
    """`dataset` as something whose items are `RankedPrompt`, with `max_candidates`. None stays None.

    Raises:
        UserError: the columns are none of the known forms, or text comes without a tokenizer.
    """
    if dataset is None or hasattr(dataset, "max_candidates"):
        return dataset
    columns = set(getattr(dataset, "column_names", None) or ())
    if {"prompt_token_ids", "response_token_ids", "rewards"} <= columns:
        return _Rows(dataset, _from_preferences)
    if {"chosen", "rejected"} <= columns:
        if tokenizer is None:
            raise UserError("dataset: chosen and rejected are text; give the tokenizer as processing_class")
        return _Rows(dataset, lambda row, i: _from_pair(row, i, tokenizer))
    raise UserError(
        f"dataset: has columns {', '.join(sorted(columns)) or 'none'}; wanted are prompt_token_ids, "
        "response_token_ids and rewards, or chosen and rejected"
    )


class _Rows:
    """A dataset seen as ranked prompts; each row is converted when it is asked for."""

    def __init__(self, dataset: Any, convert: Callable[[dict[str, Any], int], RankedPrompt]) -> None:
        self._dataset, self._convert = dataset, convert

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> RankedPrompt:
        return self._convert(self._dataset[i], i)

    @property
    def max_candidates(self) -> int:
        columns = self._dataset.column_names
        if "rewards" not in columns:
            return 2
        return max((len(rewards) for rewards in self._dataset["rewards"]), default=0)


def _from_preferences(row: dict[str, Any], i: int) -> RankedPrompt:
    n = len(row["rewards"])
    weights = row.get("pair_weights")
    return RankedPrompt(
        prompt_id=str(row.get("prompt_id", i)),
        prompt=np.asarray(row["prompt_token_ids"], dtype=np.int32),
        responses=[np.asarray(r, dtype=np.int32) for r in row["response_token_ids"]],
        rewards=np.asarray(row["rewards"], dtype=np.float64),
        pair_weights=np.triu(np.ones((n, n), dtype=np.float32), 1)
        if weights is None
        else np.asarray(weights, dtype=np.float32).reshape(n, n),
        sft_index=int(row.get("sft_index", 0)),
        sft_lambda=float(row.get("sft_lambda", 1.0)),
    )


def _from_pair(row: dict[str, Any], i: int, tokenizer: Any) -> RankedPrompt:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    try:
        encode = _plain if isinstance(chosen, str) else _conversation
        prompt_ids, responses = encode(prompt, chosen, rejected, tokenizer)
    except Unusable as error:
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


def _plain(prompt: str | None, chosen: str, rejected: str, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Text without a chat template; an implicit prompt is the common beginning, up to its last whole word."""
    if prompt is None:
        pairs = zip(chosen, rejected, strict=False)
        same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt = same[: max((i for i, c in enumerate(same) if c.isspace()), default=0)]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    begin = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    return begin + ids(prompt), [[*ids(answer), tokenizer.eos_token_id] for answer in (chosen, rejected)]


def _conversation(prompt: Any, chosen: Any, rejected: Any, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Messages, through the same chat code as everywhere; an implicit prompt is all but the last message."""
    chat = Chat(tokenizer)
    if prompt is None:
        prompt = chosen[:-1]
    chat.check_markers(turn["content"] for turn in (*prompt, chosen[-1], rejected[-1]))
    answers = [chat.encode_response(answer[-1]["content"]).token_ids for answer in (chosen, rejected)]
    return chat.encode_prompt(prompt).token_ids, answers
