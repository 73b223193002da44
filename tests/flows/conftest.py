"""What the tests of flows and command line share: a small data file, and `clha` started as a user does."""

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chains import ROOT, clha_command, environment
from flow_cases import Clha, write_pairs

from clha.store import Home
from flows import server


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 preference pairs."""
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 160)


@pytest.fixture
def on_pairs(pairs: Path) -> tuple[str, ...]:
    """Arguments: the smoke profile on `pairs`."""
    config = ("--config", str(ROOT / "pipelines.yaml"), "--profile", "smoke")
    return (*config, "--set", "prepare.source=chat_jsonl", "--set", f"prepare.path={pairs}")


@pytest.fixture
def command(home: Home, tmp_path: Path) -> Clha:
    """Run `clha` in an empty folder, with `home` as CLHA_HOME; returns how it ended."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(*arguments: str, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            clha_command(*arguments),
            cwd=folder,
            env={**environment(home.root), **variables},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def shared_server_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The CLHA_HOME of `shared_server`."""
    return Home(tmp_path_factory.mktemp("server") / "home").create()


@pytest.fixture(scope="session")
def shared_server(shared_server_home: Home) -> Iterator[server.Server]:
    """A Prefect server for the tests that need one but not one of their own: it takes seconds to start."""
    with server.running_server(shared_server_home, "127.0.0.1", server.free_port(), remember=True) as found:
        database = shared_server_home.prefect / "prefect.db"
        with sqlite3.connect(database) as source, sqlite3.connect(database.with_name("fresh.db")) as copy:
            source.backup(copy)
        yield found


@pytest.fixture(scope="session")
def database(shared_server: server.Server, shared_server_home: Home) -> Path:
    """Prefect's database with its tables and no row: making them takes as long as all the rest of a server's start."""
    return shared_server_home.prefect / "fresh.db"


@pytest.fixture
def home_with_database(home: Home, database: Path) -> Home:
    """`home` with Prefect's database made already."""
    home.prefect.mkdir()
    shutil.copyfile(database, home.prefect / "prefect.db")
    return home
