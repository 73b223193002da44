"""Artifacts: whole or absent, shards kept over a crash, rows reconciled, damage seen."""

import json
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from clha.errors import StageFailure, UserError
from clha.schema import PROMPTS
from clha.store import ArtifactWriter, Busy, Home, kind_of, read_parquet, write_atomic, write_parquet_atomic

KEY = "0123456789abcdef01234567"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def prompt(i: int) -> dict:
    return {
        "prompt_id": f"{i:032x}",
        "source": "s",
        "subset": "x",
        "split": "train",
        "messages": [{"role": "user", "content": f"question {i}"}],
        "chosen": ["yes"],
        "rejected": [],
    }


def finish(writer: ArtifactWriter, **rows):
    return writer.finish(**rows, facts={"inputs": {}, "settings": {}, "code_version": 1, "versions": {}})


def test_kind_of_a_node_is_its_name_without_round_and_role():
    assert kind_of("prepare") == "prepare"
    assert kind_of("fit_reward.train") == "fit_reward"
    assert kind_of("round-2/answers.trained") == "answers"


def test_an_artifact_appears_only_when_it_is_finished_and_leaves_no_work_behind(home: Home):
    writer = ArtifactWriter(home, "prepare", KEY)
    writer.write_shard("prompts", 0, [prompt(0), prompt(1)], PROMPTS)
    assert home.find("prepare", KEY) is None
    artifact = finish(writer, rows_in=2, rows_out=2)
    assert home.find("prepare", KEY).content == artifact.content
    assert [r["prompt_id"] for r in artifact.rows("prompts")] == [f"{i:032x}" for i in range(2)]
    assert not [p for p in home.work.rglob("*") if p.is_file()]


def test_a_second_writer_finds_finished_shards_and_removes_left_over_and_damaged_ones(home: Home):
    first = ArtifactWriter(home, "prepare", KEY)
    first.write_shard("prompts", 0, [prompt(0)], PROMPTS)
    first.write_shard("prompts", 1, [prompt(1)], PROMPTS)
    first.write_shard("prompts", 2, [prompt(2)], PROMPTS)
    (first.folder / ".tmp-1-prompts-00003.parquet").write_bytes(b"half")
    cut = first.shard_path("prompts", 1)
    cut.write_bytes(cut.read_bytes()[:-20])
    first.shard_path("prompts", 2).write_bytes(b"")
    second = ArtifactWriter(home, "prepare", KEY)
    assert [second.has_shard("prompts", i) for i in range(4)] == [True, False, False, False]
    assert sorted(p.name for p in second.folder.iterdir()) == ["prompts-00000.parquet"]


def test_a_flipped_bit_in_the_data_of_a_shard_is_found(tmp_path: Path):
    path = tmp_path / "t.parquet"
    write_parquet_atomic(path, pa.table({"x": [f"value {i * 7919 % 1000}" for i in range(5000)]}))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StageFailure, match="damaged"):
        read_parquet(path)


def test_rows_that_do_not_add_up_are_an_error_and_nothing_is_published(home: Home):
    writer = ArtifactWriter(home, "prepare", KEY)
    writer.write_quarantine(0, [{"prompt_id": None, "reason": "empty_prompt", "detail": "line 3"}])
    writer.write_shard("prompts", 0, [prompt(0)], PROMPTS)
    with pytest.raises(StageFailure, match="3 rows in, but 1 out and 1 quarantined"):
        finish(writer, rows_in=3, rows_out=1)
    assert home.find("prepare", KEY) is None
    artifact = finish(writer, rows_in=2, rows_out=1)
    assert artifact.manifest["quarantined"] == {"empty_prompt": 1}


@pytest.mark.parametrize("harm", ["remove", "cut", "manifest"])
def test_a_damaged_artifact_is_not_found_and_can_be_written_again(home: Home, harm: str):
    writer = ArtifactWriter(home, "prepare", KEY)
    writer.write_shard("prompts", 0, [prompt(0)], PROMPTS)
    artifact = finish(writer, rows_in=1, rows_out=1)
    shard = artifact.shards("prompts")[0]
    if harm == "remove":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(b"PAR1")
    else:
        (artifact.folder / "manifest.json").write_text('{"kind": "prepare", "ke')
    assert home.find("prepare", KEY) is None
    again = ArtifactWriter(home, "prepare", KEY)
    again.write_shard("prompts", 0, [prompt(0)], PROMPTS)
    assert finish(again, rows_in=1, rows_out=1).content == artifact.content
    assert home.find("prepare", KEY) is not None


def test_deep_damage_is_seen_where_only_bytes_changed(home: Home):
    writer = ArtifactWriter(home, "x", KEY)
    writer.write_bytes("a.txt", b"hello")
    artifact = finish(writer, rows_in=0, rows_out=0)
    (artifact.folder / "a.txt").write_bytes(b"hullo")
    assert artifact.damage() is None
    assert "a.txt" in artifact.damage(deep=True)


def test_content_is_the_same_for_the_same_data_and_ignores_records_of_the_making(home: Home):
    contents = []
    for key, note in ((KEY, b"took 3 s"), (KEY[::-1], b"took 4 s")):
        writer = ArtifactWriter(home, "train", key)
        writer.write_bytes("model/model.safetensors", b"weights")
        writer.write_bytes("model/README.md", note)
        contents.append(finish(writer, rows_in=0, rows_out=0).content)
    assert contents[0] == contents[1]


def test_write_atomic_keeps_the_old_file_when_writing_fails(tmp_path: Path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def _hold(root: str, ready: "multiprocessing.synchronize.Event") -> None:
    with Home(Path(root)).lock("a"):
        ready.set()
        import time

        time.sleep(60)


def test_a_lock_excludes_others_and_dies_with_its_owner(home: Home):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(str(home.root), ready))
    owner.start()
    assert ready.wait(30)
    with pytest.raises(Busy, match="another process"), home.lock("a"):
        pass
    owner.kill()
    owner.join()
    with home.lock("a", wait_seconds=5):
        pass


def test_a_home_that_cannot_be_made_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="CLHA_HOME"):
        Home(tmp_path / "file" / "home").create()


def test_too_little_disk_is_one_clear_line(home: Home):
    with pytest.raises(UserError, match="GB free"):
        home.check_free_disk(1e9, "train", "k")


def test_what_an_earlier_attempt_left_counts_as_free_disk(home: Home, monkeypatch: pytest.MonkeyPatch):
    checkpoint = home.work / "train" / "k" / "scratch" / "checkpoint-1" / "weights"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(bytes(3000))
    monkeypatch.setattr("clha.store.shutil.disk_usage", lambda place: SimpleNamespace(free=2000))
    home.check_free_disk(5e-6, "train", "k")
    with pytest.raises(UserError, match="GB free"):
        home.check_free_disk(5e-6, "train", "another")


def test_file_digests_are_remembered_until_the_file_changes(home: Home, tmp_path: Path):
    file = tmp_path / "w.bin"
    file.write_bytes(b"one")
    first = home.digests.of(file)
    assert home.digests.of(file) == first
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert home.digests.of(file) != first


def test_manifest_lists_every_file_with_rows_size_and_digest(home: Home):
    writer = ArtifactWriter(home, "prepare", KEY)
    writer.write_shard("prompts", 0, [prompt(0)], PROMPTS)
    writer.write_bytes("card.json", b"{}")
    artifact = finish(writer, rows_in=1, rows_out=1)
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert {f["name"]: f["rows"] for f in manifest["files"]} == {"card.json": None, "prompts-00000.parquet": 1}
    assert all(len(f["sha256"]) == 64 and f["bytes"] > 0 for f in manifest["files"])
