"""What reward models read: a prompt's messages and one response, as token IDs that know where the response stands."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Message = Mapping[str, str]


@dataclass(frozen=True)
class RewardInput:
    """A prompt (messages, the last one the user's) and one response to it."""

    messages: Sequence[Message]
    response: str


@dataclass(frozen=True)
class Encoded:
    """Token IDs; those of the response are ids[start:end]. `truncated`: something was cut on the left."""

    ids: list[int]
    start: int
    end: int
    truncated: bool


class TextEncoder(Protocol):
    """Turns messages and a response into the token IDs that one kind of model reads."""

    pad_id: int
    max_tokens: int

    def encode(self, item: RewardInput) -> Encoded: ...


class Unreadable(Exception):
    """An input that the reward model cannot read; the message says why."""


def encode_all(texts: TextEncoder, items: Sequence[RewardInput]) -> tuple[list[int], list[Encoded], dict[int, str]]:
    """Encode what can be read: (places in `items`, their tokens, {place: why it cannot be read})."""
    places, encoded, problems = [], [], {}
    for place, item in enumerate(items):
        try:
            encoded.append(texts.encode(item))
            places.append(place)
        except Unreadable as error:
            problems[place] = str(error)
    return places, encoded, problems


def without_oldest_turns(messages: Sequence[Message], turns: int) -> list[Message]:
    """The messages without the `turns` oldest ones; system messages at the beginning stay."""
    lead = leading_system_turns(messages)
    return [*messages[:lead], *messages[lead + turns :]]


def leading_system_turns(messages: Sequence[Message]) -> int:
    """How many system messages stand at the beginning (the last message is never counted)."""
    lead = 0
    while lead < len(messages) - 1 and messages[lead]["role"] == "system":
        lead += 1
    return lead


def whole_turns(
    messages: Sequence[Message], prompt: Callable[[Sequence[Message]], list[int]], room: int
) -> tuple[list[int], int]:
    """Token IDs of a prompt without the oldest turns that do not fit into `room`, and how many those are.

    What is left begins with a user's turn, as the policy's prompt does (`Chat.encode_prompt`); the last turn stays
    whether it fits or not. `prompt` turns messages into token IDs.
    """
    ids, dropped = prompt(messages), 0
    lead = leading_system_turns(messages)
    for turns in range(1, len(messages) - lead):
        if len(ids) <= room:
            break
        if messages[lead + turns]["role"] == "user":
            ids, dropped = prompt(without_oldest_turns(messages, turns)), turns
    return ids, dropped


def check_readable(item: RewardInput) -> None:
    """Raises Unreadable for an empty response and for text that is no Unicode."""
    if not item.response.strip():
        raise Unreadable("empty_response: the response is empty")
    try:
        "".join([item.response, *(m["content"] for m in item.messages)]).encode()
    except UnicodeEncodeError as error:
        raise Unreadable(f"invalid_unicode: character {error.start} is half of a surrogate pair") from None


def cut_left(prompt: list[int], response: list[int], after: list[int], max_tokens: int, *, truncated: bool) -> Encoded:
    """Join the parts and keep the last `max_tokens` tokens."""
    ids = prompt + response + after
    excess = max(0, len(ids) - max_tokens)
    start = max(0, len(prompt) - excess)
    end = max(start, len(ids) - len(after) - excess)
    return Encoded(ids[excess:], start, end, truncated or excess > 0)


class RoleText:
    """Lines "user: ..." and "assistant: ..." for encoders without a chat template, between their own special tokens."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        plain = self._tokens("a")
        framed = tokenizer("a", add_special_tokens=True)["input_ids"]
        at = framed.index(plain[0])
        self._before, self._after = framed[:at], framed[at + len(plain) :]

    def encode(self, item: RewardInput) -> Encoded:
        """Drops the same turns as the policy's prompt would lose, then tokens on the left.

        Raises Unreadable for an empty response and for text that is no Unicode.
        """
        check_readable(item)
        response = self._tokens(item.response)
        room = self.max_tokens - len(self._before) - len(response) - len(self._after)
        prompt, turns = whole_turns(item.messages, self._prompt, room)
        cut = cut_left(prompt, response, self._after, self.max_tokens - len(self._before), truncated=turns > 0)
        shift = len(self._before)
        return Encoded([*self._before, *cut.ids], cut.start + shift, cut.end + shift, cut.truncated)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._tokens("".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: ")

    def _tokens(self, text: str) -> list[int]:
        # verbose=False: too long texts are cut here, the tokenizer need not warn of them.
        read = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(read["input_ids"])


class ChatText:
    """A model's own chat template, with the start of the assistant's turn, then the response.

    `closed`: and what the template puts after it, so that the whole is the conversation as the template writes it.
    """

    def __init__(self, folder: Path, max_tokens: int, *, closed: bool) -> None:
        from clha.chat import load_chat

        self._chat = load_chat(folder)
        self.max_tokens = max_tokens
        self._after = self._closing() if closed else []
        self.pad_id = self._chat.tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self._chat.eos_id

    def encode(self, item: RewardInput) -> Encoded:
        """Drops the same turns as the policy's prompt would lose, then tokens on the left.

        Raises Unreadable for an empty prompt or response and for roles that the template refuses.
        """
        from clha.chat import Unusable

        try:
            response = self._chat.encode_response(item.response).token_ids[:-1]  # without the token that ends a turn
            room = self.max_tokens - len(response) - len(self._after)
            try:
                prompt = self._chat.encode_prompt(item.messages, room)
                ids, truncated = prompt.token_ids, prompt.truncated_turns > 0
            except Unusable as error:
                if error.reason != "prompt_too_long":
                    raise
                ids, truncated = self._chat.encode_last_turn(item.messages).token_ids, True
        except Unusable as error:
            raise Unreadable(str(error)) from None
        return cut_left(ids, response, self._after, self.max_tokens, truncated=truncated)

    def _closing(self) -> list[int]:
        """What the template writes after a response."""
        asked = [{"role": "user", "content": "a"}]
        whole = self._render([*asked, {"role": "assistant", "content": "b"}], False)
        begun = self._render(asked, True) + self._chat.encode_response("b").token_ids[:-1]
        return whole[len(begun) :] if whole[: len(begun)] == begun else [self._chat.eos_id]

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> list[int]:
        ids: Any = self._chat.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=generation_prompt, return_dict=False
        )
        return list(ids)


def text_encoder(folder: Path, max_tokens: int, *, closed: bool) -> TextEncoder:
    """The encoder for the model in `folder`: its chat template where it has one, role-tagged text otherwise.

    `max_tokens` is lowered to what the tokenizer says of the model, and to what the model's positions allow.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.model_max_length > 0:  # a huge number where the tokenizer does not say
        max_tokens = min(max_tokens, tokenizer.model_max_length)
    limit = _within_positions(AutoConfig.from_pretrained(folder), max_tokens)
    return ChatText(folder, limit, closed=closed) if tokenizer.chat_template else RoleText(tokenizer, limit)


def _within_positions(config: Any, tokens: int) -> int:
    """At most `tokens`, and no more than a model of that configuration has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    if positions <= 0:  # XLNet says -1: as many as one likes
        return tokens
    padding = config.get_text_config().pad_token_id
    rotary = getattr(config.get_text_config(), "rope_parameters", None)
    if padding is None or rotary or tokens + padding + 1 <= positions:
        return min(tokens, positions)
    return min(tokens, positions - _unused_positions(config))


def _unused_positions(config: Any) -> int:
    """How many positions no token gets: RoBERTa and its kin count from the padding token's ID on.

    Such models are known by their table of positions, which has a padding row; it is made here without memory.
    """
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model: Any = AutoModel.from_config(config)
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    rows = [int(m.padding_idx) + 1 for m in tables if getattr(m, "padding_idx", None) is not None]
    return max(rows, default=0)
