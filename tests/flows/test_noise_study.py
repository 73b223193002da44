"""`clha noise-study` as a user starts it: tables, taken up after a kill, in Prefect, and one line for mistakes."""

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from chains import ROOT, clha_command, environment, run_file
from flow_cases import Clha, processes_of, write_pairs

from clha.store import Home

SMALL = (
    "--set", "prepare.limits={train: 40, dev: 2, test: 30, reward_train: 60}", "--rates", "0.3", "--seeds", "0",
    "--arms", "clean",
)  # fmt: skip


@pytest.fixture
def on_pairs(tmp_path: Path) -> tuple[str, ...]:
    """Arguments that begin a run on 200 pairs."""
    data = write_pairs(tmp_path / "pairs.jsonl", 200)
    config = ("--config", str(ROOT / "pipelines.yaml"), "--profile", "smoke", "--run", "s")
    return (*config, "--set", "prepare.source=chat_jsonl", "--set", f"prepare.path={data}", *SMALL)


def cells(home: Home) -> dict[Path, int]:
    """Every finished cell and when it was finished."""
    return {p: p.stat().st_mtime_ns for p in home.artifacts.glob("noise_*/*/manifest.json")}


def test_it_prepares_the_data_prints_its_tables_and_a_second_one_makes_nothing(
    command: Clha, home: Home, on_pairs: tuple[str, ...]
):
    arguments = ("noise-study", *on_pairs, "--weights", "none,oracle", "--no-prefect")
    done = command(*arguments)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert "Finding flipped labels" in done.stdout and "│ 30%   │ oracle" in done.stdout
    assert list(run_file(home.root, "s")["nodes"]) == ["prepare"]
    assert run_file(home.root, "s")["settings"]["noise_study"]["rates"] == [0.4], (
        "a study changes no setting of the run"
    )
    results = json.loads((home.reports / "s" / "noise-study.json").read_text())
    assert [t["weights"] for t in results["training"]] == ["before training", "none", "oracle"]
    assert "| 30% | oracle |" in (home.reports / "s" / "noise-study.md").read_text()
    assert processes_of(home.root) == []
    before = cells(home)
    assert len(before) == 4, "detection, the policy before training, training without weights and with the oracle's"
    again = command(*arguments, "--json")
    assert json.loads(again.stdout) == results and cells(home) == before


