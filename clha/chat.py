"""Messages to token ids by the policy's own chat template: the only place that does it.

Text of users can never become a control token. Where it spells none, the ids are those of `apply_chat_template`;
where it does, the spelling is hidden while the template renders, and encoded in pieces that spell nothing.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from clha.control_tokens import beginning, control_ids, in_pieces, spelling_of
from clha.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

_ASKED = "27af6d1c"  # a user's words that no template writes by itself
_SHIPPED = Path(__file__).parent / "chat_templates"


class Unusable(Exception):
    """A prompt or response that cannot become tokens: `reason` and `detail` go to the quarantine."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids, its generation prompt included.

    `messages` are those that were encoded: without the `truncated_turns` oldest ones.
    """

    token_ids: list[int]
    messages: list[dict[str, str]]
    truncated_turns: int


@dataclass(frozen=True)
class EncodedResponse:
    """A response as token ids with the token that ends a turn, and the text that the ids spell."""

    token_ids: list[int]
    text: str


def shipped_template(name: str) -> str:
    """The source of a chat template that comes with CLHA."""
    return (_SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")


def load_chat(model: Path, chat_template: str = "model") -> "Chat":
    """The chat of the policy in folder `model`; `chat_template`: "model" (its own) or the name of a shipped one.

    Raises UserError when the folder has no usable tokenizer, EOS or chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model}: has no tokenizer that can be read ({reason})") from None
    if chat_template != "model":
        source = shipped_template(chat_template)
        # The shipped templates leave BOS to the tokenizer's own habit, as plain text of a base model does.
        tokenizer.chat_template = ("{{- bos_token -}}" if _adds_bos(tokenizer) else "") + source
    return Chat(tokenizer)


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token_id is not None and beginning(tokenizer)[:1] == [tokenizer.bos_token_id]


