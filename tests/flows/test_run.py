"""`clha run` as a user starts it: in Prefect, a second time, interrupted, killed, with a server that goes away."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from chains import clha_command, environment, run_file
from flow_cases import Clha, files_below, hear_interrupts, processes_of, write_pairs

from clha.store import Home
from flows import server


def flow_runs(home: Home) -> dict[str, str]:
    """name -> state of the flow runs in the database of the server that runs under `home`."""
    with sqlite3.connect(home.prefect / "prefect.db") as db:
        return dict(db.execute("select name, state_name from flow_run order by start_time").fetchall())


@pytest.mark.usefixtures("home_with_database")
def test_a_run_appears_in_prefect_with_its_stage_its_logs_and_artifacts(
    command: Clha, home: Home, on_pairs: tuple[str, ...]
):
    done = command("run", *on_pairs, "--only", "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"prepare +built +72 in +72 out", done.stdout) and done.stderr == ""
    assert flow_runs(home) == {"smoke": "Completed", "smoke prepare": "Completed"}
    with sqlite3.connect(home.prefect / "prefect.db") as db:
        tasks = dict(db.execute("select name, state_name from task_run").fetchall())
        keys = {key for (key,) in db.execute("select key from artifact")}
        lines = [line for (line,) in db.execute("select message from log")]
    assert tasks["prepare"] == "Completed"
    assert {"smoke-prepare", "smoke-prepare-progress", "smoke-result"} <= keys
    assert any("prepare: built" in line for line in lines)
    assert processes_of(home.root) == []


def test_a_second_run_is_quick_imports_no_prefect_and_writes_nothing(
    command: Clha, home: Home, on_pairs: tuple[str, ...]
):
    arguments = ("run", *on_pairs, "--only", "prepare")
    assert command(*arguments, "--no-prefect").returncode == 0
    before = files_below(home.root)
    started = time.monotonic()
    done = command(*arguments, PYTHONPROFILEIMPORTTIME="1")
    assert time.monotonic() - started < 6
    assert done.returncode == 0 and "nothing to do, 1 node up to date" in done.stdout
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "clha.stages.chain" in imported
    assert not {name.split(".")[0] for name in imported} & {"prefect", "torch", "transformers", "vllm"}
    assert files_below(home.root) == before


def test_a_stage_alone_makes_what_the_flow_makes(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    assert command("run", *on_pairs, "--only", "prepare", "--no-prefect").returncode == 0
    config = on_pairs[:4]
    data = on_pairs[4:]
    done = command("run-stage", "prepare", "--run", "alone", *config, *data)
    assert done.returncode == 0, done.stderr
    assert run_file(home.root, "alone")["nodes"] == run_file(home.root, "smoke")["nodes"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many rows that `prepare` takes many seconds."""
    return write_pairs(tmp_path_factory.mktemp("many") / "many.jsonl", 150_000)


class Started:
    """`clha run --only prepare` on `many`, in the background."""

    def __init__(self, home: Home, on_pairs: tuple[str, ...], many: Path, folder: Path, **variables: str) -> None:
        self.home = home
        self.output = folder / "output.txt"
        arguments = ("run", *on_pairs, "--set", f"prepare.path={many}", "--only", "prepare", "--run", folder.name)
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                clha_command(*arguments),
                env={**environment(home.root), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=hear_interrupts,
            )

    def wait_for_stage(self) -> None:
        """Return when the process of the stage is at work."""
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output.read_text()
            if any("clha.stages.child" in line and "prepare" in line for line in processes_of(self.home.root)):
                time.sleep(0.5)
                return
            time.sleep(0.1)
        raise AssertionError("the stage did not start")

    def nothing_is_left(self) -> bool:
        """Whether all processes are gone, at once or within seconds."""
        deadline = time.monotonic() + 15
        while processes_of(self.home.root) and time.monotonic() < deadline:
            time.sleep(0.1)
        return processes_of(self.home.root) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_run_ends_its_processes_and_tells_the_server(
    home: Home,
    on_pairs: tuple[str, ...],
    many: Path,
    tmp_path: Path,
    number: signal.Signals,
    shared_server: server.Server,
    shared_server_home: Home,
):
    run = Started(home, on_pairs, many, tmp_path, PREFECT_API_URL=shared_server.api)
    run.wait_for_stage()
    run.process.send_signal(number)
    run.process.wait(timeout=60)
    assert run.nothing_is_left()
    output = run.output.read_text()
    assert run.process.returncode == 128 + number
    assert output.count("error: interrupted") == 1 and "Traceback" not in output
    assert not (home.artifacts / "prepare").exists()
    assert flow_runs(shared_server_home)[tmp_path.name] in ("Crashed", "Cancelled")


@pytest.mark.usefixtures("home_with_database")
def test_a_killed_run_leaves_no_process_and_no_lock(home: Home, on_pairs: tuple[str, ...], many: Path, tmp_path: Path):
    run = Started(home, on_pairs, many, tmp_path)
    run.wait_for_stage()
    run.process.kill()
    run.process.wait()
    assert run.nothing_is_left()
    assert not (home.artifacts / "prepare").exists()
    with home.lock(f"run-{tmp_path.name}"):
        pass  # nobody holds it any more


@pytest.mark.slow
@pytest.mark.usefixtures("home_with_database")
def test_a_server_that_dies_does_not_fail_the_run(home: Home, on_pairs: tuple[str, ...], many: Path, tmp_path: Path):
    run = Started(home, on_pairs, many, tmp_path, PREFECT_CLIENT_MAX_RETRIES="0")
    run.wait_for_stage()
    servers = subprocess.run(
        ["pgrep", "-f", f"flows.server {home.root} "], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(servers[0]), signal.SIGKILL)
    run.process.wait(timeout=400)
    output = run.output.read_text()
    assert run.process.returncode == 0, output
    assert "the Prefect server no longer answers" in output and "Traceback" not in output
    assert re.search(r"prepare +built", output)
    assert run.nothing_is_left()


def test_a_run_joins_the_server_that_clha_ui_started(
    home: Home, on_pairs: tuple[str, ...], command: Clha, shared_server: server.Server, shared_server_home: Home
):
    home.prefect.mkdir()
    shutil.copyfile(shared_server_home.prefect / "server.json", home.prefect / "server.json")
    done = command("run", *on_pairs, "--only", "prepare", "--run", "joined")
    assert done.returncode == 0, done.stderr
    assert f"watch it at {shared_server.ui}" in done.stdout and "starting a Prefect server" not in done.stdout
    assert flow_runs(shared_server_home)["joined prepare"] == "Completed"


def test_a_stage_that_fails_is_one_line_exit_code_1_and_a_failed_flow_run(
    command: Clha, home: Home, on_pairs: tuple[str, ...], shared_server: server.Server, shared_server_home: Home
):
    assert command("run", *on_pairs, "--run", "failing", "--only", "prepare", "--no-prefect").returncode == 0
    key = run_file(home.root, "failing")["nodes"]["prepare"]
    for shard in (home.artifacts / "prepare" / key).glob("prompts-*.parquet"):
        shard.write_bytes(bytes(len(shard.read_bytes())))  # same size, other bytes: found only when it is read
    done = command("run", *on_pairs, "--run", "failing", "--only", "fit_reward", PREFECT_API_URL=shared_server.api)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: fit_reward.train: ") and done.stderr.count("\n") == 1
    assert flow_runs(shared_server_home)["failing fit_reward"] == "Failed"
