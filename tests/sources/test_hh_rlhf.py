"""HH-RLHF dialogues become messages and two responses; malformed ones say why they cannot."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clha.settings import Prepare
from clha.sources.hh_rlhf import hh_row
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import BadRow, Place, Unusable

PLACE = Place("harmless-base.jsonl.gz", "line 1", "harmless-base")
START = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How are you?\n\nAssistant:"


def row(chosen, rejected):
    return hh_row({"chosen": chosen, "rejected": rejected}, PLACE)


def test_the_shared_turns_are_the_prompt_and_the_last_turns_the_responses():
    made = row(START + " Fine, and you?", START + " Go away.")
    assert made.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How are you?"},
    ]
    assert (made.chosen, made.rejected) == (["Fine, and you?"], ["Go away."])
    assert made.subset == "harmless-base"


def test_one_space_after_a_marker_belongs_to_it_and_all_else_to_the_text():
    made = row("\n\nHuman:  two \n\nAssistant:none\n", "\n\nHuman:  two \n\nAssistant: a\nb ")
    assert made.messages == [{"role": "user", "content": " two "}]
    assert (made.chosen, made.rejected) == (["none\n"], ["a\nb "])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (None, START + " a", "missing_field"),
        (START + " a", 7, "wrong_type"),
        (START + " a", "Hello", "not_a_dialogue"),
        (START + " a", "", "not_a_dialogue"),
        ("x" + START + " a", START + " b", "not_a_dialogue"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "not_a_dialogue"),
        (START + " a\n\nHuman: b", START + " b", "last_not_assistant"),
        (START + " a", START.replace("How", "Who") + " b", "parted_early"),
        (START + " a\n\nHuman: more\n\nAssistant: b", START + " b", "parted_early"),
        (START + " a", START, "empty_response"),
        (START + " a", START + "  \n", "empty_response"),
        (START + " a", START + " a", "same_response"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", "empty_turn"),
        ("\n\nHuman: x\n\nHuman: y\n\nAssistant: a", "\n\nHuman: x\n\nHuman: y\n\nAssistant: b", "role_order"),
        (
            "\n\nHuman: x\n\nAssistant: y\n\nAssistant: a",
            "\n\nHuman: x\n\nAssistant: y\n\nAssistant: b",
            "last_not_user",
        ),
        (START + " Human: really", START + " b", "stray_marker"),
        (START + " a", START + " b\nAssistant: c", "stray_marker"),
        (START + " \udcff", START + " b", "invalid_unicode"),
    ],
)
def test_malformed_dialogues_are_refused(chosen, rejected, expected):
    with pytest.raises(Unusable) as caught:
        row(chosen, rejected)
    assert caught.value.reason == expected


def test_a_marker_inside_a_sentence_is_text():
    made = row(START + " The word Human: looks odd.", START + " b")
    assert made.chosen == ["The word Human: looks odd."]


@given(st.lists(st.text().filter(lambda t: t.strip()), min_size=1, max_size=6), st.text(), st.text())
def test_any_dialogue_is_read_back_or_refused(texts: list[str], chosen: str, rejected: str):
    speakers = ["Human", "Assistant"]
    shared = "".join(f"\n\n{speakers[i % 2]}: {t}" for i, t in enumerate(texts))
    end = f"\n\n{speakers[len(texts) % 2]}: "
    try:
        made = row(shared + end + chosen, shared + end + rejected)
    except Unusable:
        return
    assert [m["content"] for m in made.messages] == texts
    assert (made.chosen, made.rejected) == ([chosen], [rejected])


def test_the_real_file_is_read_and_reconciled(shared: Path):
    """1,799 rows; the reasons of the 42 that cannot be used, counted by hand with another parser."""
    prepare = Prepare(source="hh_rlhf", path=str(shared / "hh-rlhf" / "harmless-base.jsonl.gz"))
    rows = list(read_source(prepare, Meter()))
    bad = [r for r in rows if isinstance(r, BadRow)]
    good = [r for r in rows if not isinstance(r, BadRow)]
    reasons = {reason: sum(b.reason == reason for b in bad) for reason in {b.reason for b in bad}}
    assert len(rows) == 1799
    assert reasons == {"stray_marker": 31, "parted_early": 5, "empty_response": 3, "role_order": 3}
    assert {r.subset for r in good} == {"harmless-base"}
    assert all(len(r.chosen) == len(r.rejected) == 1 for r in good)
    assert all("\n\nHuman:" not in json.dumps(r.messages + r.chosen + r.rejected) for r in good)


def test_167_rows_of_the_real_file_share_a_first_turn(shared: Path):
    import gzip

    with gzip.open(shared / "hh-rlhf" / "harmless-base.jsonl.gz", "rt", encoding="utf-8") as f:
        firsts = [json.loads(line)["chosen"].split("\n\nAssistant:")[0] for line in f]
    assert sum(firsts.count(first) > 1 for first in firsts) == 167
