"""The sample data is what its card says: enough of it, no give-away by length or single words, nothing twice."""

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clha.settings import Prepare
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import Row


@pytest.fixture(scope="module")
def check(root: Path) -> ModuleType:
    """data/check_sample.py as a module."""
    spec = importlib.util.spec_from_file_location("check_sample", root / "data" / "check_sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_sample"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(root: Path, check: ModuleType) -> dict[str, Any]:
    figures: dict[str, Any] = check.figures(root / "data" / "sample")
    return figures


@pytest.fixture(scope="module")
def rows(root: Path) -> list[Row]:
    rows = list(read_source(Prepare(source="chat_jsonl", path=str(root / "data" / "sample")), Meter()))
    assert all(isinstance(r, Row) for r in rows), "the project's own data must be clean"
    return [r for r in rows if isinstance(r, Row)]


def test_there_is_enough_of_it(found: dict[str, Any]):
    assert found["pairs"] >= 400
    assert found["prompts without responses"] >= 120
    assert len(found["subsets"]) >= 20
    assert min(found["subsets"].values()) >= 25
    assert found["multi-turn share"] >= 0.12


def test_length_does_not_give_the_answer_away(found: dict[str, Any]):
    assert 0.45 <= found["length-only accuracy (words)"].share <= 0.60
    assert 0.45 <= found["length-only accuracy (characters)"].share <= 0.60
    assert found["mean words, rejected"] == pytest.approx(found["mean words, chosen"], rel=0.05)


def test_single_words_do_not_give_the_answer_away(found: dict[str, Any]):
    assert found["bag-of-words accuracy"].share <= 0.85


def test_nothing_comes_twice(root: Path, check: ModuleType, found: dict[str, Any], rows: list[Row]):
    assert found["first user turns that come twice"] == 0
    assert check.broken(found) == []
    responses = [text for row in rows for text in (*row.chosen, *row.rejected)]
    assert check.near_duplicates(responses, 0.25) == []
    assert check.near_duplicates([check.prompt_text({"messages": r.messages}) for r in rows], 0.35) == []


def test_every_row_has_one_of_each_or_neither(rows: list[Row]):
    kinds = Counter((len(r.chosen), len(r.rejected)) for r in rows)
    assert set(kinds) == {(1, 1), (0, 0)}


def test_it_is_plain_text_without_markup(root: Path):
    text = "".join(p.read_text(encoding="utf-8") for p in sorted((root / "data" / "sample").glob("*.jsonl")))
    for mark in ("<|", "</", "http", "```", "\\n- ", "**", "\u2019", "\u201c"):
        assert mark not in text, mark


def test_topics_are_mixed_throughout_the_files(root: Path):
    lines = (root / "data" / "sample" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    subsets = [json.loads(line)["subset"] for line in lines]
    assert all(len(set(subsets[i : i + 100])) >= 20 for i in range(0, 600, 100))


def test_the_card_gives_the_figures_of_the_data(root: Path, found: dict[str, Any]):
    card = (root / "data" / "README.md").read_text(encoding="utf-8")
    for figure in (
        f"{found['pairs']} preference pairs",
        f"{found['prompts without responses']} prompts",
        f"{found['length-only accuracy (words)'].share:.1%}",
        f"{found['bag-of-words accuracy'].share:.1%}",
        f"{found['multi-turn share']:.1%}",
    ):
        assert figure in card, figure


def test_the_check_finds_what_it_is_there_to_find(check: ModuleType):
    """Two pairs told apart by length, one response twice in nearly the same words."""
    pairs = [{"chosen": "a b c", "rejected": "a"}, {"chosen": "a b c d", "rejected": "a b"}]
    assert check.length_only(pairs).share == 1
    assert check.length_only([{"chosen": "a", "rejected": "b"}]).share == 0.5
    texts = ["one two three four five six", "one two three four five seven", "quite another text here"]
    # 3-grams: 4 each, 3 of them in common, 5 in all.
    assert check.near_duplicates(texts, 0.3) == [(3 / 5, 0, 1)]
    low, high = check.Rate(0.5, 100).interval
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    low, high = check.LENGTH_ONLY
    found = {
        "pairs": 10, "prompts without responses": 500, "length-only accuracy (words)": check.Rate(high + 0.01, 10),
        "length-only accuracy (characters)": check.Rate(low, 10), "bag-of-words accuracy": check.Rate(0.9, 10),
        "first user turns that come twice": 1, "nearest prompts": [(0.6, 0, 1)], "nearest responses": [],
    }  # fmt: skip
    assert len(check.broken(found)) == 5
