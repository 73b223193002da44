"""`clha deploy`: the chain and each stage as deployments, started through the API, kept from piling up."""

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from chains import ROOT, clha_command, environment, run_file
from flow_cases import hear_interrupts, processes_of, write_pairs

from clha.config import load_settings
from clha.errors import UserError
from clha.store import Home
from flows import server

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


class Api:
    """The REST API of a Prefect server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        for _ in range(20):
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its database is locked for the moment: Prefect's own client asks again too
                    raise
            time.sleep(0.5)
        raise AssertionError(f"{path}: busy for 10 seconds")

    def start(self, deployment: str, at: datetime | None = None, **parameters: Any) -> str:
        """Start a deployment now or later; returns the id of the flow run."""
        found = self.call(f"/deployments/name/{deployment}")
        details = {"scheduled_time": at.isoformat()} if at else {}
        state = {"type": "SCHEDULED", "state_details": details}
        body = {"state": state, "parameters": {**found["parameters"], **parameters}}
        return str(self.call(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def wait(self, flow_run: str, seconds: float = 240) -> dict[str, Any]:
        """The flow run when it has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run: dict[str, Any] = self.call(f"/flow_runs/{flow_run}")
            if run["state"]["type"] in ENDED:
                return run
            time.sleep(0.5)
        raise AssertionError(f"still {run['state']}")


@pytest.fixture(scope="module")
def served_home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, database: Path) -> Home:
    """The CLHA_HOME of `served`."""
    home = Home(tmp_path_factory.mktemp("served") / "home").create()
    shutil.copytree(tiny_model, home.models / tiny_model.name)
    home.prefect.mkdir()
    shutil.copyfile(database, home.prefect / "prefect.db")
    return home


@pytest.fixture(scope="module")
def served(served_home: Home, pairs: Path) -> Iterator[Api]:
    """`clha deploy` with a server of its own."""
    port = server.free_port()
    output = served_home.root.parent / "output.txt"
    arguments = ("--profile", "smoke", "--set", "prepare.source=chat_jsonl", "--set", f"prepare.path={pairs}")
    with open(output, "wb") as log:
        process = subprocess.Popen(
            clha_command("deploy", *arguments, "--port", str(port)),
            env=environment(served_home.root),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=hear_interrupts,
        )
    try:
        deadline = time.monotonic() + 240
        while "Ctrl-C ends serving" not in output.read_text():
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        api = Api(f"http://127.0.0.1:{port}/api")
        while len(api.call("/deployments/filter", {})) < 8:
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield api
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert processes_of(served_home.root) == []


@pytest.mark.parametrize(("key", "value"), [("cron", "nonsense"), ("timezone", "Mars/Olympus")])
def test_a_schedule_that_is_none_is_one_line(tmp_path: Path, key: str, value: str):
    from flows.deploy import deployments

    config = ROOT / "pipelines.yaml"
    profile, settings = load_settings(config, "smoke", [f"schedule.{key}={value}"])
    with pytest.raises(UserError, match=rf"schedule\.{key}: .*{value}.*such as cron"):
        deployments(tmp_path, config, profile, settings, (), schedule=True)


def test_chain_and_stages_started_through_the_api_end_completed_and_a_second_start_is_cancelled(
    served: Api, served_home: Home
):
    names = {d["name"] for d in served.call("/deployments/filter", {})}
    flows = {f["name"] for f in served.call("/flows/filter", {})}
    assert names == {"smoke"}
    assert flows == {"pipeline", "prepare", "fit_reward", "generate", "rescore", "train", "evaluate", "noise-study"}
    chain = served.call("/deployments/name/pipeline/smoke")
    (schedule,) = chain["schedules"]
    assert schedule["active"] and schedule["schedule"]["cron"] and schedule["schedule"]["timezone"]

    soon = datetime.now(UTC) + timedelta(seconds=15)  # at one time: otherwise the first may be over already
    first, second = (served.start("pipeline/smoke", soon, only="prepare") for _ in range(2))
    ended = {run["state"]["type"]: run for run in (served.wait(first), served.wait(second))}
    assert set(ended) == {"COMPLETED", "CANCELLED"}, {k: v["state"]["message"] for k, v in ended.items()}
    name = ended["COMPLETED"]["name"]
    assert name.startswith("smoke-20"), "a run without a name is named after deployment and time"
    assert list(run_file(served_home.root, name)["nodes"]) == ["prepare"]

    stage = served.wait(served.start("prepare/smoke", run=name))
    assert stage["state"]["type"] == "COMPLETED" and stage["name"] == f"{name} prepare"

    unknown = served.wait(served.start("prepare/smoke", run="nobody"))
    assert unknown["state"]["type"] == "FAILED" and "no run `nobody`" in unknown["state"]["message"]


def test_cancelling_in_the_ui_ends_the_process_of_the_stage_and_frees_the_run(
    served: Api, served_home: Home, tmp_path: Path
):
    many = write_pairs(tmp_path / "many.jsonl", 150_000)
    overrides = ["prepare.source=chat_jsonl", f"prepare.path={many}"]
    started = served.start("pipeline/smoke", run="cancelled", only="prepare", overrides=overrides)
    deadline = time.monotonic() + 240
    while not any("clha.stages.child" in line and "prepare" in line for line in processes_of(served_home.root)):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    served.call(f"/flow_runs/{started}/set_state", {"state": {"type": "CANCELLING"}})
    assert served.wait(started)["state"]["type"] == "CANCELLED"
    deadline = time.monotonic() + 15
    while any("clha.stages" in line for line in processes_of(served_home.root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any("clha.stages" in line for line in processes_of(served_home.root))
    key = run_file(served_home.root, "cancelled")["nodes"]["prepare"]
    assert not served_home.artifact_folder("prepare", key).exists()
    with served_home.lock("run-cancelled"):
        pass  # nobody holds it any more
