"""The README's commands, run as they stand there, in order, on a settings file whose `demo` is the smoke profile."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from chains import ROOT, environment

from clha.config import load_settings

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
# What only other machines can run is marked in the README itself.
MARKED = {
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if re.search(r"# (GPU|Docker)", line)
}
SERVERS = ("clha ui", "clha deploy")
# `make demo` and `make test` are what the demo and this suite are.
COMMANDS = [line for line in LINES if line not in MARKED and not line.startswith(("make ", *SERVERS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder: the sample data, and a settings file with smoke in the place of demo."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").symlink_to(ROOT / "data")
    _, smoke = load_settings(ROOT / "pipelines.yaml", "smoke")
    tree = smoke.model_dump(mode="json")
    (folder / "pipelines.yaml").write_text(yaml.safe_dump({"default": "demo", "profiles": {"demo": tree}}))
    shutil.copy(ROOT / "data" / "sample" / "pairs.jsonl", folder / "my-data.jsonl")
    return folder


def run(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run one line of the README in `folder`."""
    words = shlex.split(line)
    assert words[0] == "clha", f"the README has a command that this test does not know: {line}"
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words[1:]],
        cwd=folder,
        env=environment(folder / ".clha") | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_there_are_commands_and_the_ones_for_other_machines_are_marked():
    assert len(COMMANDS) >= 8
    assert all("hh-7b" in line or "pip install" in line or "docker" in line for line in MARKED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_works_in_the_order_of_the_readme(folder: Path):
    for line in COMMANDS:
        done = run(folder, line)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    runs = {p.stem for p in (folder / ".clha" / "runs").glob("*.json")}
    assert {"demo", "lr", "mine"} <= runs
    for name in ("demo", "lr", "mine"):
        assert (folder / ".clha" / "reports" / name / "report.html").is_file()


def test_commands_that_only_look_work_on_a_finished_run(smoke_home: Path):
    env = environment(smoke_home) | {"PYTHONPATH": str(ROOT)}
    looking = [line for line in COMMANDS if line.split()[1] in ("status", "why", "doctor")]
    assert len(looking) == 3
    for line in looking:
        words = shlex.split(line.replace("--run demo", "--run smoke"))
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *words[1:]],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and done.stdout, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_servers_of_the_readme_answer(folder: Path):
    """`clha ui` (on a free port instead of 4200) shows the API; `clha deploy` beside it serves every stage."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = environment(folder / ".clha") | {"PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "flows.cli"]
    log = (folder / "servers.log").open("w")
    ui = subprocess.Popen([*start, "ui", "--port", str(port)], cwd=folder, env=env, stdout=log, stderr=log)
    deploy = None
    try:
        api = f"http://127.0.0.1:{port}/api"
        assert wait_for(lambda: urllib.request.urlopen(f"{api}/health", timeout=2).status == 200)
        deploy = subprocess.Popen([*start, "deploy"], cwd=folder, env=env, stdout=log, stderr=log)

        def deployments() -> bool:
            request = urllib.request.Request(
                f"{api}/deployments/filter", b"{}", {"Content-Type": "application/json"}, method="POST"
            )
            return len(json.load(urllib.request.urlopen(request, timeout=5))) >= 7

        assert wait_for(deployments), (folder / "servers.log").read_text()[-3000:]
    finally:
        for process in (deploy, ui):
            if process is not None:
                process.terminate()
                process.wait(60)
        log.close()


def wait_for(condition, seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return True
        except OSError:
            pass
        time.sleep(0.5)
    return False


def test_the_links_and_pictures_of_readme_and_docs_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_layout_of_the_readme_names_what_there_is():
    tree = README.split("## Layout")[1].split("## ")[0]
    for name in re.findall(r"^ {4,6}(\S+)", tree, re.MULTILINE):
        assert (ROOT / name).exists() or (ROOT / "clha" / name).exists(), name
