"""Datasets that training takes: joined preferences, and `datasets.Dataset` in our form or TRL's pair formats.

The preferences form has a row per prompt: prompt_token_ids, response_token_ids (a list per response, best first),
rewards (best first) and, if it likes, prompt_id, pair_weights, sft_index, sft_lambda. Weights that it has not follow
from the rewards by the paper's rule: pairs count whose rewards are more than `reward_gap` apart, and the SFT part does
where the reward of its response is above `sft_threshold`.
Pair formats have chosen and rejected, as text or as messages, with an explicit or implicit prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from clha.chat import Unusable
from clha.errors import UserError
from clha.training.batches import RankedPrompt
from clha.training.limits import Limits, fitted
from clha.training.pairs import Conversation, PlainText
from clha.training.ranked_rows import ranked_prompt
from clha.training.row_checks import look_at_pairs, look_at_preferences

_ROWS_TO_SEARCH = 1000  # for control tokens in text


def as_ranked_prompts(
    dataset: Any,
    tokenizer: Any,
    *,
    reward_gap: float = 3.0,
    sft_threshold: float = 0.0,
    max_length: int | None = None,
    control_tokens_in_text: bool = False,
    needs_pairs: bool = True,
    limits: Limits | None = None,
) -> Any:
    """`dataset` as something whose items are `RankedPrompt`, with `max_candidates` and `notes`. None stays None.

    `reward_gap` and `sft_threshold` give the preferences form the weights that it does not have; `max_length` and
    `control_tokens_in_text`: see `ClhaConfig`; `needs_pairs`: a note says so where no pair counts; `limits`: what the
    model can take.

    Raises:
        UserError: the columns are none of the known forms, text comes without a tokenizer, or a row cannot be what it
            should. What can be told of all rows at once is told now, the rest when an item is asked for.
    """
    if dataset is None or hasattr(dataset, "max_candidates"):
        return dataset
    check_kind(dataset, "dataset")
    columns, limits = set(getattr(dataset, "column_names", None) or ()), limits or Limits()
    if {"prompt_token_ids", "response_token_ids", "rewards"} <= columns:
        bos = getattr(tokenizer, "bos_token_id", None)
        return _preferences(dataset, _Preferences(reward_gap, sft_threshold, max_length, bos, limits), needs_pairs)
    if {"chosen", "rejected"} <= columns:
        if tokenizer is None:
            raise UserError("dataset: chosen and rejected are text; give the tokenizer as processing_class")
        if tokenizer.eos_token_id is None:
            raise UserError("dataset: responses end with the tokenizer's eos_token, and it has none; set it")
        return _pairs(dataset, _Pairs(tokenizer, max_length, control_tokens_in_text, limits))
    raise UserError(
        f"dataset: has columns {', '.join(sorted(columns)) or 'none'}; wanted are prompt_token_ids, "
        "response_token_ids and rewards, or chosen and rejected"
    )


def check_kind(dataset: Any, name: str) -> None:
    """Raises UserError where a dataset is of a kind that training cannot take."""
    if isinstance(dataset, Mapping):
        keys = list(dataset)
        raise UserError(f"{name} is a dict of datasets ({', '.join(map(str, keys))}); give one, as data[{keys[0]!r}]")
    if isinstance(dataset, list | tuple):
        raise UserError(f"{name} is a list; give datasets.Dataset.from_list(rows)")
    if dataset is not None and not hasattr(dataset, "__len__"):
        raise UserError(
            f"{name} is a stream, whose length nobody knows; give rows, as datasets.Dataset.from_list(list(stream)) or "
            "list(stream.take(n))"
        )


def check_given(train_dataset: Any, eval_dataset: Any) -> None:
    """Raises UserError for what a trainer is given, before anything is made of it."""
    check_kind(train_dataset, "train_dataset")
    if not isinstance(eval_dataset, Mapping):
        check_rows(eval_dataset, "eval_dataset")
        return
    for key, part in eval_dataset.items():
        check_rows(part, f"eval_dataset[{key!r}]")


def check_rows(dataset: Any, name: str) -> None:
    """Raises UserError where there is nothing to evaluate on."""
    check_kind(dataset, name)
    if dataset is not None and len(dataset) == 0:
        raise UserError(f"{name} has no rows, so there is nothing to evaluate on; give rows, or leave it out")


class RowError(UserError):
    """What is wrong with a row, in one line also where a loader's worker has put its traceback around it."""

    def __init__(self, line: str) -> None:
        super().__init__(line.strip().rpartition(f"{type(self).__qualname__}: ")[2])


class View:
    """A dataset of ranked prompts over another one, which answers for what this one does not know, as `select`."""

    _dataset: Any

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._item(k) for k in range(len(self))[i]]
        return self._item(range(len(self))[i])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of whoever looks for a protocol, as a loader for `__getitems__`
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def _item(self, i: int) -> RankedPrompt:
        raise NotImplementedError


