"""Rows of TRL's pair formats as token ids: text without a chat template, and messages.

Where the tokens of a prompt stand at the beginning of those of prompt and answer together, which is nearly always, ids
of text are TRL's. Where a token would reach over the border between the two, the prompt keeps the tokens that it has
when the model is asked, and the answer those that it has behind another text.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from clha.chat import Chat, beginning
from clha.errors import UserError

Encoded = tuple[list[int], list[list[int]]]  # the prompt, and each response

# What `apply_chat_template` is told by the code that calls it.
_RESERVED = {"add_generation_prompt", "chat_template", "continue_final_message", "return_dict", "tokenize"}
# What no tokenizer is likely to join with the word after it.
_ANCHORS = ("\n", ".")


class PlainText:
    """Text without a chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._begin = beginning(tokenizer)

    def encode(self, prompt: str | None, answers: Sequence[str]) -> Encoded:
        """An implicit prompt is the common beginning of the answers, up to its last whole word."""
        if prompt is None:
            same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=False)))
            prompt = same[: max((i for i, c in enumerate(same) if c.isspace()), default=0)]
            answers = [answer[len(prompt) :] for answer in answers]
        ids = self._ids(prompt)
        end = [self._tokenizer.eos_token_id]
        return self._begin + ids, [(own + end if (own := self._after(prompt, ids, a)) else []) for a in answers]

    def _after(self, prompt: str, ids: list[int], answer: str) -> list[int]:
        """Token ids of an answer behind its prompt: some tokenizers put a space before what begins a text."""
        for before, known in ((prompt, ids), *((anchor, self._ids(anchor)) for anchor in _ANCHORS)):
            joined = self._ids(before + answer)
            if joined[: len(known)] == known:
                return joined[len(known) :]
        return self._ids(answer)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


class Conversation:
    """Messages, through the same chat code as everywhere."""

    def __init__(self, tokenizer: Any) -> None:
        self._chat = self._own = Chat(tokenizer)
        self._arguments: dict[str, Any] = {}

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
        chat.check_markers([*(turn["content"] for turn in (*own, *same)), *last])
        return chat.encode_prompt([*own, *same]).token_ids, [chat.encode_response(text).token_ids for text in last]

    def _chat_of(self, row: Mapping[str, Any]) -> Chat:
        """The chat with the arguments that a row has for the template, in TRL's columns."""
        tools, arguments = row.get("tools"), dict(row.get("chat_template_kwargs") or {})
        if reserved := sorted(_RESERVED & arguments.keys()):
            raise UserError(f"chat_template_kwargs has {reserved[0]}, which is not for a row to say; take it out")
        if tools:
            try:
                arguments["tools"] = json.loads(tools) if isinstance(tools, str) else tools
            except ValueError:
                raise UserError("tools is text that is no JSON") from None
        if arguments != self._arguments:
            self._arguments, self._own = arguments, self._chat.with_arguments(arguments)
        return self._own


def _turns(messages: Any, name: str) -> list[dict[str, str]]:
    """Role and content of each message."""
    try:
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    except (TypeError, KeyError):
        turns = [{"role": None}]
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise UserError(f"{name} is no list of messages with role and content, both text")
    return turns
