"""What the tests share: the folder of real data and goldens beside the project, and quiet, offline libraries."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from clha import servers
from clha.store import Home

# A shell that starts the tests in the background has SIGINT ignored, and every process below inherits that: the
# tests that interrupt `clha` need it as a terminal has it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each with its part of the cores, its children too
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: two workers share the tests by file (`make check`), and none should be left alone
    with a long one at the end."""
    first = ("tests/test_whole_chain.py", "tests/flows", "tests/training")

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT).as_posix()
        return next((i for i, start in enumerate(first) if path.startswith(start)), len(first))

    items.sort(key=place)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Goldens and real data that lie beside the project; tests that need them are skipped without."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs goldens and real data in ../shared, which are not part of the project")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random two-layer model of the `smoke` profile, made once."""
    from clha.tiny_model import write_tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny-random"
    folder.mkdir()
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's policy; converted once (half a minute) where no run has done so yet."""
    from clha.models import resolve_model

    here = Home(root / ".clha")
    made = (here.models / "smollm2-135m-instruct").is_dir()
    home = here if made else Home(tmp_path_factory.mktemp("smollm2"))
    return resolve_model("bundled:smollm2-135m-instruct", home.create()).path


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Home:
    """An empty CLHA_HOME that has the tiny model already."""
    made = Home(tmp_path / "home").create()
    shutil.copytree(tiny_model, made.models / tiny_model.name)
    return made


@pytest.fixture(scope="session")
def smoke_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLHA_HOME in which `clha run --profile smoke` ended well: real vLLM, real Prefect. Never changed by a test.

    One for all workers, made by the first that needs it.
    """
    from chains import clha

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke" / "home"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_name("lock")):
        if not (folder / "output.txt").exists():
            done = clha(folder, "run", "--profile", "smoke", "--run", "smoke")
            (folder / "output.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def smoke_copy(smoke_home: Path, tmp_path: Path) -> Path:
    """A copy of `smoke_home` that a test may change."""
    folder = tmp_path / "home"
    shutil.copytree(smoke_home, folder, ignore=shutil.ignore_patterns("prefect", "locks"))
    return folder


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Starts an HTTP server that answers as told: (path, headers, body) -> (status, JSON or text); returns its URL."""
    monkeypatch.setattr(servers, "_FIRST_DELAY", 0.001)
    running: list[ThreadingHTTPServer] = []

    def start(answer: Callable[..., Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def _reply(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                status, value = answer(self.path, dict(self.headers), body)
                data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _reply

            def log_message(self, *args: Any) -> None: ...

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(httpd)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{httpd.server_port}/v1"

    yield start
    for httpd in running:
        httpd.shutdown()
        httpd.server_close()
