"""prepare: from a source to the table `prompts`, whatever the source holds."""

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clha.config import settings_from
from clha.digests import canonical_json
from clha.errors import UserError
from clha.progress import Progress
from clha.runs import Run, save_run
from clha.schema import PROMPTS, SPLITS
from clha.sources import merging
from clha.stages.chain import nodes, plan_node
from clha.stages.child import build_node
from clha.store import Artifact, Home

HALVES = ("prepare.splits={train: 0.5, dev: 0.1, test: 0.4, reward_train: 0, reward_eval: 0}",)


def planned(home: Home, source: str, path: object, *overrides: str, fit: bool = False) -> str:
    """Save run `r` with these settings; returns the key of its node `prepare`."""
    tree: dict[str, Any] = {"policy": {"model": "no-model"}, "prepare": {"source": source, "path": str(path)}}
    if fit:
        tree["fit_reward"] = {"train": {"encoder": "no-model"}, "eval": {"encoder": "no-model"}}
    else:
        given = {"type": "sequence_classification", "model": "no-model"}
        tree |= {"rescore": {"reward": given}, "evaluate": {"reward": given}}
    settings = settings_from(tree, overrides, where="test")
    run = Run("r", "test", settings.model_dump(mode="json"))
    save_run(home, run)
    key = plan_node(home, run, settings, nodes(settings)[0], {}).key
    assert key is not None
    return key


def build(
    home: Home, source: str, path: object, *overrides: str, fit: bool = False, log: list[str] | None = None
) -> Artifact:
    key = planned(home, source, path, *overrides, fit=fit)
    events = Progress((lambda e: log.append(e.get("message", ""))) if log is not None else None)
    return build_node(home, "r", "prepare", key, events)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


def chat(text: str, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return file


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """200 prompts, every second one with a pair."""
    rows = [
        chat(f"Question {i}?", **({"chosen": f"good {i}", "rejected": f"bad {i}"} if i % 2 else {})) for i in range(200)
    ]
    return write(tmp_path / "pairs.jsonl", *rows)


def test_the_table_is_what_the_contract_says(home: Home, pairs: Path):
    artifact = build(home, "chat_jsonl", pairs, fit=True)
    table = artifact.read("prompts")
    assert table.schema.equals(PROMPTS)
    rows = table.to_pylist()
    ids = [hashlib.sha256(canonical_json(r["messages"]).encode()).hexdigest()[:32] for r in rows]
    assert [r["prompt_id"] for r in rows] == ids
    assert len(set(ids)) == 200
    assert {r["split"] for r in rows} == {"train", "dev", "test", "reward_train", "reward_eval"}
    assert all(r["chosen"] and r["rejected"] for r in rows if r["split"].startswith("reward"))
    assert [r["messages"][0]["content"] for r in rows] == [f"Question {i}?" for i in range(200)], "the source's order"


def test_real_data_is_reconciled_row_by_row(home: Home, shared: Path):
    """1,799 rows: 42 quarantined, one prompt comes twice, so 1,756 prompts; no first turn in two splits."""
    log: list[str] = []
    artifact = build(home, "hh_rlhf", shared / "hh-rlhf" / "harmless-base.jsonl.gz", fit=True, log=log)
    m = artifact.manifest
    assert (m["source_rows"], m["rows_quarantined"], m["merged_rows"], m["rows_out"]) == (1799, 42, 1, 1756)
    assert m["rows_in"] == 1756 + 42
    assert m["quarantined"] == {"stray_marker": 31, "parted_early": 5, "empty_response": 3, "role_order": 3}
    assert any(line.startswith("quarantined: stray_marker 31 (first: harmless-base.jsonl.gz line ") for line in log)
    rows = artifact.rows("prompts")
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["messages"][0]["content"], set()).add(row["split"])
    assert all(len(s) == 1 for s in splits.values())
    assert len(splits) < len(rows), "some first turns are shared"
    assert m["splits"] == dict(Counter(r["split"] for r in rows))
    assert len(artifact.rows("quarantine")) == 42


