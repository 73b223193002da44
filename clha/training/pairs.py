"""Rows of TRL's pair formats as token ids: text without a chat template, and messages.

Where the tokens of a prompt stand at the beginning of those of prompt and answer together, which is nearly always, ids
of text are TRL's. Where a token would reach over the border between the two, the prompt keeps the tokens that it has
when the model is asked, and the answer those that it has behind another text.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from clha.chat import Chat, Unusable
from clha.control_tokens import beginning, control_ids, in_pieces, spelling_of
from clha.errors import UserError
from clha.training.limits import fitted, room_for_prompt

Encoded = tuple[list[int], list[list[int]]]  # the prompt, and each response

_CHATS_KEPT = 64  # with the arguments of different rows
# What no tokenizer is likely to join with the word after it.
_ANCHORS = ("\n", ".")


class PlainText:
    """Text without a chat template.

    `control_tokens`: whether what spells a control token is one, as in text that had the chat template applied;
    otherwise it is spelled out, so that nobody's words become one.
    """

    def __init__(self, tokenizer: Any, control_tokens: bool = False, max_length: int | None = None) -> None:
        self._tokenizer, self._control_tokens, self._max_length = tokenizer, control_tokens, max_length
        self._begin = beginning(tokenizer)
        special, control = control_ids(tokenizer)
        self._named = control - special  # of the template, but not special: the tokenizer makes them of any text
        self._spelling = spelling_of(tokenizer, control)

    def encode(self, prompt: str | None, answers: Sequence[str]) -> Encoded:
        """An implicit prompt is the common beginning of the answers, up to its last whole word."""
        if prompt is None:
            same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False)))
            prompt = same[: max((i for i, c in enumerate(same) if c.isspace()), default=0)]
            answers = [answer[len(prompt) :] for answer in answers]
        ids = self._ids(prompt)
        responses = [self._ended(self._after(prompt, ids, answer)) if answer else [] for answer in answers]
        begun = self._begin if ids[: len(self._begin)] != self._begin else []
        return fitted(begun + ids, responses, self._max_length, len(self._begin))

    def told(self, rows: Iterable[Mapping[str, Any]]) -> str | None:
        """A line on control tokens that stand in text and are spelled out, None where there are none."""
        if self._control_tokens:
            return None
        found: list[tuple[int, str]] = []
        looked = 0
        for i, row in enumerate(rows):
            looked += 1
            texts = (text for text in (row.get("prompt"), row["chosen"], row["rejected"]) if isinstance(text, str))
            match = next(filter(None, map(self._spelling.search, texts)), None)
            found += [(i, match.group())] if match else []
        if not found:
            return None
        return (
            f"dataset: text holds control tokens ({found[0][1]} in row {found[0][0]}; {len(found)} of the first "
            f"{looked} rows), which are spelled out as characters; give messages (the conversational form), or set "
            "control_tokens_in_text=True of ClhaConfig where the chat template was applied to trusted text"
        )

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]

    def _after(self, prompt: str, ids: list[int], answer: str) -> list[int]:
        """Token ids of an answer behind its prompt: some tokenizers put a space before what begins a text."""
        joined = self._ids(prompt + answer)
        return joined[len(ids) :] if joined[: len(ids)] == ids else _behind_text(answer, self._ids)

    def _ids(self, text: str) -> list[int]:
        ids = self._as_read(text)
        if self._control_tokens or self._named.isdisjoint(ids):
            return ids
        first, *others = in_pieces(text, self._spelling)
        ids = self._as_read(first)
        for piece in others:
            ids += _behind_text(piece, self._as_read)
        return [i for i in ids if i not in self._named]  # a tokenizer may read one where it is not spelled

    def _as_read(self, text: str) -> list[int]:
        """Token ids, those of the template that are not special among them."""
        split = not self._control_tokens
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])


def _behind_text(text: str, read: Callable[[str], list[int]]) -> list[int]:
    """Token ids of a text as it stands behind another one."""
    for anchor in _ANCHORS:
        known, joined = read(anchor), read(anchor + text)
        if joined[: len(known)] == known:
            return joined[len(known) :]
    return read(text)


class Conversation:
    """Messages, through the same chat code as everywhere."""

    def __init__(self, tokenizer: Any, max_length: int | None = None) -> None:
        self._chat = Chat(tokenizer)
        self._own: dict[str, Chat] = {}  # by arguments, those used last at the end
        # What `apply_chat_template` is told by the code that calls it.
        named = inspect.signature(tokenizer.apply_chat_template).parameters.values()
        self._reserved = {p.name for p in named if p.kind is not p.VAR_KEYWORD} - {"tools", "documents"} | {"messages"}
        self._max_length, self._bos = max_length, tokenizer.bos_token_id

    def encode(self, row: Mapping[str, Any]) -> Encoded:
        """What both conversations begin with belongs to the prompt; `tools` and the like go to the template."""
        chat = self._chat_of(row)
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        own = [] if prompt is None else _turns(prompt, "prompt")
        answers = {"chosen": _turns(chosen, "chosen"), "rejected": _turns(rejected, "rejected")}
        pairs = zip(*answers.values(), strict=False)
        same = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        if own and same[: len(own)] == own:
            raise UserError("chosen and rejected begin with the prompt again; take the prompt out of them")
        for name, turns in answers.items():
            roles = [turn["role"] for turn in turns[len(same) :]]
            if roles != ["assistant"]:
                raise UserError(
                    f"after the {len(same)} messages that chosen and rejected begin with, {name} has "
                    f"{', '.join(roles) or 'nothing'}; wanted is one message of the assistant",
                )
        last = [turns[-1]["content"] for turns in answers.values()]
        asked = [*own, *same]
        chat.check_markers([*(turn["content"] for turn in asked), *last])
        responses = [chat.encode_response(text).token_ids for text in last]
        ids = chat.encode_prompt(asked).token_ids
        room = room_for_prompt(len(ids), responses, self._max_length)
        if len(ids) > room:
            ids = _shortened(chat, asked, room)
        return fitted(ids, responses, self._max_length, int(ids[:1] == [self._bos]))

    def _chat_of(self, row: Mapping[str, Any]) -> Chat:
        """The chat with the arguments that a row has for the template, in TRL's columns."""
        tools, arguments = row.get("tools"), dict(row.get("chat_template_kwargs") or {})
        if reserved := sorted(self._reserved & arguments.keys()):
            raise UserError(f"chat_template_kwargs has {reserved[0]}, which is not for a row to say; take it out")
        if tools:
            try:
                arguments["tools"] = json.loads(tools) if isinstance(tools, str) else tools
            except ValueError:
                raise UserError("tools is text that is no JSON") from None
        if not arguments:
            return self._chat
        key = json.dumps(arguments, default=str)  # in their order, in which a template may write them
        own = self._own.pop(key, None) or self._chat.with_arguments(arguments)
        self._own[key] = own
        if len(self._own) > _CHATS_KEPT:
            del self._own[next(iter(self._own))]
        return own


def _shortened(chat: Chat, asked: list[dict[str, str]], room: int) -> list[int]:
    """A prompt without its oldest turns; where the last one alone is too long, that one whole, to be cut."""
    try:
        return chat.encode_prompt(asked, room).token_ids
    except Unusable as error:
        if error.reason != "prompt_too_long":
            raise
        return chat.encode_last_turn(asked).token_ids


def _turns(messages: Any, name: str) -> list[dict[str, str]]:
    """Role and content of each message."""
    try:
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (TypeError, KeyError):
        turns = [{"role": None}]
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise UserError(f"{name} is no list of messages with role and content, both text")
    return turns
