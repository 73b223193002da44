"""Chat JSONL: `messages`, and where there are any, `chosen`, `rejected` and `subset`."""

from collections.abc import Mapping
from typing import Any

from clha.sources.rows import Place, Row, Unusable, checked_row


def chat_row(fields: Mapping[str, Any], place: Place) -> Row:
    """A row of chat JSONL; `chosen` and `rejected` are a string or a list of strings. Raises Unusable."""
    for name in ("chosen", "rejected"):
        value = fields.get(name)
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            raise Unusable("wrong_type", f"`{name}` is a list of messages, not text; prepare.source=trl reads those")
    return checked_row(
        fields.get("messages"), fields.get("chosen"), fields.get("rejected"), fields.get("subset"), place
    )
