"""Preference data in the formats of TRL: explicit or implicit prompt, plain text or conversational, prompts alone."""

from collections.abc import Mapping
from typing import Any

from clha.sources.hh_rlhf import check_markers, hh_row, is_dialogue, turns
from clha.sources.rows import Message, Place, Row, Unusable, checked_row, checked_text, checked_turns


def trl_row(fields: Mapping[str, Any], place: Place) -> Row:
    """A row from `prompt` (text or messages; optional), `chosen` and `rejected` (text or messages).

    Without `prompt` it is what chosen and rejected have in common: leading turns, or leading words of plain text.
    Raises Unusable.
    """
    prompt, chosen, rejected = (fields.get(name) for name in ("prompt", "chosen", "rejected"))
    subset = fields.get("subset")
    if prompt is None and chosen is None and rejected is None:
        raise Unusable("missing_field", "no `prompt`, `chosen` or `rejected`")
    if chosen is None and rejected is None:
        return checked_row(_prompt(prompt), None, None, subset, place)
    if isinstance(chosen, list) or isinstance(rejected, list):
        return _conversational(prompt, chosen, rejected, subset, place)
    if prompt is not None:
        return checked_row(_prompt(prompt), chosen, rejected, subset, place)
    if is_dialogue(chosen) or is_dialogue(rejected):
        return hh_row(fields, place)
    return _common_text(chosen, rejected, subset, place)


def _prompt(prompt: Any) -> list[Message]:
    if isinstance(prompt, list):
        return checked_turns(prompt, "prompt")
    text = checked_text(prompt, "`prompt`")
    if not is_dialogue(text):
        return [{"role": "user", "content": text}]
    dialogue = turns(text)
    if dialogue[-1]["role"] == "assistant" and not dialogue[-1]["content"].strip():
        dialogue.pop()  # the "\n\nAssistant:" that asks for the response
    check_markers(dialogue)
    return dialogue


def _conversational(prompt: Any, chosen: Any, rejected: Any, subset: Any, place: Place) -> Row:
    given = {"chosen": chosen, "rejected": rejected}
    sides = {name: _side(value, name) for name, value in given.items() if value is not None}
    first = next(iter(sides.values()))
    if any(side[:-1] != first[:-1] for side in sides.values()):
        raise Unusable("parted_early", "chosen and rejected part before their last turn")
    before = first[:-1]
    if before and prompt is not None:  # some data sets repeat the prompt in front of both sides
        _check_repeated(prompt, before)
    if not before and prompt is None:
        raise Unusable("no_prompt", "no `prompt`, and chosen and rejected have no turn in common")
    last = {name: side[-1]["content"] for name, side in sides.items()}
    return checked_row(before or _prompt(prompt), last.get("chosen"), last.get("rejected"), subset, place)


def _check_repeated(prompt: Any, before: list[Message]) -> None:
    if isinstance(prompt, list):
        agrees = checked_turns(prompt, "prompt") == before
    else:
        agrees = any(turn == {"role": "user", "content": prompt} for turn in before)
    if not agrees:
        raise Unusable("prompt_mismatch", "chosen and rejected begin with other turns than `prompt`")


def _side(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise Unusable("wrong_type", f"`{name}` is not a list of messages, but the other side is")
    side = checked_turns(value, name)
    if side[-1]["role"] != "assistant":
        raise Unusable("last_not_assistant", f"`{name}` does not end with the assistant's turn")
    return side


def _common_text(chosen: Any, rejected: Any, subset: Any, place: Place) -> Row:
    """Plain text without a prompt: the leading words that both sides share are the prompt."""
    for value, name in ((chosen, "chosen"), (rejected, "rejected")):
        if value is None:
            raise Unusable("missing_field", f"no `{name}`, and no `prompt`")
        checked_text(value, f"`{name}`")
    if chosen == rejected:
        raise Unusable("same_response", "chosen and rejected are the same text")
    end = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(map(len, (chosen, rejected)))
    )
    while end and not (chosen[end : end + 1].isspace() and rejected[end : end + 1].isspace()):
        end -= 1
    # Also when one side goes on with a space and the other not ("The sky" and "The skyline"): back to a whole word.
    if not chosen[:end].strip():
        raise Unusable("no_prompt", "chosen and rejected begin with different words; give `prompt`")
    return checked_row([{"role": "user", "content": chosen[:end]}], chosen[end:], rejected[end:], subset, place)
