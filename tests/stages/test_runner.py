"""How stages' processes end: tried again when that may help, ended when they take too long, one line for the rest."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from chains import clha

from clha.config import settings_from
from clha.errors import StageFailure, TransientFailure, UserError
from clha.progress import Event
from clha.runs import Run, existing_run, save_run
from clha.settings import Settings
from clha.stages import chain, runner
from clha.store import Home

ROWS = "".join(f'{{"messages": [{{"role": "user", "content": "Question {i}?"}}]}}\n' for i in range(40))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home").create()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text(ROWS)
    return tmp_path / "data.jsonl"


def settings_of(data: Path, **execution: float | None) -> Settings:
    judge = {"reward": {"type": "sequence_classification", "model": "nowhere"}}
    splits = {"train": 0.5, "dev": 0.1, "test": 0.4, "reward_train": 0, "reward_eval": 0}
    tree = {
        "policy": {"model": "nowhere"},
        "prepare": {"source": "chat_jsonl", "path": str(data), "splits": splits},
        "rescore": judge,
        "evaluate": judge,
        "execution": {"min_free_disk_gb": 0.1, "retry_delay_seconds": 0, **execution},
    }
    return settings_from(tree, (), where="test")


def build_prepare(home: Home, settings: Settings, listener: runner.Listener) -> runner.Built:
    run = Run("r", "test", settings.model_dump(mode="json"))
    save_run(home, run)
    return runner.build(home, run, settings, chain.nodes(settings)[0], listener)


class Heard:
    """A listener that keeps the events and when they came."""

    def __init__(self) -> None:
        self.events: list[tuple[float, Event]] = []

    def __call__(self, node: str, event: Event) -> None:
        self.events.append((time.monotonic(), event))

    def retries(self) -> list[tuple[float, str]]:
        """When the stage was said to be tried again, and how."""
        return [(at, e["message"]) for at, e in self.events if "; again in " in e.get("message", "")]


class Killer:
    """Sends SIGKILL to the first `times` stage processes of a home, each as soon as it is there."""

    def __init__(self, home: Home, times: int) -> None:
        self.home, self.times = home, times
        self.killed: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while len(self.killed) < self.times and not self._over.wait(0.002):
            for process in psutil.Process().children(recursive=True):
                try:
                    line = process.cmdline()
                    if "clha.stages.child" in line and str(self.home.root) in line and process.pid not in self.killed:
                        process.kill()
                        self.killed.append(process.pid)
                except psutil.NoSuchProcess:
                    pass


def test_a_stage_whose_process_is_killed_is_tried_again_after_the_delay_until_it_succeeds(home: Home, data: Path):
    heard = Heard()
    with Killer(home, times=2) as killer:
        built = build_prepare(home, settings_of(data, retries=2, retry_delay_seconds=0.5), heard)
    assert len(killer.killed) == 2 and not built.reused and built.artifact.manifest["rows_out"] == 40
    log = home.logs / "r" / "prepare.log"
    reason = f"prepare: its process was killed by signal 9; log: {log}"
    (first, said_first), (second, said_second) = heard.retries()
    assert [said_first, said_second] == [f"{reason}; again in 0.5 s ({i} of 2)" for i in (1, 2)]
    end, last = heard.events[-1]
    assert last["state"] == "built" and second - first >= 0.5 and end - second >= 0.5
    history = existing_run(home, "r").history
    assert [e["event"] for e in history] == ["started", "retried", "retried", "built"]
    assert [e["reason"] for e in history if e["event"] == "retried"] == [reason] * 2


def test_a_stage_that_is_killed_each_time_ends_with_the_line_of_its_last_death(home: Home, data: Path):
    heard = Heard()
    with Killer(home, times=9) as killer, pytest.raises(TransientFailure, match="killed by signal 9") as caught:
        build_prepare(home, settings_of(data, retries=1), heard)
    assert len(killer.killed) == 2, "the first time and one more"
    assert "\n" not in str(caught.value) and len(heard.retries()) == 1
    assert not (home.artifacts / "prepare").exists()
    saved = existing_run(home, "r")
    assert "prepare" in saved.nodes and not any(entry["event"] == "built" for entry in saved.history)


def test_a_failure_that_does_not_pass_by_itself_is_not_tried_again(home: Home, data: Path):
    """The data changes between planning and building: the run as it was asked for cannot be built any more."""

    class ChangesTheData(Heard):
        def __call__(self, node: str, event: Event) -> None:
            super().__call__(node, event)
            if event.get("state") == "started":
                data.write_text(ROWS * 2)

    heard = ChangesTheData()

    with pytest.raises(StageFailure, match="prepare: an input changed while it was being built") as caught:
        build_prepare(home, settings_of(data, retries=3), heard)
    assert not isinstance(caught.value, TransientFailure) and "\n" not in str(caught.value)
    assert heard.retries() == []


def test_a_mistake_of_the_user_is_not_tried_again(home: Home, data: Path):
    data.write_text('{"messages"\n')
    heard = Heard()
    with pytest.raises(UserError, match="^prepare: ") as caught:
        build_prepare(home, settings_of(data, retries=3), heard)
    assert "\n" not in str(caught.value)
    assert heard.retries() == []


def test_the_command_line_ends_with_1_and_one_line_when_every_try_took_too_long(home: Home, data: Path, root: Path):
    """0.002 minutes are 0.12 s: less than the imports of a stage's process take."""
    sets = (f"prepare.path={data}", "prepare.source=chat_jsonl", "execution.timeout_minutes=0.002")
    sets += ("execution.retries=1", "execution.retry_delay_seconds=0")
    arguments = ["--config", str(root / "pipelines.yaml"), "--profile", "smoke", "--only", "prepare", "--no-prefect"]
    done = clha(home.root, "run", *arguments, *(a for s in sets for a in ("--set", s)), expect=1)
    log = home.logs / "smoke" / "prepare.log"
    line = f"prepare: not finished after 0.002 minutes (execution.timeout_minutes); log: {log}"
    assert done.stderr == f"error: {line}\n"
    assert done.stdout.count("again in 0 s (1 of 1)") == 1
    assert not (home.artifacts / "prepare").exists()


