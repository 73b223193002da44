"""Models: what a reference names, bundled ones made in a process of their own, what the Hub is asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from huggingface_hub.utils import filter_repo_objects

from clha import models
from clha.errors import StageFailure, TransientFailure, UserError, reason_of
from clha.models import check_model_folder, check_reference, resolve_model
from clha.store import Home


def test_a_folder_may_have_a_colon_in_its_name(home: Home, tiny_model: Path, tmp_path: Path):
    (tmp_path / "hub2:x").symlink_to(tiny_model)
    assert resolve_model(str(tmp_path / "hub2:x"), home).digest == resolve_model(str(tiny_model), home).digest


@pytest.mark.parametrize("reference", ["bundle:tiny-random", "nowhere", "bundled:none"])
def test_a_reference_to_nothing_says_what_there_is(reference: str):
    with pytest.raises(UserError, match="bundled:name|tiny-random"):
        check_reference(reference)


# files of a folder -> what is said of it
NO_MODELS: dict[str, tuple[dict[str, str], str]] = {
    "no config": ({"model.safetensors": "", "README.md": "# A model"}, "is no model folder (it has no config.json)"),
    "config cut off": ({"config.json": '{"model_type": "llama"', "model.safetensors": ""}, "is not valid JSON"),
    "config not text": ({"config.json": "\udcff\udcfe", "model.safetensors": ""}, "is not valid JSON"),
    "pickled weights": ({"config.json": "{}", "pytorch_model.bin": ""}, "has no *.safetensors"),
    "code of its own": (
        {"config.json": '{"auto_map": {"AutoModel": "modeling_x.X"}}', "model.safetensors": "", "modeling_x.py": ""},
        "needs code of its own (trust_remote_code), which is not run here",
    ),
}


@pytest.mark.parametrize("case", NO_MODELS)
def test_a_folder_that_is_no_model_is_one_line_that_names_the_folder_and_what_is_amiss(tmp_path: Path, case: str):
    files, said = NO_MODELS[case]
    folder = tmp_path / "my model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    for refuse in (check_reference, lambda reference: check_model_folder(Path(reference), reference)):
        with pytest.raises(UserError) as caught:
            refuse(str(folder))
        message = str(caught.value)
        assert message.startswith("model ") and str(folder) in message and said in message and "\n" not in message


def test_what_a_killed_process_left_is_removed_and_its_child_ends_with_it(tmp_path: Path):
    home = Home(tmp_path / "home").create()
    code = "import sys; from pathlib import Path; from clha.models import resolve_model; from clha.store import Home;"
    code += "resolve_model('bundled:tiny-random', Home(Path(sys.argv[1])))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(home.root)])
    child = None
    deadline = time.monotonic() + 60
    while child is None and time.monotonic() < deadline:
        child = next(iter(psutil.Process(parent.pid).children()), None)
        time.sleep(0.01)
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)  # however busy the machine is, it has not finished when its parent dies
    parent.kill()
    parent.wait()
    os.kill(child.pid, signal.SIGCONT)
    assert [p.name for p in home.models.iterdir()] == [f".tmp-{parent.pid}-tiny-random"]

    made = resolve_model("bundled:tiny-random", home)
    assert [p.name for p in home.models.iterdir()] == ["tiny-random"]
    assert json.loads((made.path / "config.json").read_text())["model_type"] == "llama"
    assert not psutil.wait_procs([child], timeout=30)[1]


def test_a_model_that_is_not_made_in_time_is_a_failure_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_MAKING_SECONDS", 0.05)
    home = Home(tmp_path / "home").create()
    with pytest.raises(TransientFailure, match="bundled:tiny-random could not be made in"):
        resolve_model("bundled:tiny-random", home)
    assert not list(home.models.iterdir())


def test_the_error_of_the_making_process_is_one_line_that_names_the_model(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(StageFailure, match="bundled:tiny-random could not be made: NotADirectoryError") as caught:
        models._make_in_child("tiny-random", tmp_path / "file" / "model")
    assert "\n" not in str(caught.value)


def test_only_the_files_at_the_top_of_a_repository_are_fetched():
    """Large repositories hold their weights twice, as meta-llama's do in original/."""
    names = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    others = ["original/model.safetensors", "onnx/config.json", "a/b/c.txt", "pytorch_model.bin", "modeling_x.py"]
    assert (
        list(
            filter_repo_objects(
                [*names, *others], allow_patterns=list(models._MODEL_FILES), ignore_patterns=models._SUBFOLDERS
            )
        )
        == names
    )


def test_a_model_that_cannot_be_fetched_is_one_line():
    with pytest.raises(UserError, match="hub:nobody/nothing: cannot be fetched") as caught:
        models._hub_snapshot("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("message", "said"), [("", "OSError"), (" \n", "OSError"), ("\nno\nroom", "no")])
def test_an_error_without_a_message_is_said_by_its_name(message: str, said: str):
    assert reason_of(OSError(message)) == said
