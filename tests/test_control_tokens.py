"""Which tokens a tokenizer and its template speak with, and text cut so that it spells none."""

import pytest
from tokenizer_cases import gemma_tokenizer, llama2_tokenizer, metaspace_tokenizer

from clha.control_tokens import beginning, control_ids, in_pieces, spelling_of


def test_tokens_of_the_template_are_control_tokens_special_or_not():
    tokenizer = metaspace_tokenizer()
    special, control = control_ids(tokenizer)
    assert control - special == set(tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"]))


def test_what_stands_before_every_text_is_told_by_asking():
    assert beginning(gemma_tokenizer()) == [gemma_tokenizer().bos_token_id]
    assert beginning(llama2_tokenizer()) == [llama2_tokenizer().bos_token_id]
    assert beginning(metaspace_tokenizer()) == []


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("no token", ["no token"]),
        ("", [""]),
        ("a [INST] b [/INST]", ["a [", "INST] b [", "/INST]"]),
        ("[INST[INST]]", ["[INST[", "INST]]"]),
        ("</s></s>", ["<", "/s><", "/s>"]),
    ],
)
def test_every_spelling_is_cut_in_two(text: str, pieces: list[str]):
    tokenizer = metaspace_tokenizer()
    spelling = spelling_of(tokenizer, control_ids(tokenizer)[1])
    assert in_pieces(text, spelling) == pieces
    assert not any(spelling.search(piece) for piece in pieces)
