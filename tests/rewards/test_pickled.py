"""Pickled weights: read once, tensors only, in a process of their own."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clha.errors import UserError
from clha.rewards.pickled import convert


def run(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clha.rewards.pickled", str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_pickled_folder_becomes_one_with_safetensors(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    weights = {"x.weight": torch.arange(6.0).reshape(2, 3), "x.bias": torch.ones(2)}
    torch.save(weights, source / "pytorch_model.bin")
    (source / "config.json").write_text("{}")
    done = run(source, target)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in target.iterdir()} == {"model.safetensors", "config.json"}
    loaded = load_file(target / "model.safetensors")
    assert all(torch.equal(loaded[name], t) for name, t in weights.items())


def test_several_files_keep_their_tensors(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    for i in (1, 2):
        torch.save({f"x{i}": torch.full((2,), float(i))}, source / f"pytorch_model-0000{i}-of-00002.bin")
    convert(source, target)
    names = sorted(p.name for p in target.iterdir())
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert load_file(target / names[1])["x2"].tolist() == [2.0, 2.0]


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    tied = torch.ones(3)
    torch.save({"a": tied, "b": tied}, source / "pytorch_model.bin")
    convert(source, target)
    assert set(load_file(target / "model.safetensors")) == {"a", "b"}


class Payload:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.touched,)


def test_code_inside_a_pickle_is_never_run(tmp_path: Path) -> None:
    source, target, touched = tmp_path / "a", tmp_path / "b", tmp_path / "touched"
    source.mkdir()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(touched)))
    done = run(source, target)
    assert done.returncode == 1
    assert "is not read, it holds more than tensors or is damaged" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not touched.exists()
    assert not target.exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_folder_without_pickled_weights_and_a_taken_target_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no pickled weights"):
        convert(tmp_path, tmp_path / "b")
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, "in a part of it ('state_dict')"),
        ({"step": torch.tensor(1), "model": {"w": torch.ones(2)}, "optimizer": {}}, "('model' or 'optimizer')"),
        ({"epoch": 3}, "has no named tensors"),
        ({}, "has no named tensors"),
        ({0: torch.ones(2)}, "has no named tensors"),
        ([torch.ones(2)], "has no named tensors"),
    ],
    ids=["nested", "nested beside a tensor", "numbers", "empty", "numbered", "a list"],
)
def test_a_file_without_named_tensors_makes_no_model(tmp_path: Path, content: object, said: str) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(UserError) as raised:
        convert(source, target)
    assert said in str(raised.value) and str(source / "pytorch_model.bin") in str(raised.value)
    assert not target.exists() and not list(tmp_path.glob(".tmp-*"))


def test_what_training_leaves_beside_the_weights_is_ignored(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    beside = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"]
    for name in (*beside, "training_args.bin"):
        torch.save({"state": {0: torch.ones(2)}}, source / name)
    with pytest.raises(UserError, match="has no pickled weights"):
        convert(source, target)
    torch.save({"w": torch.ones(2)}, source / "pytorch_model.bin")
    assert [f.name for f in convert(source, target)] == ["pytorch_model.bin"]
    assert [f.name for f in target.iterdir()] == ["model.safetensors"]
