"""The command line: quick help, and one clear line with exit code 2 for whatever the user can mend."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flow_cases import Clha, files_below

from clha import __version__
from clha.runs import run_lock
from clha.store import Home


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of stderr; fails the test when there are more, or a traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def test_help_is_answered_without_importing_anything_heavy():
    """What keeps `clha --help` under half a second (0.2 s on two cores), without asserting a time."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "run-stage" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"prefect", "pydantic", "torch", "transformers", "vllm", "pyarrow", "numpy", "matplotlib"}


@pytest.mark.parametrize(
    "subcommand",
    ["run", "run-stage", "status", "why", "runs", "report", "ui", "deploy", "doctor", "noise", "noise-study", "fetch"],
)
def test_each_command_has_help(command: Clha, subcommand: str):
    done = command(subcommand, "--help")
    assert done.returncode == 0 and "--home" in done.stdout


def test_no_arguments_show_the_help(command: Clha):
    assert "run-stage" in command().stdout


def test_the_version_is_printed(command: Clha):
    assert command("--version").stdout == f"clha {__version__}\n"


BAD_SETTINGS = {
    "unknown key": ("train: {learning_rat: 1.0}", "train.learning_rat", "did you mean `learning_rate`"),
    "wrong type": ("train: {batch_prompts: many}", "train.batch_prompts", "many"),
    "out of range": ("generate: {top_p: 3}", "generate.top_p", "3"),
    "no mapping": ("train: 7", "train", "7"),
    "broken YAML": ("train: {", "settings.yaml", "not valid YAML"),
    "no prepare": ("policy: {model: m}", "prepare", "missing"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_mistake_in_the_settings_is_one_line_that_names_key_and_file(
    command: Clha, home: Home, pairs: Path, tmp_path: Path, case: str
):
    text, key, hint = BAD_SETTINGS[case]
    file = tmp_path / "settings.yaml"
    base = f"    policy: {{model: bundled:tiny-random}}\n    prepare: {{source: chat_jsonl, path: {pairs}}}\n"
    file.write_text("profiles:\n  p:\n" + ("" if case == "no prepare" else base) + f"    {text}\n")
    before = files_below(home.root)
    message = one_line(command("run", "--config", str(file)))
    assert key in message and hint in message and "settings.yaml" in message
    assert files_below(home.root) == before


BAD_REQUESTS = {
    "run name with a slash": (("--run", "a/b"), "run name 'a/b'"),
    "run name that climbs": (("--run", "../b"), "run name '../b'"),
    "unknown stage": (("--only", "trian"), "no stage `trian`"),
    "unknown profile": (("--profile", "demp"), "no profile `demp`; did you mean `demo`?"),
    "from and only": (("--from", "train", "--only", "train"), "exclude each other"),
    "nothing recorded": (("--from", "train", "--run", "new"), "no run `new`"),
    "missing file": (("--set", "prepare.path=nowhere.jsonl"), "no file at"),
    "no model folder": (("--set", "policy.model=nowhere"), "no such folder"),
    "unknown bundled model": (("--set", "policy.model=bundled:gpt-9"), "bundled:gpt-9"),
    "unknown option": (("--frobnicate",), "No such option: --frobnicate"),
    "malformed --set": (("--set", "train.margin"), "KEY=VALUE"),
    "unknown key in --set": (("--set", "train.margn=1"), "did you mean `margin`"),
    "missing settings file": (("--config", "none.yaml"), "none.yaml: no such file"),
    "time limit below zero": (("--set", "execution.timeout_minutes=-1"), "timeout_minutes"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_one_line_and_writes_nothing(command: Clha, home: Home, on_pairs: tuple[str, ...], case: str):
    arguments, expected = BAD_REQUESTS[case]
    before = files_below(home.root)
    assert expected in one_line(command("run", *on_pairs, *arguments))
    assert files_below(home.root) == before


def test_a_policy_that_is_no_model_is_one_line_that_names_its_folder_and_writes_nothing(
    command: Clha, home: Home, on_pairs: tuple[str, ...], tmp_path: Path
):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"")
    before = files_below(home.root)
    message = one_line(command("run", *on_pairs, "--set", f"policy.model={folder}"))
    assert str(folder) in message and "no *.safetensors (pickled weights are not read)" in message
    assert files_below(home.root) == before


def test_a_bad_request_makes_no_home(command: Clha, tmp_path: Path, on_pairs: tuple[str, ...]):
    one_line(command("run", *on_pairs, "--home", str(tmp_path / "new"), "--set", "prepare.path=nowhere"))
    assert not (tmp_path / "new").exists()


def test_a_home_that_cannot_be_written_is_one_line(command: Clha, tmp_path: Path, on_pairs: tuple[str, ...]):
    (tmp_path / "file").write_text("")
    message = one_line(command("run", *on_pairs, "--home", str(tmp_path / "file" / "home")))
    assert "cannot be written" in message and "CLHA_HOME" in message


@pytest.mark.parametrize("subcommand", ["status", "why", "report", "noise"])
def test_commands_that_show_a_run_name_the_runs_there_are(command: Clha, subcommand: str):
    assert "no run" in one_line(command(subcommand))
    assert "no run `other`" in one_line(command(subcommand, "--run", "other"))


def test_a_stage_alone_needs_a_run_that_is_there(command: Clha, home: Home):
    before = files_below(home.root)
    assert "no run `new`" in one_line(command("run-stage", "prepare", "--run", "new"))
    assert "no stage `prepar`" in one_line(command("run-stage", "prepar", "--run", "new"))
    assert files_below(home.root) == before


def test_a_run_in_progress_is_not_started_twice(command: Clha, home: Home, on_pairs: tuple[str, ...]):
    with run_lock(home, "smoke"):
        before = files_below(home.root)
        message = one_line(command("run", *on_pairs))
        assert files_below(home.root) == before
    assert "run smoke is in progress" in message


def test_a_run_waits_for_the_one_in_progress_when_asked(
    command: Clha, home: Home, on_pairs: tuple[str, ...], tmp_path: Path
):
    arguments = ["run", *on_pairs, "--only", "prepare", "--no-prefect", "--wait"]
    with run_lock(home, "smoke"):
        waiting = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            env={**os.environ, "CLHA_HOME": str(home.root)},
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(3)
        assert waiting.poll() is None and not (home.runs / "smoke.json").exists()
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and "built" in output


def test_a_taken_port_is_one_line_that_says_how_to_choose_another(command: Clha, on_pairs: tuple[str, ...]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for done in (command("ui", "--port", port), command("deploy", *on_pairs, "--port", port)):
            message = one_line(done)
            assert f"port {port}" in message and "--port" in message


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_what_is_no_port_is_one_line_and_starts_no_server(
    command: Clha, home: Home, on_pairs: tuple[str, ...], port: str
):
    before = files_below(home.root)
    for done in (command("ui", "--port", port), command("deploy", *on_pairs, "--port", port)):
        message = one_line(done)
        assert port in message and "--port" in message and "starting" not in done.stdout
    assert files_below(home.root) == before


def test_a_server_that_is_named_but_gone_is_one_line_and_begins_no_run(
    command: Clha, home: Home, on_pairs: tuple[str, ...]
):
    done = command("run", *on_pairs, "--only", "prepare", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert "PREFECT_API_URL=http://127.0.0.1:9/api" in one_line(done)
    assert not list(home.runs.iterdir())


def test_bad_data_is_one_line_with_the_number_of_the_line(
    command: Clha, home: Home, on_pairs: tuple[str, ...], tmp_path: Path
):
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"messages"\n')
    arguments = (*on_pairs, "--only", "prepare", "--no-prefect", "--set", f"prepare.path={tmp_path}/bad.jsonl")
    done = command("run", *arguments)
    message = done.stderr
    assert done.returncode == 2 and message.count("\n") == 1 and message.startswith("error: prepare: ")
    assert "line 2" in done.stdout + message
    assert not (home.artifacts / "prepare").exists()


def test_empty_data_is_one_line(command: Clha, on_pairs: tuple[str, ...], tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    done = command(
        "run", *on_pairs, "--only", "prepare", "--no-prefect", "--set", f"prepare.path={tmp_path}/empty.jsonl"
    )
    assert done.returncode == 2 and done.stderr.startswith("error: prepare: ") and done.stderr.count("\n") == 1


def test_too_little_free_disk_is_one_line(command: Clha, on_pairs: tuple[str, ...]):
    done = command("run", *on_pairs, "--only", "prepare", "--no-prefect", "--set", "execution.min_free_disk_gb=1e9")
    assert "min_free_disk_gb" in one_line(done)


def test_fetch_makes_a_profiles_models_once_and_names_one_that_is_not_there(command: Clha, home: Home, root: Path):
    folder = home.models / "tiny-random"
    shutil.rmtree(folder)
    asked = ("fetch", "--config", str(root / "pipelines.yaml"), "--profile", "smoke")
    done = command(*asked)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("bundled:tiny-random: ")
    assert (folder / "model.safetensors").is_file()
    made = folder.stat().st_mtime_ns
    again = command(*asked)
    assert again.returncode == 0 and "converting" not in again.stdout and folder.stat().st_mtime_ns == made
    missing = command(*asked, "--set", "policy.model=/nowhere")
    assert missing.returncode == 2 and "no such folder" in one_line(missing)


def test_doctor_says_what_there_is_and_what_is_amiss(command: Clha, on_pairs: tuple[str, ...]):
    done = command("doctor", *on_pairs[:4], "--json")
    body = json.loads(done.stdout)
    assert (
        isinstance(body["instruction_sets"], list)
        and body["packages"]["torch"]
        and body["cpus"] >= 1
        and body["free_disk_gb"] > 0
        and body["devices"]
    )
    assert done.returncode == (1 if body["problems"] else 0)
    missing = command("doctor", "--config", "none.yaml")
    assert missing.returncode == 1 and "none.yaml: no such file" in missing.stdout
