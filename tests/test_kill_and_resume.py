"""A stage that is killed goes on where it stopped and ends with the same tables as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from chains import ROOT, artifact_folder, clha, clha_command, environment, file_digests, referee, run_file

# stage, node, kind of the artifact that grows, what appears under work/<kind>/*/ when some of the work is done
CASES = [
    pytest.param("prepare", "prepare", "prepare", "artifact/prompts-*.parquet", id="prepare", marks=pytest.mark.slow),
    pytest.param(
        "fit_reward",
        "fit_reward.train",
        "features",
        "artifact/features-*.parquet",
        id="fit_reward",
        marks=pytest.mark.slow,
    ),
    pytest.param("generate", "generate", "generate", "artifact/candidates-*.parquet", id="generate"),
    pytest.param("rescore", "score", "score", "artifact/rewards-*.parquet", id="score", marks=pytest.mark.slow),
    pytest.param("train", "train", "train", "scratch/**/checkpoint-*", id="train", marks=pytest.mark.slow),
    pytest.param(
        "evaluate", "answers.trained", "answers", "artifact/answers-*.parquet", id="answers", marks=pytest.mark.slow
    ),
    pytest.param("evaluate", "evaluate", "evaluate", "scratch/*.parquet", id="evaluate", marks=pytest.mark.slow),
]


def grown_folder(home: Path, node: str, kind: str) -> Path:
    """The artifact of the node, or the features that it was made from."""
    folder = artifact_folder(home, "smoke", node)
    if kind != "features":
        return folder
    return home / "artifacts" / kind / json.loads((folder / "manifest.json").read_text())["features"]


def kill_when_some_work_is_done(home: Path, stage: str, kind: str, pattern: str) -> list[str]:
    """Start a stage, SIGKILL its processes as soon as a file matches; returns what was there then."""
    parent = subprocess.Popen(
        clha_command("run-stage", stage, "--run", "smoke"),
        cwd=ROOT,
        env=environment(home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    done: list[Path] = []
    while not done and time.monotonic() < deadline and parent.poll() is None:
        done = [p for p in (home / "work" / kind).glob(f"*/{pattern}") if not p.name.startswith(".tmp")]
        time.sleep(0.002)
    children = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
    for process in children:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    parent.kill()
    parent.wait()
    psutil.wait_procs(children, timeout=10)
    return sorted(str(p) for p in (home / "work" / kind).glob(f"*/{pattern}"))


def done_and_whole(partial: list[str], finished: Path, node: str, kind: str, pattern: str) -> tuple[int, int]:
    """How far the killed stage had come, and how far the finished run of `finished` went: steps, rewards or shards."""
    if kind == "train":
        steps = pq.read_table(artifact_folder(finished, "smoke", node) / "metrics-00000.parquet")["step"]
        return max(int(Path(p).name.removeprefix("checkpoint-")) for p in partial), max(steps.to_pylist())
    if kind == "evaluate":
        answers = [artifact_folder(finished, "smoke", f"answers.{policy}") for policy in ("base", "trained")]
        tables = [p for folder in answers for p in folder.glob("answers-*.parquet")]
        rows, wanted = (sum(pq.read_metadata(p).num_rows for p in paths) for paths in (partial, tables))
        return rows, 2 * wanted  # by two reward models
    return len(partial), len(list(grown_folder(finished, node, kind).glob(pattern.removeprefix("artifact/"))))


@pytest.mark.parametrize(("stage", "node", "kind", "pattern"), CASES)
def test_a_killed_stage_goes_on_and_ends_with_the_same_tables(
    smoke_home: Path, smoke_copy: Path, stage: str, node: str, kind: str, pattern: str, request: pytest.FixtureRequest
):
    grown = {grown_folder(smoke_copy, node, kind), artifact_folder(smoke_copy, "smoke", node)}
    for folder in grown:
        shutil.rmtree(folder)
    partial = kill_when_some_work_is_done(smoke_copy, stage, kind, pattern)
    assert partial, "the stage was over, or dead, before any work was seen"
    assert not any(folder.exists() for folder in grown), "all work was done before the kill"
    done, whole = done_and_whole(partial, smoke_home, node, kind, pattern)
    assert 0 < done < whole, "all was there: only the manifest was missing"
    kept = {p: os.stat(p).st_mtime_ns for p in partial if Path(p).suffix == ".parquet" and "/artifact/" in p}

    clha(smoke_copy, "run", "--profile", "smoke", "--run", "smoke")

    assert run_file(smoke_copy, "smoke")["nodes"] == run_file(smoke_home, "smoke")["nodes"]
    compared = ("model/model", "metrics-") if node == "train" else ("",)
    after, before = (file_digests(h, "smoke", node, beginning=compared) for h in (smoke_copy, smoke_home))
    if node == "train":  # the metrics hold speeds; their steps are compared, the weights bit for bit
        after.pop("metrics-00000.parquet"), before.pop("metrics-00000.parquet")
    assert after == before
    folder = grown_folder(smoke_copy, node, kind)
    for path, modified in kept.items():
        assert (folder / Path(path).name).stat().st_mtime_ns == modified, "a finished shard was written again"
    assert not [p for p in (smoke_copy / "work").rglob("*") if p.is_file()]
    if (ROOT.parent / "shared").is_dir():
        referee(request.getfixturevalue("shared"), smoke_copy, "smoke")
