"""What the Prefect UI is given about noise: pairs whose texts stay texts, and reliability by bins."""

import json
from typing import Any

import pytest
from fabricated import HOSTILE, Fabricated
from markdown_it import MarkdownIt
from markdown_it.token import Token

from clha.reporting import noise_tables
from clha.reporting.noise_tables import NoiseTables, _bins
from clha.reporting.text import literal, unmarked
from clha.stages.report import noise_tables_of_run

MARKUP = (
    "[click](javascript:alert(1)) ![x](http://tracker.example/x.png) <https://a.example> https://b.example a@b.example",
    "`code` **bold** _it_ ~~gone~~ | another cell | # no heading\n\n# nor this\n\n---\n- [ ] task\n> quote",
    "<img src=x onerror=alert(1)> &lt;b&gt; &amp; \\\\ \\[x] [^1] [ref]: http://c.example $x$ <!-- --> {{ 7 }}",
)
PLAIN = {"table", "thead", "tbody", "tr", "th", "td", "heading", "inline"}


@pytest.fixture(scope="module")
def tables(made: Fabricated) -> NoiseTables:
    return noise_tables_of_run(made.home, made.run)


def parsed(markdown: str) -> list[Token]:
    """All tokens, inline ones too, as a reader of tables, strikethrough and HTML sees them."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown)
    return [t for token in tokens for t in (token, *(token.children or ()))]


def kinds(markdown: str) -> set[str]:
    return {t.type.removesuffix("_open").removesuffix("_close") for t in parsed(markdown)}


@pytest.mark.parametrize("text", [*MARKUP, *HOSTILE])
def test_a_text_in_a_table_is_shown_and_does_nothing(text: str) -> None:
    markdown = f"| a | b |\n|---|---|\n| {unmarked(literal(text))} | end |"
    assert kinds(markdown) <= PLAIN | {"text", "text_special"}
    cells = [t for t in parsed(markdown) if t.type == "inline"]
    said = ["".join(c.content for c in cell.children or ()) for cell in cells]
    assert said == ["a", "b", " ".join(literal(text).split()), "end"]


def test_the_least_and_most_trusted_pairs_are_two_tables_of_ten_with_nothing_but_text(
    tables: NoiseTables,
) -> None:
    assert kinds(tables.pairs) <= PLAIN | {"text", "text_special"}
    tokens = parsed(tables.pairs)
    titles = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert titles == ["Least trusted pairs", "Most trusted pairs"]
    assert sum(t.type == "tr_open" for t in tokens) == 2 * (1 + 10) and sum(t.type == "td_open" for t in tokens) == 120
    assert max(len(line) for line in tables.pairs.splitlines()) < 2500
    assert not any(c in tables.pairs for c in "\x00\x07\x1b\u202e")


def test_responses_are_cut_and_the_rest_is_counted(made: Fabricated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_tables, "RESPONSE_LIMIT", 5)
    texts = [t.content for t in parsed(noise_tables_of_run(made.home, made.run).pairs) if t.type == "inline"]
    responses = [t for t in texts if "reward " in t]
    assert len(responses) == 40 and all("more characters" in t for t in responses)


def test_reliability_has_a_row_for_each_bin_that_holds_something_before_or_after(
    made: Fabricated, tables: NoiseTables
) -> None:
    fit = json.loads((made.nodes["fit_reward.train"].folder / "fit.json").read_text())
    counts = {
        when: sum(int(str(r[f"n {when}"]).replace(",", "")) for r in tables.reliability) for when in ("before", "after")
    }
    assert counts == {"before": 2 * fit["pairs"], "after": 2 * fit["pairs"]}, "each pair in both orders"
    assert {r["of"] for r in tables.reliability} == {"reward model"}
    json.dumps(tables.reliability)


def test_bins_before_and_after_stand_side_by_side() -> None:
    """Before: p of 0.31 and 0.69; after: 0.05 and 0.95."""
    calibration: dict[str, Any] = {
        "reliability_before": {"predicted": [0.31, 0.69], "observed": [0.1, 0.9], "weight": [3.0, 3.0]},
        "reliability": {"predicted": [0.05, 0.95], "observed": [0.1, 0.9], "weight": [2.5, 2.5]},
    }
    rows = _bins("labels", calibration)
    assert [r["bin"] for r in rows] == ["0% to 10%", "30% to 40%", "60% to 70%", "90% to 100%"]
    assert rows[0] == {
        "of": "labels", "bin": "0% to 10%", "predicted before": "–", "observed before": "–", "n before": "0",
        "predicted after": "5.0%", "observed after": "10.0%", "n after": "2.5",
    }  # fmt: skip
    assert (rows[1]["predicted before"], rows[1]["n before"], rows[1]["n after"]) == ("31.0%", "3", "0")
