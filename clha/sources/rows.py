"""What a reader yields: a checked row, or the reason why a row cannot be used."""

from dataclasses import dataclass
from typing import Any

from clha.digests import prompt_id

ROLES = ("system", "user", "assistant")
_DETAIL = 300  # characters: a detail says where and what, it does not repeat the text

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with its responses. `messages` ends with the user's turn; nothing is empty."""

    messages: list[Message]
    chosen: list[str]
    rejected: list[str]
    source: str
    subset: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row for the quarantine; `prompt_id` is None when the messages are what is wrong."""

    reason: str
    detail: str
    prompt_id: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: `source` (a file or dataset), `at` ("line 12"), and the subset of rows that name none."""

    source: str
    at: str
    subset: str


class Unusable(Exception):
    """Why a row cannot be used: one of the reasons in docs/data-formats.md, and what is wrong."""

    def __init__(self, reason: str, what: str, messages: list[Message] | None = None) -> None:
        super().__init__(what)
        self.reason, self.what, self.messages = reason, what, messages

    def at(self, place: Place) -> BadRow:
        """The quarantined row for this problem at `place`."""
        detail = f"{place.source} {place.at}: {self.what}"
        # The file name or a quoted field can hold what no UTF-8 file can.
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        return BadRow(self.reason, detail[:_DETAIL], prompt_id(self.messages) if self.messages else None)


def checked_row(messages: Any, chosen: Any, rejected: Any, subset: Any, place: Place) -> Row:
    """A row from untrusted fields.

    `messages`: list of {"role", "content"}; `chosen`, `rejected`: a string, a list of strings or None; `subset`: a
    string or None. Text is kept as it is. Raises Unusable.
    """
    prompt = checked_messages(messages)
    better = _responses(chosen, "chosen", prompt)
    worse = _responses(rejected, "rejected", prompt)
    if {response.strip() for response in better} & {response.strip() for response in worse}:
        raise Unusable("same_response", "the same response is both chosen and rejected", prompt)
    if subset is not None:
        checked_text(subset, "subset")
    return Row(prompt, better, worse, place.source, subset or place.subset)


def checked_messages(messages: Any) -> list[Message]:
    """The messages of a prompt: an optional system turn, then user and assistant in turn, the user last.

    Raises Unusable.
    """
    turns = checked_turns(messages, "messages")
    start = 1 if turns and turns[0]["role"] == "system" else 0
    for i, turn in enumerate(turns[start:]):
        expected = "assistant" if i % 2 else "user"
        if turn["role"] != expected:
            raise Unusable("role_order", f"turn {start + i + 1} is the {turn['role']}'s, not the {expected}'s")
    if turns[-1]["role"] != "user":
        raise Unusable("last_not_user", f"the last turn is the {turns[-1]['role']}'s, not the user's")
    return turns


def checked_turns(messages: Any, name: str) -> list[Message]:
    """Messages of known roles with text in them, in any order. Raises Unusable."""
    if messages is None:
        raise Unusable("missing_field", f"no `{name}`")
    if not isinstance(messages, list):
        raise Unusable("wrong_type", f"`{name}` is not a list of messages")
    if not messages:
        raise Unusable("empty_turn", f"`{name}` is empty")
    turns = []
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise Unusable("wrong_type", f"turn {i} of `{name}` is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role is None or content is None:
            raise Unusable("missing_field", f"turn {i} of `{name}` has no {'role' if role is None else 'content'}")
        checked_text(role, f"role of turn {i}")
        if role not in ROLES:
            raise Unusable("unknown_role", f"turn {i} has role {role[:40]!r}; known are {', '.join(ROLES)}")
        checked_text(content, f"content of turn {i}")
        if not content.strip():
            raise Unusable("empty_turn", f"turn {i} is empty")
        turns.append({"role": role, "content": content})
    return turns


def checked_text(value: Any, name: str) -> str:
    """`value` if it is a string that UTF-8 can hold. Raises Unusable."""
    if not isinstance(value, str):
        raise Unusable("wrong_type", f"{name} is not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("invalid_unicode", f"{name} holds a lone surrogate at character {error.start}") from None
    return value


def _responses(value: Any, name: str, prompt: list[Message]) -> list[str]:
    if value is None:
        return []
    responses = value if isinstance(value, list) else [value]
    try:
        for response in responses:
            if not checked_text(response, f"`{name}`").strip():
                raise Unusable("empty_response", f"`{name}` is empty")
    except Unusable as problem:
        problem.messages = prompt
        raise
    return list(dict.fromkeys(responses))
