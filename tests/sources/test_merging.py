"""All rows are accounted for: written, joined, quarantined, or left out by a limit."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clha.digests import prompt_id
from clha.settings import Limits, Splits
from clha.sources.merging import Collected, Merged, collect
from clha.sources.rows import BadRow, Row
from clha.sources.splits import limit_order

ALL_TRAIN = Splits(train=1, dev=0, test=0, reward_train=0, reward_eval=0)


def row(text: str, chosen: list[str] | None = None, rejected: list[str] | None = None, subset: str = "s") -> Row:
    return Row([{"role": "user", "content": text}], chosen or [], rejected or [], "f", subset)


def merge(rows: list[Row | BadRow], folder: Path, splits: Splits = ALL_TRAIN, limits: Limits | None = None) -> Any:
    """(prompts, what was merged, prompts dropped by limits)."""
    database = folder / "rows.sqlite"
    collect(rows, database)
    with closing(Collected(database)) as collected:
        kept, dropped = collected.divide(splits, 0, limits or Limits())
        merged = Merged()
        prompts = list(collected.prompts(0, kept, merged))
        assert collected.good == kept + collected.merged_rows() + sum(dropped.values())
    return prompts, merged, dropped


def test_further_rows_of_a_prompt_join_its_lists_in_order(tmp_path: Path):
    rows: list[Row | BadRow] = [row("a", ["1"], ["2"]), row("b"), row("a", ["3"], ["2", "4"], "other"), row("a")]
    prompts, merged, _ = merge(rows, tmp_path)
    assert [(p["messages"][0]["content"], p["chosen"], p["rejected"], p["subset"]) for p in prompts] == [
        ("a", ["1", "3"], ["2", "4"], "s"),
        ("b", [], [], "s"),
    ]
    assert (merged.repeated, merged.contradicted) == (1, 0)


def test_a_response_on_both_sides_is_taken_out_of_both(tmp_path: Path):
    """1 before 2 and 2 before 3: what is left is 1 before 3. In b the two pairs contradict each other."""
    rows: list[Row | BadRow] = [
        row("a", ["1"], ["2"]),
        row("a", ["2"], ["3"]),
        row("b", ["1"], ["2"]),
        row("b", ["2"], ["1"]),
    ]
    prompts, merged, _ = merge(rows, tmp_path)
    assert [(p["chosen"], p["rejected"]) for p in prompts] == [(["1"], ["3"]), ([], [])]
    assert merged.contradicted == 3


def test_a_limit_keeps_the_smallest_digests_and_a_larger_one_only_adds(tmp_path: Path):
    rows: list[Row | BadRow] = [row(f"q{i}") for i in range(50)]
    kept = []
    for limit in (10, 20):
        prompts, _, dropped = merge(rows, tmp_path, limits=Limits(train=limit))
        assert dropped == {"train": 50 - limit}
        kept.append([p["prompt_id"] for p in prompts])
    ids = [prompt_id(r.messages) for r in rows if isinstance(r, Row)]
    assert sorted(kept[0]) == sorted(sorted(ids, key=limit_order)[:10])
    assert set(kept[0]) < set(kept[1])
    assert kept[1] == [i for i in ids if i in set(kept[1])], "the order of the source"


def test_a_pair_anywhere_in_a_first_turn_moves_all_of_it_to_the_reward_splits(tmp_path: Path):
    splits = Splits(train=1, dev=0, test=0, reward_train=0.99, reward_eval=0)
    long = Row(
        [*row("a").messages, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
        ["1"],
        ["2"],
        "f",
        "s",
    )
    prompts, _, _ = merge([row("a"), long, row("b"), row("c", ["1"])], tmp_path, splits)
    assert [p["split"] for p in prompts] == ["reward_train", "reward_train", "train", "train"]


def test_a_pair_may_come_from_two_rows(tmp_path: Path):
    splits = Splits(train=1, dev=0, test=0, reward_train=0.99, reward_eval=0)
    prompts, _, _ = merge([row("a", ["1"]), row("a", [], ["2"])], tmp_path, splits)
    assert [(p["split"], p["chosen"], p["rejected"]) for p in prompts] == [("reward_train", ["1"], ["2"])]


def test_a_database_appears_when_its_last_row_is_in_it(tmp_path: Path):
    def rows():
        yield row("a")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        collect(rows(), tmp_path / "rows.sqlite")
    assert not (tmp_path / "rows.sqlite").exists()
    collect([row("b")], tmp_path / "rows.sqlite")
    with closing(Collected(tmp_path / "rows.sqlite")) as collected:
        assert collected.good == 1, "nothing of the first attempt is left"


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=3)
ROWS = st.one_of(
    st.builds(row, TEXT, st.lists(TEXT, max_size=2, unique=True)),
    st.builds(BadRow, st.sampled_from(["x", "y"]), TEXT),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ROWS, max_size=30), st.integers(1, 5))
def test_no_row_is_lost_whatever_comes(tmp_path_factory: pytest.TempPathFactory, rows: list[Row | BadRow], limit: int):
    folder = tmp_path_factory.mktemp("merge")
    splits = Splits(train=0.5, dev=0.2, test=0.3)
    prompts, _, dropped = merge(rows, folder, splits, Limits(train=limit))
    good = [r for r in rows if isinstance(r, Row)]
    ids = {prompt_id(r.messages) for r in good}
    assert len(prompts) + sum(dropped.values()) == len(ids)
    assert {p["prompt_id"] for p in prompts} <= ids
    assert all(p["prompt_id"] == prompt_id(p["messages"]) for p in prompts)
    with closing(Collected(folder / "rows.sqlite")) as collected:
        assert collected.bad == len(rows) - len(good)
        assert [b["detail"] for b in collected.bad_rows(0, 100)] == [r.detail for r in rows if isinstance(r, BadRow)]
        assert sum(n for _, n, _ in collected.bad_reasons()) == collected.bad
