"""Text of strangers and numbers, made fit to be shown: harmless, literal, short."""

import re
import string
import unicodedata

# Ends of lines and tabs are layout; all other control characters are shown by their number.
_KEPT = frozenset("\n\t")


def literal(text: str, limit: int | None = None) -> str:
    """`text` as a reader should see it: nothing in it acts, and nothing in it is hidden.

    Control, bidirectional-override, private and unassigned characters, lone surrogates and invisible ones appear as
    ⟨U+202E⟩. Beyond `limit` characters the rest is counted, not shown. HTML is left to the template's escaping.
    """
    rest = len(text) - limit if limit is not None else 0
    shown = "".join(c if _harmless(c) else f"⟨U+{ord(c):04X}⟩" for c in (text[:limit] if rest > 0 else text))
    return f"{shown} … and {rest:,} more characters" if rest > 0 else shown


def _harmless(character: str) -> bool:
    if character in _KEPT:
        return True
    if character == "\u200d":  # joins emoji
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def unmarked(text: str) -> str:
    """Markdown, of one line, that shows `text`: no link, image, HTML or end of a table's cell is made by it."""
    return re.sub(f"([{re.escape(string.punctuation)}])", r"\\\1", " ".join(text.split()))


def number(value: float | None, digits: int | None = None, sign: bool = False) -> str:
    """A number with a true minus and thousands separated; three significant digits where `digits` is not given."""
    if value is None:
        return "–"
    if digits is None:
        size = abs(value)
        digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 3 if size >= 0.01 else 4
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.replace("-", "+" if sign else "")
    return text.replace("-", "\u2212")


def typeset(sentence: str) -> str:
    """A sentence with true minus signs before its numbers."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\u2212", sentence)


def percent(share: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if share is None else f"{100 * share:.{digits}f}%".replace("-", "\u2212")


def duration(seconds: float | None) -> str:
    """Seconds for people: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Bytes for people, in powers of 1,000: 840 MB, 2.3 GB."""
    if count is None:
        return "–"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"