# A stage's process in small: started as one, it says how it ended as one.
CHILD = """
import os, signal, subprocess, sys, time
from clha.errors import StageFailure, UserError
from clha.process import child_main

def work(progress):
    progress.log("at work")
    {work}

if __name__ == "__main__":
    child_main(work)
"""


@pytest.fixture
def run_work(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `work` in a stage's process, heard by the listener that is given."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def run(work: str, listener: runner.Listener = lambda *_: None, minutes: float = 1) -> None:
        (tmp_path / "small_stage.py").write_text(CHILD.format(work=work))
        runner.run_module(
            "small_stage",
            [],
            name="small",
            log=tmp_path / "small.log",
            settings=settings_of(data),
            minutes=minutes,
            listener=listener,
        )

    return run


def is_gone(pid: int) -> bool:
    """Whether the process has ended, at once or within seconds; its new parent may be slow to hear of it."""
    for _ in range(50):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_takes_too_long_is_ended_with_all_of_its_processes(run_work: Callable[..., None]):
    """0.1 minutes are 6 s: time for a busy machine to start the two processes that are to be ended."""
    work = "print(subprocess.Popen(['sleep', '300']).pid, os.getpid(), flush=True); time.sleep(300)"
    heard = Heard()
    started = time.monotonic()
    with pytest.raises(TransientFailure) as caught:
        run_work(work, heard, minutes=0.1)
    assert 6 <= time.monotonic() - started < 15
    assert str(caught.value).startswith("small: not finished after 0.1 minutes (execution.timeout_minutes); log: ")
    (line,) = [e["line"] for _, e in heard.events if e["event"] == "output"]
    assert all(is_gone(int(pid)) for pid in line.split())


# what the process does -> the error it must become, its line, whether the line names the log
ENDS = {
    "a mistake": ("raise UserError('small: no data; give some')", UserError, "small: no data; give some", False),
    "a failure": ("raise StageFailure('cannot go on')", StageFailure, "small: cannot go on (log: ", True),
    "a lost server": (
        "raise ConnectionResetError('gone')",
        TransientFailure,
        "small: ConnectionResetError: gone",
        True,
    ),
    "a time-out": ("raise TimeoutError('late')", TransientFailure, "small: TimeoutError: late (log: ", True),
    "a defect": ("raise ValueError('x\\n  y')", StageFailure, "small: ValueError: x (log: ", True),
    "a signal": ("os.kill(os.getpid(), signal.SIGSEGV)", TransientFailure, "small: its process was killed by si", True),
    "no word": (
        "print('last words'); os._exit(7)",
        StageFailure,
        "small: its process ended with 7: last words; ",
        True,
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_each_way_to_end_badly_is_one_line_and_is_tried_again_only_when_it_may_pass(
    run_work: Callable[..., None], tmp_path: Path, case: str
):
    work, kind, line, names_log = ENDS[case]
    with pytest.raises((UserError, StageFailure)) as caught:
        run_work(work)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.startswith(line) and "\n" not in message
    assert (str(tmp_path / "small.log") in message) == names_log


def test_the_traceback_of_a_defect_is_in_the_log_and_only_there(run_work: Callable[..., None], tmp_path: Path):
    with pytest.raises(StageFailure) as caught:
        run_work("dict()['key']")
    assert "Traceback" not in str(caught.value)
    assert "Traceback" in (tmp_path / "small.log").read_text() and "KeyError" in (tmp_path / "small.log").read_text()


@pytest.mark.parametrize(
    ("setting", "variable", "threads"),
    [(3, "5", "3"), (None, "5", "5"), (None, "5,2", "5"), (None, "", "4"), (None, None, "4")],
)
def test_a_stage_has_the_threads_that_are_set_or_those_that_its_surroundings_allow(
    monkeypatch: pytest.MonkeyPatch, data: Path, setting: int | None, variable: str | None, threads: str
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert runner.child_environment(settings_of(data, threads=setting))["OMP_NUM_THREADS"] == threads
