"""The tokens that a tokenizer and a chat template speak with, and text in which nothing may become one."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def beginning(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer itself puts before a text, as BOS; whether it does, only asking it tells."""
    whole, bare = (list(tokenizer("a", add_special_tokens=added).input_ids) for added in (True, False))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]


def control_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[frozenset[int], frozenset[int]]:
    """The special tokens, and with them those that the chat template speaks with, special by name or not."""
    added = {i: (t.content, t.special) for i, t in tokenizer.added_tokens_decoder.items()}
    special = frozenset(tokenizer.all_special_ids) | {i for i, (_, is_special) in added.items() if is_special}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return special, special | {i for i, (content, _) in added.items() if content in template}


def spelling_of(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> re.Pattern[str]:
    """What matches the spelling of any of some tokens, the longest first."""
    spellings = {str(tokenizer.convert_ids_to_tokens(i)) for i in ids}
    # A spelling of one character cannot be cut into harmless pieces.
    longest_first = sorted((s for s in spellings if len(s) > 1), key=lambda s: (-len(s), s))
    return re.compile("|".join(re.escape(s) for s in longest_first) or r"(?!)")


def in_pieces(text: str, spelling: re.Pattern[str]) -> list[str]:
    """`text` cut so that no piece spells a token: every spelling, overlapping ones too, in two."""
    overlapping = re.compile(f"(?=(?:{spelling.pattern}))")
    cuts = [0, *(match.start() + 1 for match in overlapping.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]
