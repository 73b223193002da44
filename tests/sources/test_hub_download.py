"""A dataset of the Hub, by the real `datasets`, from a stand-in of the Hub on this machine; then from the cache."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chains import artifact_folder, clha, file_digests

COMMIT = "0123456789" * 4
REPOSITORY = "owner/questions"


def lines(rows: int, what: str) -> bytes:
    chats = [{"messages": [{"role": "user", "content": f"{what} {k}?"}]} for k in range(rows)]
    return "".join(json.dumps(chat) + "\n" for chat in chats).encode()


FILES = {"data/train.jsonl": lines(40, "Why"), "data/test.jsonl": lines(7, "When"), "more/train.jsonl": lines(5, "Who")}


class Hub:
    """Answers as the Hub does about one public dataset; `asked` are the paths of all requests."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        api, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in FILES]
            return 200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": []}).encode(), {}
        if path.startswith(f"{api}/tree/{COMMIT}"):
            found = self._tree(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/").replace("%2F", "/"))
            if found:
                return 200, json.dumps(found).encode(), {}
        content = FILES.get(path.removeprefix(files))
        if path.startswith(files) and content is not None:
            return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        return 404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"}

    def _tree(self, folder: str) -> list[dict[str, Any]]:
        if not folder:
            return [{"type": "directory", "path": d, "size": 0, "oid": "d" * 40} for d in ("data", "more")]
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in FILES.items()
            if name.startswith(f"{folder}/")
        ]


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    """The stand-in and its address."""
    made = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            path = self.path.split("?")[0]
            made.asked.append(path)
            status, body, headers = made.answer(path)
            self.send_response(status)
            for name, value in {**headers, "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = _reply

        def log_message(self, *args: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield made, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


SETTINGS = f"""
profiles:
  p:
    policy: {{model: bundled:tiny-random}}
    prepare:
      source: datasets
      path: hub:{REPOSITORY}
      splits: {{train: 0.5, dev: 0.1, test: 0.4, reward_train: 0, reward_eval: 0}}
    rescore: {{reward: {{type: sequence_classification, model: bundled:tiny-random}}}}
    evaluate: {{reward: {{type: sequence_classification, model: bundled:tiny-random}}}}
    execution: {{min_free_disk_gb: 0.1, retries: 0}}
"""


class Prepare:
    """`clha run --only prepare` with a Hub at an address, and a cache of its own in `folder`."""

    def __init__(self, folder: Path, endpoint: str, environment: pytest.MonkeyPatch) -> None:
        self.folder, self.environment = folder, environment
        (folder / "settings.yaml").write_text(SETTINGS)
        environment.setenv("HF_ENDPOINT", endpoint)
        environment.setenv("HF_HOME", str(folder / "cache"))

    def __call__(self, run: str, *sets: str, offline: bool = False) -> list[str]:
        """The prompts that a run in a home of its own made."""
        self.environment.setenv("HF_HUB_OFFLINE", str(int(offline)))
        asked = [argument for s in sets for argument in ("--set", s)]
        config = str(self.folder / "settings.yaml")
        clha(self.folder / run, "run", "--config", config, "--run", "r", "--only", "prepare", "--no-prefect", *asked)
        files = sorted(artifact_folder(self.folder / run, "r", "prepare").glob("prompts-*.parquet"))
        return [row["messages"][0]["content"] for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture
def prepare(hub: tuple[Hub, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    return Prepare(tmp_path, hub[1], monkeypatch)


def test_a_dataset_is_fetched_at_the_commit_of_its_branch_and_found_again_offline_by_that_commit(
    prepare: Prepare, hub: tuple[Hub, str], tmp_path: Path
):
    expected = [f"Why {k}?" for k in range(40)] + [f"Who {k}?" for k in range(5)]
    assert prepare("online") == expected
    assert f"/datasets/{REPOSITORY}/resolve/{COMMIT}/data/train.jsonl" in hub[0].asked
    asked = len(hub[0].asked)
    assert prepare("offline", f"prepare.revision={COMMIT}", offline=True) == expected
    assert len(hub[0].asked) == asked, "nothing was asked of the Hub"
    digests = [file_digests(tmp_path / home, "r", "prepare", beginning=("prompts",)) for home in ("online", "offline")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (f"prepare.path=hub:{REPOSITORY}/more@{COMMIT}", [f"Who {k}?" for k in range(5)]),
        ("prepare.hub_split=test", [f"When {k}?" for k in range(7)]),
    ],
    ids=["folder", "split"],
)
def test_of_a_dataset_one_folder_or_one_split_is_taken_when_it_is_named(
    prepare: Prepare, chosen: str, expected: list[str]
):
    assert prepare("home", chosen) == expected