class Chat:
    """One policy's tokenizer and chat template. Raises UserError when the tokenizer lacks EOS or a template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise UserError(f"{name}: its tokenizer names no eos_token; add it to tokenizer_config.json")
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(
                f"{name}: its tokenizer has no chat template; for a base model set policy.chat_template: hh"
            )
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self._arguments: dict[str, Any] = {}
        # What decoding leaves out: none of it may stand inside a response.
        self.special_ids, self._control_ids = control_ids(tokenizer)
        self._control = spelling_of(tokenizer, self._control_ids)

    def with_arguments(self, arguments: Mapping[str, Any]) -> "Chat":
        """This chat with arguments for its template, as `tools` or `enable_thinking`.

        Raises Unusable `control_token` where they spell one: in a template's hands it would be one.
        """
        if self._control.search(json.dumps(arguments, ensure_ascii=False, default=str)):
            raise Unusable("control_token", "an argument of the chat template spells a control token")
        other = copy(self)
        for of_template in ("_gap", "_text_markers", "end_id"):
            other.__dict__.pop(of_template, None)
        other._arguments = dict(arguments)
        return other

    def encode_prompt(self, messages: Messages, max_tokens: int | None = None) -> EncodedPrompt:
        """Token ids of a prompt with the start of the assistant's turn; at most `max_tokens` of them.

        Too long ones lose their oldest turns, never the system turns at the start, until they fit; what is left
        starts with a user's turn. Raises Unusable: `empty_prompt`, `prompt_too_long` (the last turn alone does not
        fit), `template_rejects` (the template refuses the roles), `invalid_unicode`, `control_token`.
        """
        kept = [{"role": m["role"], "content": m["content"]} for m in messages]
        if not kept or not kept[-1]["content"].strip():
            raise Unusable("empty_prompt", "the last turn is empty" if kept else "there are no turns")
        ids = self._encode(kept)
        if max_tokens is None or len(ids) <= max_tokens:
            return EncodedPrompt(ids, kept, 0)
        lead = _leading_system_turns(kept)
        system, turns = kept[:lead], kept[lead:]
        starts = [i for i in range(1, len(turns)) if turns[i]["role"] == "user"]
        # Fewer turns are fewer tokens: the first start that fits is found by halving.
        low, high, best = 0, len(starts) - 1, None
        while low <= high:
            middle = (low + high) // 2
            rest = system + turns[starts[middle] :]
            ids = self._encode(rest)
            if len(ids) <= max_tokens:
                best, high = EncodedPrompt(ids, rest, starts[middle]), middle - 1
            else:
                low = middle + 1
        if best is None:
            raise Unusable("prompt_too_long", f"{len(ids)} tokens without its older turns, {max_tokens} allowed")
        return best

    def encode_last_turn(self, messages: Messages) -> EncodedPrompt:
        """The last turn alone, behind the system turns at the start, however long: for who cuts it himself.

        Raises Unusable as `encode_prompt`.
        """
        lead = _leading_system_turns(messages)
        dropped = max(len(messages) - 1 - lead, 0)
        last = self.encode_prompt([*messages[:lead], *messages[lead + dropped :]])
        return EncodedPrompt(last.token_ids, last.messages, dropped)

    def check_markers(self, texts: Iterable[str]) -> None:
        """Raises Unusable `stray_marker` when a text holds what the template, in plain text, begins a turn with.

        Control tokens cannot be forged, but a template like `hh` has none: there "\\n\\nAssistant:" in a user's text
        is another turn.
        """
        for i, text in enumerate(texts, 1):
            if self._text_markers.search(text):
                raise Unusable("stray_marker", f"text {i} holds a turn marker of the chat template")

    def encode_response(self, text: str) -> EncodedResponse:
        """Token ids of a response that was written elsewhere, as this policy would write it, and what ends a turn.

        `text` of the result is what the ids spell: characters that the tokenizer does not know are not in it.
        Raises Unusable: `empty_response`, `invalid_unicode`, `unspellable` (the tokenizer has no tokens for it).
        """
        _check_unicode(text)
        if not text.strip():
            raise Unusable("empty_response", "the response is empty")
        ids = self._plain(self._gap + text.strip())
        spelled = self.decode(ids)
        if not spelled.strip():
            raise Unusable("unspellable", "the tokenizer has no tokens for the response")
        return EncodedResponse([*ids, self.end_id], spelled)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text that token ids spell, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        for message in messages:
            _check_unicode(message["content"])
            if self._control.search(message["role"]):
                raise Unusable("template_rejects", "a role holds a control token")
        hidden: dict[str, str] = {}
        mark = uuid4().hex

        def hide(match: re.Match[str]) -> str:
            place = f"[{mark}-{len(hidden)}]"
            hidden[place] = match.group()
            return place

        masked = [{**m, "content": self._control.sub(hide, m["content"])} for m in messages]
        rendered = self._render(masked)
        # With neutral contents every control token is the template's own.
        neutral = self._control.findall(self._render([{**m, "content": "x"} for m in messages]))
        wanted = cast(list[int], self.tokenizer.convert_tokens_to_ids(neutral))
        if not hidden:
            ids = list(self.tokenizer(rendered, add_special_tokens=False).input_ids)
            if [i for i in ids if i in self._control_ids] == wanted:
                return ids
        if self._control.findall(rendered) != neutral:
            raise Unusable("control_token", "text of the prompt and the template together spell a control token")
        runs = self._control.split(rendered)
        places = re.compile(rf"\[{mark}-\d+\]")
        ids = self._plain(runs[0])
        for control, run in zip(wanted, runs[1:], strict=True):
            ids.append(control)
            ids += self._plain(places.sub(lambda m: hidden[m.group()], run))
        return ids

    def _render(self, messages: list[dict[str, str]], prompt: bool = True) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, **self._arguments
                )
            )
        except TemplateError as error:
            raise Unusable("template_rejects", (str(error).splitlines() or ["no reason given"])[0]) from None

    def _plain(self, text: str) -> list[int]:
        """Token ids of text in which nothing is a control token: every spelling of one is cut in two."""
        ids = [i for piece in in_pieces(text, self._control) for i in self._inside(piece)]
        # A tokenizer can make a control token of plain text all the same: its unknown token.
        return [i for i in ids if i not in self._control_ids]

    def _inside(self, text: str) -> list[int]:
        """Token ids of `text` as it stands after a control token (some tokenizers add a space at the very start)."""
        if not text:
            return []
        anchored = self.tokenizer(self._anchor + text, add_special_tokens=False).input_ids
        return list(anchored[1:] if self._anchor else anchored)

    @cached_property
    def _anchor(self) -> str:
        """A special token that does not swallow the spaces after it; "" where the tokenizer has none."""
        for i, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and not token.rstrip:
                ids = self.tokenizer(token.content + "a", add_special_tokens=False).input_ids
                if ids[0] == i:
                    return str(token.content)
        return ""

    @cached_property
    def _text_markers(self) -> re.Pattern[str]:
        """What begins a turn in plain text; nothing where control tokens do.

        A marker that the template puts on a line of its own counts at the beginning of a line only, as in HH text.
        """
        names = [uuid4().hex for _ in range(3)]
        roles = ("user", "assistant", "user")
        try:
            turns = self._render([{"role": r, "content": n} for r, n in zip(roles, names, strict=True)])
        except Unusable:
            turns = ""
        markers = set()
        for between in re.split("|".join(names), turns)[1:]:
            marker = between.strip()
            if marker and not self._control.search(between):
                start = r"(?:\A|\n)[ \t]*" if between.startswith("\n") else ""
                markers.add(start + re.escape(marker))
        return re.compile("|".join(sorted(markers)) or r"(?!)")

    @cached_property
    def end_id(self) -> int:
        """The special token that the template writes behind an assistant's words; EOS where it writes none.

        Gemma's is <end_of_turn>, and its EOS stands in no conversation. Generation stops at either.
        """
        words = uuid4().hex
        try:
            turns = self._render([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": words}], False)
        except Unusable:
            return self.eos_id
        _, said, after = turns.rpartition(words)
        first = self._control.match(after.lstrip()) if said else None
        end = self.tokenizer.convert_tokens_to_ids(first.group()) if first else None
        known = end in self.special_ids and end != self.tokenizer.bos_token_id
        if first is None or not known or self._begins_turn(first.group(), words, turns):
            return self.eos_id
        return cast(int, end)

    def _begins_turn(self, token: str, words: str, turns: str) -> bool:
        """Whether the token behind an assistant's words is the next turn's: some templates always write its start."""
        asked, _, after = turns.partition(words)
        between = self._control.split(after.lstrip().removeprefix(token))[0]
        if between.strip():  # the next speaker's name
            return True
        if asked.partition(_ASKED)[0].rstrip().endswith(token):
            return True
        more = [("user", _ASKED), ("assistant", words), ("user", _ASKED)]
        try:
            turns = self._render([{"role": role, "content": content} for role, content in more], False)
        except Unusable:
            return False
        # What ends a turn does so whoever speaks next.
        return not turns.partition(words)[2].lstrip().startswith(token)

    @cached_property
    def _gap(self) -> str:
        """The space that the template puts between its generation prompt and the assistant's words."""
        ask = [{"role": "user", "content": "x"}]
        try:
            asked = self._render(ask)
            answered = self._render([*ask, {"role": "assistant", "content": "y"}], prompt=False)
        except Unusable:
            return ""
        gap = answered[len(asked) :].partition("y")[0] if answered.startswith(asked) else ""
        return gap if gap.isspace() else ""


def _leading_system_turns(messages: Messages) -> int:
    """How many system turns stand at the beginning (the last turn is never counted)."""
    return next((i for i, m in enumerate(messages[:-1]) if m["role"] != "system"), max(len(messages) - 1, 0))


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("invalid_unicode", f"character {error.start} is half of a surrogate pair") from None
