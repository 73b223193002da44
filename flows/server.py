"""The Prefect server on this machine: start it, find it, set the environment that points Prefect at it.

Prefect reads its environment when it is imported, so nothing here imports it outside of the server's own process.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from clha.errors import StageFailure, UserError
from clha.process import end_group, python_module
from clha.store import Home, write_atomic

_START_SECONDS = 180.0


class ServerLost(StageFailure):
    """The server did not come up, or went away while a run was shown there: a run goes on without it."""


@dataclass(frozen=True)
class Server:
    """A Prefect server that answers."""

    api: str  # http://127.0.0.1:4200/api
    process: "subprocess.Popen[bytes] | None" = None  # where this process started it, and ends it

    @property
    def ui(self) -> str:
        return self.api.removesuffix("/api")

    def wait(self) -> None:
        """Return when the server that this process started has ended. Raises StageFailure: it should not."""
        assert self.process is not None
        code = self.process.wait()
        raise StageFailure(f"the Prefect server ended with {code}; see logs/prefect-server.log in CLHA_HOME")


def client_environment(home: Home, api: str | None) -> dict[str, str]:
    """The environment in which Prefect is imported: our folder, our server, no telemetry, a quiet console."""
    environment = {
        "PREFECT_HOME": str(home.prefect),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # A server that is gone is given up after seconds, not minutes: the run goes on without it.
        "PREFECT_CLIENT_MAX_RETRIES": os.environ.get("PREFECT_CLIENT_MAX_RETRIES", "2"),
        "PREFECT_API_REQUEST_TIMEOUT": os.environ.get("PREFECT_API_REQUEST_TIMEOUT", "30"),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    if api:
        environment["PREFECT_API_URL"] = api
    return environment


def quiet_console() -> dict[str, str]:
    """What keeps Prefect's own log lines off a terminal that shows our progress; the UI has them all."""
    return {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL": "CRITICAL"}


def answers(api: str, timeout_seconds: float = 1.0) -> bool:
    """Whether a Prefect server answers at `api`."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=timeout_seconds) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def find_server(home: Home) -> Server | None:
    """The server that PREFECT_API_URL names, or else the one that `clha ui` or `clha deploy` started here.

    Raises UserError when PREFECT_API_URL is set and nothing answers there.
    """
    given = os.environ.get("PREFECT_API_URL")
    if given:
        api = given.rstrip("/")
        if not answers(api, 5.0):
            raise UserError(f"PREFECT_API_URL={given}: no Prefect server answers there; start it or unset the variable")
        return Server(api)
    try:
        body = json.loads(_remembered(home).read_text(encoding="utf-8"))
        api, pid = str(body["url"]), int(body["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Server(api) if _alive(pid) and answers(api) else None


def _remembered(home: Home) -> Path:
    return home.prefect / "server.json"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_port(host: str, port: int) -> None:
    """Raises UserError when nothing can listen on `port` of `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} on {host}: {error.strerror}; choose another with --port") from None
        except OverflowError:
            raise UserError(f"port {port}: must be 0 to 65535; choose another with --port") from None


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(
    home: Home, host: str, port: int, *, remember: bool, meanwhile: Callable[[Server], None] | None = None
) -> Iterator[Server]:
    """A server in a child process for as long as the block lasts; it also ends when this process is killed.

    `remember`: write where it listens to CLHA_HOME/prefect/server.json, so that `clha run` finds it. `meanwhile` is
    called while the server starts. Raises UserError for a taken port, ServerLost when the server does not come up.
    """
    check_port(host, port)
    home.create()
    home.prefect.mkdir(parents=True, exist_ok=True)
    log = home.logs / "prefect-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    lifeline_in, lifeline_out = os.pipe()
    api = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/api"
    with open(log, "ab") as log_file:
        child = subprocess.Popen(
            python_module("flows.server", str(home.root), host, str(port), str(lifeline_in)),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=(lifeline_in,),
            start_new_session=True,
        )
    os.close(lifeline_in)
    server = Server(api, child)
    try:
        if meanwhile is not None:
            meanwhile(server)
        deadline = time.monotonic() + _START_SECONDS
        while not answers(api):
            if child.poll() is not None:
                raise ServerLost(f"the Prefect server ended with {child.returncode} at its start (log: {log})")
            if time.monotonic() > deadline:
                raise ServerLost(f"the Prefect server did not answer within {_START_SECONDS:g} s (log: {log})")
            time.sleep(0.1)
        if remember:
            body = {"url": api, "pid": child.pid, "started": datetime.now(UTC).isoformat(timespec="seconds")}
            write_atomic(_remembered(home), json.dumps(body).encode())
        yield server
    finally:
        if remember:
            _remembered(home).unlink(missing_ok=True)
        end_group(child)
        os.close(lifeline_out)


def _serve(home: Home, host: str, port: int, lifeline: int) -> None:
    """Be the server: database under CLHA_HOME/prefect, the UI where the API is."""

    def watch() -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(lifeline, selectors.EVENT_READ)
            selector.select()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PREFECT_API_")]:
        del os.environ[name]
    os.environ.update(client_environment(home, None))
    # A relative address works from every machine that can open the UI.
    os.environ["PREFECT_UI_API_URL"] = "/api"
    os.environ |= {"PREFECT_SERVER_API_HOST": host, "PREFECT_SERVER_API_PORT": str(port)}
    import prefect

    if not os.access(prefect.__ui_static_subpath__.parent, os.W_OK):
        os.environ["PREFECT_UI_STATIC_DIRECTORY"] = str(home.prefect / "ui")

    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(final=True), host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    _serve(Home(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