def test_the_same_data_elsewhere_is_the_same_artifact(tmp_path: Path, home: Home, pairs: Path):
    first = build(home, "chat_jsonl", pairs, *HALVES)
    (tmp_path / "elsewhere").mkdir()
    moved = pairs.rename(tmp_path / "elsewhere" / "pairs.jsonl")
    assert planned(home, "chat_jsonl", moved, *HALVES) == first.key
    again = build(Home(tmp_path / "other").create(), "chat_jsonl", moved, *HALVES)
    assert again.key == first.key
    assert again.content == first.content


def test_more_data_moves_no_prompt_to_another_split(tmp_path: Path, home: Home, pairs: Path):
    before = {r["prompt_id"]: r["split"] for r in build(home, "chat_jsonl", pairs, fit=True).rows("prompts")}
    more = write(tmp_path / "more.jsonl", *(chat(f"New {i}?", chosen="a", rejected="b") for i in range(100)))
    more.write_text(more.read_text() + pairs.read_text())
    after = {r["prompt_id"]: r["split"] for r in build(home, "chat_jsonl", more, fit=True).rows("prompts")}
    assert before.items() <= after.items()


def test_text_is_kept_to_the_byte(tmp_path: Path, home: Home):
    texts = [
        "<|im_end|>\n<|im_start|>system",
        "<script>alert(1)</script>",
        " lead",
        "trail \n",
        "\u0000",
        "e\u0301 \U0001f600",
    ]
    data = write(
        tmp_path / "d.jsonl", *(chat(t, chosen=t + "1", rejected=t + "2") for t in texts * 1), *map(chat, "abcdef")
    )
    splits = "prepare.splits={train: 0.5, dev: 0, test: 0.5, reward_train: 0, reward_eval: 0}"
    rows = build(home, "chat_jsonl", data, splits).rows("prompts")
    assert [r["messages"][0]["content"] for r in rows][:6] == texts
    assert [(r["chosen"], r["rejected"]) for r in rows][:6] == [([t + "1"], [t + "2"]) for t in texts]


def test_a_limit_changes_the_content_of_its_own_split_only(home: Home, pairs: Path):
    whole = build(home, "chat_jsonl", pairs, fit=True)
    fewer = build(home, "chat_jsonl", pairs, "prepare.limits={train: 5}", "prepare.shard_size=7", fit=True)
    before, after = whole.manifest["split_contents"], fewer.manifest["split_contents"]
    assert before.keys() == after.keys() == set(SPLITS)
    assert {split for split in before if before[split] != after[split]} == {"train"}
    assert whole.content_of(("dev", "test")) == {"dev": before["dev"], "test": before["test"]}
    assert whole.content_of(()) == whole.content != fewer.content
    rows = [r for r in fewer.rows("prompts") if r["split"] == "train"]
    text = "".join(canonical_json(r) + "\n" for r in rows)
    assert after["train"] == hashlib.sha256(text.encode()).hexdigest()


def test_limits_leave_out_and_say_so(home: Home, pairs: Path):
    whole = build(home, "chat_jsonl", pairs, *HALVES).manifest
    artifact = build(home, "chat_jsonl", pairs, *HALVES, "prepare.limits.train=10", "prepare.limits.test=5")
    m = artifact.manifest
    assert (m["splits"]["train"], m["splits"]["test"]) == (10, 5)
    assert m["dropped_by_limits"] == {"train": whole["splits"]["train"] - 10, "test": whole["splits"]["test"] - 5}
    assert m["rows_in"] == m["rows_out"] == 10 + 5 + whole["splits"]["dev"]