@pytest.mark.slow
def test_a_study_without_flips_says_what_weights_cost(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    done = command("noise-study", *on_pairs, "--rates", "0", "--weights", "none,calibrated", "--no-prefect", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    (found,) = results["detection"]
    assert (found["rate"], found["auroc"], found["auprc"]) == (0, None, None)
    assert [t["weights"] for t in results["training"]] == ["before training", "none", "calibrated"]
    assert results["training"][2]["gain"]["pairs"] == 30
    table = (home.reports / "s" / "noise-study.md").read_text()
    assert "| 0% | 0 | clean |" in table and "| n/a |" in table and "| 0% | calibrated |" in table


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_cells_that_are_missing(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    arguments = ("noise-study", *on_pairs, "--weights", "none,calibrated,oracle", "--no-prefect")
    study = subprocess.Popen(clha_command(*arguments), cwd=ROOT, env=environment(home.root), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(home.artifacts.glob("noise_training/*/manifest.json")):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(study.pid).children(recursive=True)
    study.kill()
    study.wait()
    psutil.wait_procs(children, timeout=10)
    assert processes_of(home.root) == [], "the child ends with its parent"
    before = cells(home)
    assert 2 <= len(before) < 5
    done = command(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    after = cells(home)
    assert len(after) == 5 and all(after[p] == at for p, at in before.items())
    assert not [p for p in home.work.rglob("*") if p.is_file()]


@pytest.mark.slow
def test_a_study_whose_process_is_killed_is_tried_again(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    retries = ("--set", "execution.retries=1", "--set", "execution.retry_delay_seconds=0")
    arguments = ("noise-study", *on_pairs, *retries, "--weights", "none,oracle", "--no-prefect")
    study = subprocess.Popen(
        clha_command(*arguments), cwd=ROOT, env=environment(home.root), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not cells(home):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(study.pid).children():
        if "clha.stages.noise_study" in child.cmdline():
            child.kill()
    said, _ = study.communicate(timeout=300)
    assert study.returncode == 0 and "killed by signal 9" in said and "again in 0 s (1 of 1)" in said
    assert len(cells(home)) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("home_with_database")
def test_it_appears_in_prefect_with_its_tables(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    done = command("noise-study", *on_pairs, "--weights", "")
    assert done.returncode == 0, done.stdout + done.stderr
    with sqlite3.connect(home.prefect / "prefect.db") as db:
        flows = dict(db.execute("select name, state_name from flow_run").fetchall())
        keys = {key for (key,) in db.execute("select key from artifact")}
        lines = [line for (line,) in db.execute("select message from log")]
    assert flows == {"s noise-study": "Completed"}
    assert {"s-noise-study", "s-noise-study-finding-flipped-labels"} <= keys
    assert any("AUROC" in line for line in lines)
    assert "watch it at" in done.stdout and "Finding flipped labels" in done.stdout


def test_a_second_study_of_a_run_at_the_same_time_is_refused_in_one_line(
    command: Clha, home: Home, on_pairs: tuple[str, ...]
):
    with home.lock("study-s"):
        done = command("noise-study", *on_pairs, "--no-prefect")
    assert done.returncode == 2
    assert done.stderr == ("error: the noise study of run s is in progress in another process; wait for it\n")
    assert cells(home) == {}


def test_an_interrupted_study_ends_its_child(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    study = subprocess.Popen(
        clha_command("noise-study", *on_pairs, "--no-prefect"),
        cwd=ROOT,
        env=environment(home.root),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not any("clha.stages.noise_study" in line for line in processes_of(home.root)):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(study.pid, signal.SIGTERM)
    _, errors = study.communicate(timeout=60)
    assert study.returncode == 143 and errors.count("\n") == 1
    deadline = time.monotonic() + 15  # a child that was about to start ends when it finds its lifeline closed
    while processes_of(home.root) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(home.root) == []


BAD = {
    "no run": (("--run", "nobody"), "no run `nobody`"),
    "unknown arm": (("--profile", "smoke", "--run", "n", "--arms", "dirty"), "noise_study.arms"),
    "too high a rate": (("--profile", "smoke", "--run", "n", "--rates", "0.7"), "noise_study.rates"),
    "no number": (("--profile", "smoke", "--run", "n", "--seeds", "one"), "noise_study.seeds"),
    "a seed twice": (
        ("--profile", "smoke", "--run", "n", "--seeds", "0,0"),
        "noise_study.seeds`: names 0 more than once",
    ),
    "no rate": (
        ("--profile", "smoke", "--run", "n", "--rates", ""),
        "noise_study.rates`: must be a list of at least 1",
    ),
    "bad name": (("--profile", "smoke", "--run", "../n"), "run name '../n'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_begins_no_run(command: Clha, home: Home, case: str):
    arguments, expected = BAD[case]
    done = command("noise-study", "--config", str(ROOT / "pipelines.yaml"), *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr, done.stderr
    assert not list(home.runs.glob("*.json"))


def test_too_few_pairs_and_settings_of_another_stage_are_one_line(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    few = command("noise-study", *on_pairs, "--set", "prepare.limits={train: 5}", "--no-prefect")
    assert few.returncode == 2 and "5 pairs in split train, at least 20 needed" in few.stderr
    assert few.stderr.count("\n") == 1
    other = command("noise-study", "--run", "s", "--set", "prepare.split_seed=3", "--no-prefect")
    assert other.returncode == 2 and "run s has other settings for prepare" in other.stderr


@pytest.mark.slow
def test_a_study_of_the_sample_data_finds_flips_with_the_demo_models(command: Clha, home: Home, smollm2: Path):
    (home.models / smollm2.name).symlink_to(smollm2)
    done = command(
        "noise-study", "--config", str(ROOT / "pipelines.yaml"), "--profile", "demo", "--run", "d", "--no-prefect",
        "--seeds", "0", "--arms", "clean", "--weights", "none,oracle", "--set", "noise_study.train_pairs=32",
        "--set", "noise_study.test_pairs=32", "--set", "noise_study.reward_pairs=120",
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((home.reports / "d" / "noise-study.json").read_text())
    (found,) = results["detection"]
    assert found["auroc"] > 0.6 and found["auroc_interval"][0] <= found["theory_auroc"]
