"""The Prefect server: started, remembered, found by others, ended; its UI answers; ports that are taken."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from chains import clha_command, environment
from flow_cases import hear_interrupts, processes_of

from clha.errors import UserError
from clha.store import Home
from flows import server


@pytest.fixture(autouse=True)
def no_server_of_somebody_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def test_without_a_server_none_is_found(home: Home):
    assert server.find_server(home) is None


@pytest.mark.parametrize("text", ["", "{}", '{"url": "http://127.0.0.1:9/api", "pid": 1}', '{"url": 3, "pid": "x"}'])
def test_a_memory_of_a_server_that_is_gone_finds_none(home: Home, text: str):
    home.prefect.mkdir()
    (home.prefect / "server.json").write_text(text)
    assert server.find_server(home) is None


def test_a_server_that_the_environment_names_must_answer(home: Home, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(UserError, match="no Prefect server answers there"):
        server.find_server(home)


def test_a_port_that_is_taken_or_impossible_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1: Address already in use; .*--port"):
            server.check_port("127.0.0.1", port)
    server.check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="port 70000"):
        server.check_port("127.0.0.1", 70000)


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return str(response.read().decode())


@pytest.mark.usefixtures("home_with_database")
def test_clha_ui_serves_page_and_api_is_found_and_leaves_nothing_behind(home: Home, tmp_path: Path):
    port = server.free_port()
    started = subprocess.Popen(
        clha_command("ui", "--port", str(port)),
        env=environment(home.root),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_interrupts,
    )
    try:
        deadline = time.monotonic() + 240
        while (found := server.find_server(home)) is None and time.monotonic() < deadline:
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.2)
        assert found is not None and found.ui == f"http://127.0.0.1:{port}"
        assert "<html" in get(found.ui).lower()
        assert json.loads(get(f"{found.ui}/ui-settings"))["api_url"] == "/api"
        assert json.loads(get(f"{found.api}/admin/settings"))["server"]["analytics_enabled"] is False
        assert (home.prefect / "prefect.db").is_file()

        again = subprocess.run(
            clha_command("ui"), env=environment(home.root), cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert again.returncode == 2 and f"running already: {found.ui}" in again.stderr
    finally:
        started.send_signal(signal.SIGINT)
        output, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and "Traceback" not in output
    assert server.find_server(home) is None and not (home.prefect / "server.json").exists()
    assert processes_of(home.root) == []


@pytest.mark.usefixtures("home_with_database")
def test_a_server_ends_when_its_owner_is_killed(home: Home, tmp_path: Path):
    port = server.free_port()
    owner = subprocess.Popen(
        clha_command("ui", "--port", str(port)), env=environment(home.root), cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not processes_of(home.root) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 20
    while processes_of(home.root) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(home.root) == []
