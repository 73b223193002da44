"""Children: heard line by line, timed out, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from clha.process import Ended, python_module, run_child, run_together


def child(tmp_path: Path, code: str, **options) -> tuple[Ended, list, list]:
    lines, events = [], []
    ended = run_child(
        [sys.executable, "-c", code],
        environment=dict(os.environ),
        log=tmp_path / "log" / "child.log",
        on_event=events.append,
        on_line=lines.append,
        **options,
    )
    return ended, lines, events


def wait_until_gone(pid: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_output_goes_to_the_log_and_events_to_the_listener(tmp_path: Path):
    code = """
import json, os, sys
print("out"); print("err", file=sys.stderr); sys.stdout.write("no end")
os.write(int(os.environ["CLHA_PROGRESS_FD"]), b'{"event": "log", "message": "hi"}\\n{"event": "log"')
os.write(int(os.environ["CLHA_PROGRESS_FD"]), b', "message": "there"}\\n')
"""
    ended, lines, events = child(tmp_path, code)
    assert ended == Ended(0, False, "no end") or ended == Ended(0, False, "err")
    assert set(lines) == {"out", "err", "no end"}
    assert [e["message"] for e in events] == ["hi", "there"]
    assert "err" in (tmp_path / "log" / "child.log").read_text()


def test_a_megabyte_of_output_does_not_block_the_child(tmp_path: Path):
    ended, lines, _ = child(tmp_path, "print('x' * 99 + '\\n', end='')\nprint(('y' * 99 + '\\n') * 20000, end='')")
    assert ended.returncode == 0 and len(lines) == 20001


def test_exit_codes_and_signals_are_told(tmp_path: Path):
    assert child(tmp_path, "raise SystemExit(3)")[0].returncode == 3
    assert child(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")[0].returncode == -9


def test_a_child_that_takes_too_long_is_ended_with_its_own_children(tmp_path: Path):
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); time.sleep(300)"
    ended, lines, _ = child(tmp_path, code, timeout_seconds=2)
    assert ended.timed_out and ended.returncode == -signal.SIGTERM
    assert wait_until_gone(int(lines[0]))


def test_a_killed_child_is_noticed_though_its_own_child_holds_its_pipes(tmp_path: Path):
    code = (
        "import os, signal, subprocess; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended, lines, _ = child(tmp_path, code, timeout_seconds=120)
    assert ended.returncode == -signal.SIGKILL and not ended.timed_out
    assert wait_until_gone(int(lines[0]))


def test_a_child_that_closes_its_pipes_and_hangs_is_timed_out(tmp_path: Path):
    code = "import os, time; [os.close(fd) for fd in (1, 2, int(os.environ['CLHA_PROGRESS_FD']))]; time.sleep(300)"
    ended, _, _ = child(tmp_path, code, timeout_seconds=2)
    assert ended.timed_out and ended.returncode == -signal.SIGTERM


def test_a_module_in_the_current_folder_does_not_shadow_ours(tmp_path: Path):
    (tmp_path / "dataclasses.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(python_module("clha.devices"), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "shadowed" not in done.stderr


def test_an_exception_in_the_parent_ends_the_child(tmp_path: Path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    pids = []

    def stop(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(
            [sys.executable, "-c", code],
            environment=dict(os.environ),
            log=tmp_path / "log",
            on_event=print,
            on_line=stop,
        )
    assert wait_until_gone(pids[0])


def test_a_stage_process_ends_when_its_parent_is_killed(tmp_path: Path):
    child_code = (
        "import os, time; from clha.process import child_main;"
        "child_main(lambda progress: (print(os.getpid(), flush=True), time.sleep(300)))"
    )
    parent_code = f"""
import os, sys
from pathlib import Path
from clha.process import python_module, run_child
run_child([sys.executable, "-c", {child_code!r}], environment=dict(os.environ), log=Path({str(tmp_path / "l")!r}),
          on_event=print, on_line=lambda x: print(x, flush=True))
"""
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert wait_until_gone(pid)


def test_of_children_that_need_each_other_one_that_dies_ends_all(tmp_path: Path):
    die = "import os, signal, time; time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)"
    wait = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    lines: list[str] = []
    one, two = run_together(
        [[sys.executable, "-c", wait], [sys.executable, "-c", die]],
        environments=[dict(os.environ)] * 2,
        log=None,
        on_event=print,
        on_line=lines.append,
    )
    assert (one.returncode, one.stopped) == (-signal.SIGTERM, True)
    assert (two.returncode, two.stopped) == (-signal.SIGKILL, False)
    assert wait_until_gone(int(lines[0]))


def test_a_command_that_does_not_exist_leaves_no_open_pipe(tmp_path: Path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        run_child(
            ["/nonexistent"],
            environment={},
            log=tmp_path / "log",
            on_event=print,
        )
    assert len(os.listdir("/proc/self/fd")) == before
