"""HH-RLHF text: `chosen` and `rejected`, each a whole dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:" turns."""

import re
from collections.abc import Mapping
from typing import Any

from clha.sources.rows import Message, Place, Row, Unusable, checked_row, checked_text

_MARKER = re.compile(r"\n\n(Human|Assistant):")
# A marker that begins a turn or a line without the blank line before it.
_STRAY = re.compile(r"(?:\A|\n)[ \t]*(?:Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_row(fields: Mapping[str, Any], place: Place) -> Row:
    """A row of HH-RLHF: the shared turns are the prompt, the last turn of each dialogue its response.

    Raises Unusable, also when the two dialogues part before their last turn.
    """
    chosen, rejected = (_dialogue(fields.get(name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("parted_early", "chosen and rejected part before their last turn")
    check_markers([*chosen, rejected[-1]])
    return checked_row(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], None, place)


def is_dialogue(text: Any) -> bool:
    """Whether `text` is written as an HH dialogue."""
    return isinstance(text, str) and text.startswith("\n\nHuman:")


def turns(text: str) -> list[Message]:
    """The turns of a dialogue, without the one space after each marker, otherwise as they are. Raises Unusable."""
    before, *parts = _MARKER.split(text)
    if before or not parts:
        raise Unusable("not_a_dialogue", 'the text does not begin with "\\n\\nHuman:"')
    out: list[Message] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        out.append({"role": _ROLES[speaker], "content": content.removeprefix(" ")})
    return out


def check_markers(dialogue: list[Message]) -> None:
    """Raises Unusable when a turn holds a marker: a turn was lost, and whose words these are is unknown."""
    for i, turn in enumerate(dialogue, 1):
        if _STRAY.search(turn["content"]):
            raise Unusable("stray_marker", f"turn {i} holds a turn marker of its own")


def _dialogue(text: Any, name: str) -> list[Message]:
    if text is None:
        raise Unusable("missing_field", f"no `{name}`")
    out = turns(checked_text(text, f"`{name}`"))
    if out[-1]["role"] != "assistant":
        raise Unusable("last_not_assistant", f"`{name}` does not end with the assistant's turn")
    if len(out) == 1:
        raise Unusable("not_a_dialogue", f"`{name}` has no user turn")
    return out