def test_shards_hold_as_many_prompts_as_set(home: Home, pairs: Path):
    artifact = build(home, "chat_jsonl", pairs, *HALVES, "prepare.shard_size=64")
    assert [f["rows"] for f in artifact.manifest["files"]] == [64, 64, 64, 8]
    one = build(home, "chat_jsonl", pairs, *HALVES)
    assert artifact.rows("prompts") == one.rows("prompts")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "no rows in .*pairs.jsonl; give data with prepare.path"),
        (("", "   "), "no rows in"),
        (("{",), r"1 of 1 rows are bad \(most: malformed_json, first: pairs.jsonl line 1: not valid JSON"),
        ((chat("a"), chat("b"), '{"messages": ['), r"1 of 3 rows are bad .*first: pairs.jsonl line 3: not valid JSON"),
        ((chat("a"), {"prompt": "b"}, 7), r"2 of 3 rows are bad \(most: (missing_field|not_an_object), first: .* line"),
    ],
)
def test_bad_data_is_one_clear_line_and_no_artifact(tmp_path: Path, home: Home, rows: tuple[object, ...], message: str):
    data = write(tmp_path / "pairs.jsonl", *rows)
    with pytest.raises(UserError, match=message) as caught:
        build(home, "chat_jsonl", data, *HALVES)
    assert "\n" not in str(caught.value)
    assert not home.artifacts.exists()
    assert not list(home.work.rglob("rows.sqlite*")), "nothing to go on from"


def test_all_rows_bad_is_an_error_even_where_bad_rows_are_allowed(tmp_path: Path, home: Home):
    data = write(tmp_path / "pairs.jsonl", "{", "{")
    with pytest.raises(UserError, match="none of the 2 rows can be used"):
        build(home, "chat_jsonl", data, *HALVES, "prepare.max_quarantined=1")


def test_a_few_bad_rows_are_quarantined_and_the_rest_goes_on(tmp_path: Path, home: Home, pairs: Path):
    bad = ["{", chat("", chosen="a", rejected="b"), chat("x", chosen="a", rejected="a"), '{"messages": 1}', '"\ud800"']
    data = tmp_path / "mixed.jsonl"
    data.write_bytes(
        b"\xff\n"
        + b"".join(
            json.dumps(b).encode() + b"\n" if not isinstance(b, str) else b.encode("utf-8", "surrogatepass") + b"\n"
            for b in bad
        )
        + pairs.read_bytes()
    )
    artifact = build(home, "chat_jsonl", data, *HALVES)
    assert artifact.manifest["quarantined"] == {
        "invalid_utf8": 2, "malformed_json": 1, "empty_turn": 1, "same_response": 1, "wrong_type": 1
    }  # fmt: skip
    assert artifact.manifest["rows_in"] == 206
    details = {r["detail"].split(":")[0]: (r["reason"], r["prompt_id"]) for r in artifact.rows("quarantine")}
    assert details["mixed.jsonl line 1"] == ("invalid_utf8", None)
    same = hashlib.sha256(canonical_json(chat("x")["messages"]).encode()).hexdigest()[:32]
    assert details["mixed.jsonl line 4"] == ("same_response", same)


def test_a_missing_file_is_said_before_anything_is_made(tmp_path: Path, home: Home):
    with pytest.raises(UserError, match=r"no file at .*missing.jsonl; give the path of the data"):
        planned(home, "chat_jsonl", tmp_path / "missing.jsonl")
    assert not home.artifacts.exists()


def test_a_damaged_archive_is_one_clear_line(tmp_path: Path, home: Home, pairs: Path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(pairs.read_bytes())[:-20])
    with pytest.raises(UserError, match=r"cut.jsonl.gz: cannot be read after line \d+"):
        build(home, "chat_jsonl", tmp_path / "cut.jsonl.gz", *HALVES)
    assert not home.artifacts.exists()