class _Rows(View):
    """A dataset seen as ranked prompts; each row is converted, and checked, when it is asked for.

    `conversational`: responses end with what ends a turn in the chat template.
    """

    def __init__(
        self,
        dataset: Any,
        read: Callable[[dict[str, Any], int], RankedPrompt],
        doubtful: Sequence[int],
        max_candidates: int,
        notes: Sequence[str],
        conversational: bool = False,
    ) -> None:
        self._dataset, self._read, self.conversational = dataset, read, conversational
        self.max_candidates, self.notes = max_candidates, list(notes)
        for i in [*range(min(len(self), 1)), *doubtful]:
            self._item(i)

    def _item(self, i: int) -> RankedPrompt:
        try:
            return self._read(self._dataset[i], i)
        except UserError as error:
            raise RowError(str(error)) from None


def _preferences(dataset: Any, reader: "_Preferences", needs_pairs: bool) -> _Rows:
    found = look_at_preferences(dataset, reader.limits, reader.max_length)
    if found is None:
        sizes = (0 if own is None else len(own) for own in dataset["rewards"])
        return _Rows(dataset, reader.read, (), max(sizes, default=0), ())
    notes, gap = [], found.widest_gap
    if needs_pairs and found.max_candidates and not found.weighed and (gap is None or gap <= reader.reward_gap):
        why = "pair_weights are all 0"
        if found.max_candidates == 1:
            why = "every row has one response, which only the SFT part learns from"
        elif gap is not None:
            why = (
                f"rewards of a row are at most {gap:g} apart, and pairs count that are more than "
                f"reward_gap={reader.reward_gap:g} apart; set reward_gap and sft_threshold of ClhaConfig on their scale"
            )
        notes.append(f"dataset: no pair counts: {why}")
    return _Rows(dataset, reader.read, found.doubtful, found.max_candidates, notes)


def _pairs(dataset: Any, reader: "_Pairs") -> _Rows:
    first = dataset[0] if len(dataset) else {}
    if isinstance(first.get("chosen"), list):
        reader.check_template()
        return _Rows(dataset, reader.read, look_at_pairs(dataset), 2, (), conversational=True)
    told = reader.text.told(dataset[i] for i in range(min(len(dataset), _ROWS_TO_SEARCH)))
    return _Rows(dataset, reader.read, look_at_pairs(dataset), 2, [told] if told else [])


class _Preferences:
    """Reads rows of the preferences form."""

    def __init__(
        self, reward_gap: float, sft_threshold: float, max_length: int | None, bos: int | None, limits: Limits
    ) -> None:
        self.reward_gap, self.sft_threshold = reward_gap, sft_threshold
        self.max_length, self.bos, self.limits = max_length, bos, limits

    def read(self, row: dict[str, Any], i: int) -> RankedPrompt:
        item = ranked_prompt(row, i, self.reward_gap, self.sft_threshold)
        if self.max_length is not None:
            keep = int(item.prompt[0] == self.bos)
            prompt, responses = fitted(
                item.prompt.tolist(), [r.tolist() for r in item.responses], self.max_length, keep
            )
            item = replace(item, prompt=_ids(prompt), responses=[_ids(r) for r in responses])
        return self.limits.check(item, f"row {i}")


class _Pairs:
    """Reads rows of pairs; what the tokenizer is asked once is kept."""

    def __init__(self, tokenizer: Any, max_length: int | None, control_tokens: bool, limits: Limits) -> None:
        self._tokenizer, self._max_length, self._control_tokens = tokenizer, max_length, control_tokens
        self._limits = limits

    @cached_property
    def text(self) -> PlainText:
        return PlainText(self._tokenizer, self._control_tokens, self._max_length)

    @cached_property
    def _messages(self) -> Conversation:
        return Conversation(self._tokenizer, self._max_length)

    def check_template(self) -> None:
        """Raises UserError where messages have no chat template to go through."""
        if not isinstance(self._tokenizer.chat_template, str):
            raise UserError(
                "dataset: rows are messages, and the tokenizer has no (one) chat template; set "
                "tokenizer.chat_template, or give prompt, chosen and rejected as text"
            )

    def read(self, row: dict[str, Any], i: int) -> RankedPrompt:
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if chosen is None or rejected is None:
            raise UserError(f"dataset: row {i} has no {'chosen' if chosen is None else 'rejected'}; leave it out")
        try:
            if all(isinstance(text, str) for text in (prompt or "", chosen, rejected)):
                prompt_ids, responses = self.text.encode(prompt, [chosen, rejected])
            else:
                prompt_ids, responses = self._messages.encode(row)
        except (Unusable, UserError) as error:
            raise UserError(f"dataset: row {i} cannot be used: {error}; leave it out") from None
        if not prompt_ids or not all(responses):
            raise UserError(f"dataset: row {i} has no prompt, or an empty response; leave it out")
        item = RankedPrompt(
            prompt_id=str(row.get("prompt_id", i)),
            prompt=_ids(prompt_ids),
            responses=[_ids(r) for r in responses],
            rewards=np.array([1.0, 0.0]),
            pair_weights=np.array([[0, 1], [0, 0]], dtype=np.float32),
            sft_index=0,
            sft_lambda=1.0,
        )
        return self._limits.check(item, f"row {i}")


def _ids(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)
