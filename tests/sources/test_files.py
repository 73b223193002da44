"""Which files a source is, and that its digest is its content."""

import shutil
from pathlib import Path

import pytest

from clha.errors import UserError
from clha.settings import Prepare
from clha.sources.files import hub_reference, local_files, source_digest, source_paths
from clha.sources.lines import Meter
from clha.sources.reading import read_source
from clha.sources.rows import Row
from clha.store import Home


def test_one_path_and_several_are_a_list():
    assert source_paths(Prepare(source="trl", path="a")) == ["a"]
    assert source_paths(Prepare(source="trl", path=["b", "a"])) == ["b", "a"]


def test_a_folder_is_its_files_sorted_without_hidden_ones(tmp_path: Path):
    for name in ("b.jsonl", "a/c.jsonl", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert local_files(str(tmp_path)) == [tmp_path / "a/c.jsonl", tmp_path / "b.jsonl"]


@pytest.mark.parametrize("name", ["missing.jsonl", "empty"])
def test_nothing_there_is_said_in_one_line(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"no file at .*{name}; give the path of the data"):
        local_files(str(tmp_path / name))


def test_the_digest_is_the_content_and_not_the_place(tmp_path: Path):
    home = Home(tmp_path / "home").create()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.jsonl").write_text("1\n")
    first, second = (source_digest(Prepare(source="trl", path=str(tmp_path / p)), home) for p in ("one", "two"))
    assert first == second
    (tmp_path / "two" / "a.jsonl").write_text("2\n")
    assert source_digest(Prepare(source="trl", path=str(tmp_path / "two")), home) != first
    # The name of a file is its default subset, so it belongs to the content.
    shutil.move(tmp_path / "one" / "a.jsonl", tmp_path / "one" / "b.jsonl")
    assert source_digest(Prepare(source="trl", path=str(tmp_path / "one")), home) != first


def test_a_name_that_enters_the_rows_belongs_to_the_content(tmp_path: Path):
    """`datasets` names rows after the folder or Hub dataset itself, so another name is another source."""
    home = Home(tmp_path / "home").create()
    for place in ("one", "two", "elsewhere/one"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jsonl").write_text('{"prompt": "x"}\n')

    def read(path: str) -> tuple[set[tuple[str, str]], str]:
        prepare = Prepare(source="datasets", path=path)
        rows = [row for row in read_source(prepare, Meter()) if isinstance(row, Row)]
        return {(row.source, row.subset) for row in rows}, source_digest(prepare, home)

    one, two, moved = (read(str(tmp_path / place)) for place in ("one", "two", "elsewhere/one"))
    assert one[0] == {("one", "one")} and two[0] == {("two", "two")}
    assert one == moved and one[1] != two[1]
    commit = "0123456789" * 4
    first, renamed = (source_digest(Prepare(source="datasets", path=f"hub:{n}@{commit}"), home) for n in ("a/b", "a/c"))
    assert first != renamed


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hub:Anthropic/hh-rlhf", ("Anthropic/hh-rlhf", None, "main")),
        ("hub:Anthropic/hh-rlhf@v1.0", ("Anthropic/hh-rlhf", None, "v1.0")),
        ("hub:Anthropic/hh-rlhf/harmless-base", ("Anthropic/hh-rlhf", "harmless-base", "main")),
        ("hub:Anthropic/hh-rlhf/a/b@refs/pr/3", ("Anthropic/hh-rlhf", "a/b", "refs/pr/3")),
    ],
)
def test_a_hub_path_names_dataset_folder_and_revision(path: str, expected: tuple[str, str | None, str | None]):
    assert hub_reference(path, "main") == expected


@pytest.mark.parametrize("path", ["hub:", "hub:name", "hub:a/b@", "hub:a b/c", "hub:a/b c"])
def test_a_hub_path_that_is_none_is_refused(path: str):
    with pytest.raises(UserError, match="must be hub:owner/name"):
        hub_reference(path, None)


def test_a_commit_needs_no_network_and_anything_else_says_what_to_do(tmp_path: Path):
    home = Home(tmp_path / "home").create()
    commit = "0123456789" * 4
    pinned = Prepare(source="datasets", path=f"hub:a/b@{commit}")
    assert source_digest(pinned, home) == source_digest(
        Prepare(source="datasets", path="hub:a/b", revision=commit), home
    )
    with pytest.raises(UserError, match="set prepare.revision to a commit that is cached"):
        source_digest(Prepare(source="datasets", path="hub:a/b"), home)