@pytest.mark.parametrize(
    ("splits", "fit", "message"),
    [
        ("{train: 1, dev: 0, test: 0, reward_train: 0, reward_eval: 0}", False,
         r"no prompts in split test \(prepare.splits.test = 0, 200 prompts in all\)"),
        ("{train: 0, dev: 0, test: 1, reward_train: 0, reward_eval: 0}", False, "no prompts in split train"),
        ("{train: 0.5, dev: 0, test: 0.5, reward_train: 0, reward_eval: 0.3}", True,
         r"no preference pairs in split reward_train \(prepare.splits.reward_train = 0"),
        ("{train: 0.5, dev: 0, test: 0.5, reward_train: 0.3, reward_eval: 0}", True,
         "no preference pairs in split reward_eval"),
    ],
)  # fmt: skip
def test_an_empty_split_that_is_needed_is_named_with_its_share(
    home: Home, pairs: Path, splits: str, fit: bool, message: str
):
    with pytest.raises(UserError, match=message):
        build(home, "chat_jsonl", pairs, f"prepare.splits={splits}", fit=fit)
    assert not home.artifacts.exists()


def test_a_full_disk_is_the_failure_that_all_stages_report(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch):
    data = write(tmp_path / "d.jsonl", *(chat(f"{i} {'x' * 5000}") for i in range(50)))
    monkeypatch.setattr(merging, "_TABLES", "pragma max_page_count = 20;" + merging._TABLES)
    with pytest.raises(OSError) as caught:
        build(home, "chat_jsonl", data, *HALVES)
    assert caught.value.errno == 28
    assert not home.artifacts.exists()


def test_a_killed_prepare_goes_on_from_its_finished_shards(tmp_path: Path, home: Home, shared: Path):
    source = ("hh_rlhf", shared / "hh-rlhf" / "harmless-base.jsonl.gz", *HALVES, "prepare.shard_size=50")
    whole = build(Home(tmp_path / "whole").create(), *source)
    key = planned(home, *source)
    command = ["--home", str(home.root), "--run", "r", "--node", "prepare", "--key", key]
    child = subprocess.Popen([sys.executable, "-m", "clha.stages.child", *command])
    folder = home.work / "prepare" / key / "artifact"
    while len(list(folder.glob("prompts-*.parquet"))) < 5 and child.poll() is None:
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    done = {p.name: p.stat().st_ino for p in folder.glob("prompts-*.parquet")}
    total = sum(f["name"].startswith("prompts-") for f in whole.manifest["files"])
    assert 0 < len(done) < total, "some but not all shards exist"
    artifact = build(home, *source)
    assert {n: (artifact.folder / n).stat().st_ino for n in done} == done, "finished shards were kept"
    assert [(f["name"], f["sha256"]) for f in artifact.manifest["files"]] == [
        (f["name"], f["sha256"]) for f in whole.manifest["files"]
    ]
    for count in ("rows_in", "rows_out", "merged_rows", "repeated_responses", "contradicted_responses", "splits"):
        assert artifact.manifest[count] == whole.manifest[count], count
    assert not list(home.work.rglob("rows.sqlite*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_rows_need_less_than_four_gigabytes(tmp_path: Path, home: Home):
    """Takes about two minutes: the size is what is tested."""
    draw = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    with open(tmp_path / "big.jsonl", "w") as f:
        for i in range(1_000_000):
            text = " ".join(draw.choices(words, k=40))
            # Every tenth row is a further pair of an earlier prompt.
            first = f"Question {i - 9 if i % 10 == 9 else i}?"
            f.write(json.dumps(chat(first, chosen=text, rejected=text[::-1])) + "\n")
    key = planned(home, "chat_jsonl", tmp_path / "big.jsonl", *HALVES)
    command = ["--home", str(home.root), "--run", "r", "--node", "prepare", "--key", key]
    subprocess.run([sys.executable, "-m", "clha.stages.child", *command], check=True)
    artifact = home.find("prepare", key)
    assert artifact is not None
    assert (artifact.manifest["rows_out"], artifact.manifest["merged_rows"]) == (900_000, 100_000)
    assert len(artifact.shards("prompts")) == 18
    assert artifact.manifest["peak_memory_bytes"] < 4e9
