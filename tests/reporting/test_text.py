"""Texts of strangers are shown literally, numbers readably."""

import pytest

from clha.reporting import text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\x00b", "a⟨U+0000⟩b"),
        ("\x1b[31mred", "⟨U+001B⟩[31mred"),
        ("abc\u202edef", "abc⟨U+202E⟩def"),
        ("\u2066\u200b\ufeff", "⟨U+2066⟩⟨U+200B⟩⟨U+FEFF⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\uffff\U000f0000", "⟨U+FFFF⟩⟨U+F0000⟩"),
        ("line\u2028next", "line⟨U+2028⟩next"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("<|im_end|> <b>", "<|im_end|> <b>"),
        ("مرحبا 👩\u200d🚀 é", "مرحبا 👩\u200d🚀 é"),
    ],
)
def test_what_cannot_be_seen_is_named_and_the_rest_is_left(given: str, shown: str) -> None:
    assert text.literal(given) == shown


def test_long_texts_are_cut_and_the_rest_is_counted() -> None:
    assert text.literal("x" * 1500, 10) == "xxxxxxxxxx … and 1,490 more characters"
    assert text.literal("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.12"), (12.34, "12.3"), (1234.5, "1,234"), (-0.0123, "−0.012"), (0, "0.00"), (None, "–")],
)
def test_numbers_have_about_three_digits(value: float | None, shown: str) -> None:
    assert text.number(value) == shown


def test_signs_are_true_minus_signs_and_zero_is_positive() -> None:
    assert text.number(0.5, 2, sign=True) == "+0.50"
    assert text.number(-0.001, 2, sign=True) == "+0.00"
    assert text.number(-0.001, 2) == "0.00"
    assert text.typeset("from -0.10 to +0.20, all-round, 2-3") == "from −0.10 to +0.20, all-round, 2-3"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.42, "0.4 s"), (12.4, "12 s"), (59.9, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (None, "–")],
)
def test_durations_are_for_people(seconds: float | None, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_sizes_are_for_people() -> None:
    assert [text.size(v) for v in (12, 2_300, 840e6, 6.04e9, None)] == ["12 B", "2.3 kB", "840 MB", "6.0 GB", "–"]
