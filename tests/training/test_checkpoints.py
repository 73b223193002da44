"""Checkpoints that are whole, and what is resumed from: by itself, by path, in no other trainer's."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from training_cases import files, trainer, weights

from clha.errors import TransientFailure, UserError
from clha.training import checkpoints
from clha.training.checkpoints import is_complete, last_checkpoint, mark_complete
from clha.training.metrics import metric_rows

STEPS = {"save_strategy": "steps", "save_steps": 2}


def zero_tail(path: Path, kept: int) -> None:
    """The right size, but zeros from byte `kept` on: what a crash leaves where nothing was flushed."""
    size = path.stat().st_size
    with open(path, "rb+") as f:
        f.truncate(kept)
        f.truncate(size)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_file_of_the_right_size_whose_end_is_zeros_is_half_written(tmp_path: Path, name: str):
    made = trainer(tmp_path, **STEPS)
    made.train()
    path = tmp_path / "checkpoint-4" / name
    zero_tail(path, path.stat().st_size - 200)
    said: list[str] = []
    found = last_checkpoint(tmp_path, said.append)
    assert found == tmp_path / "checkpoint-2"
    assert said == ["checkpoint-4 is half-written; the one before it is taken"]


def test_of_a_large_file_samples_are_looked_at_its_end_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """64 pieces of 16 bytes out of 10,000: starts 0, 158, 316, ... 9984. Between two of them nothing is seen."""
    monkeypatch.setattr(checkpoints, "_PIECE", 16)
    path = tmp_path / "large"
    for changed_at, whole in ((0, False), (158, False), (9983, True), (9984, False), (9999, False), (100, True)):
        data = bytearray(b"x" * 10_000)
        path.write_bytes(data)
        mark_complete(tmp_path)
        data[changed_at] = 0
        path.write_bytes(data)
        assert is_complete(tmp_path) is whole, changed_at


def test_resuming_alone_passes_over_a_half_written_checkpoint_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    whole = trainer(tmp_path / "whole", **STEPS)
    whole.train()
    trainer(tmp_path / "run", **STEPS).train()
    zero_tail(tmp_path / "run" / "checkpoint-4" / "model.safetensors", 5000)
    with caplog.at_level(logging.WARNING, logger="clha.training"):
        again = trainer(tmp_path / "run", **STEPS)
        again.train(resume_from_checkpoint=True)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("clha.")] == [
        "checkpoint-4 is half-written; the one before it is taken"
    ]
    assert torch.equal(weights(again.model), weights(whole.model))
    assert is_complete(tmp_path / "run" / "checkpoint-4")


def test_what_another_trainer_wrote_is_passed_over_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A plain Trainer's checkpoints have no list of their files: none is resumed from, none is removed."""
    trainer(tmp_path, **STEPS).train()
    for path in tmp_path.glob("checkpoint-*"):
        (path / "complete.json").unlink()
    before = files(tmp_path)
    with caplog.at_level(logging.WARNING, logger="clha.training"), pytest.raises(ValueError, match="give it the path"):
        trainer(tmp_path, **STEPS).train(resume_from_checkpoint=True)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("clha.")] == [
        f"checkpoint-{step} is half-written or another trainer's; the one before it is taken" for step in (4, 2)
    ]
    assert files(tmp_path) == before
    again = trainer(tmp_path, **STEPS)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_a_checkpoint_that_cannot_be_read_is_no_half_written_one(tmp_path: Path):
    """A disk that fails for a moment must not cost work: a link to itself is an error of the system, too."""
    trainer(tmp_path, **STEPS).train()
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    path.rename(tmp_path / "aside")
    path.symlink_to(path.name)
    with pytest.raises(TransientFailure, match=r"checkpoint-4 cannot be read \(.*; nothing was changed"):
        last_checkpoint(tmp_path, print)
    path.unlink()
    (tmp_path / "aside").rename(path)
    assert last_checkpoint(tmp_path, print) == tmp_path / "checkpoint-4"


def test_the_last_whole_checkpoint_goes_only_when_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two are kept: 2 and what another trainer left. The run that goes on from 2 breaks off while it saves 4."""
    trainer(tmp_path, **STEPS).train()
    (tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-99")
    (tmp_path / "checkpoint-99" / "complete.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("clha.training.saving.mark_complete", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, **STEPS, save_total_limit=2).train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path, print) == tmp_path / "checkpoint-2"
    again = trainer(tmp_path, **STEPS, save_total_limit=2)
    again.train(resume_from_checkpoint=True)
    assert again.args.save_total_limit == 2
    assert is_complete(tmp_path / "checkpoint-4") and len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_checkpoint_between_two_logs_loses_no_metrics(tmp_path: Path):
    """Logs every 2 steps, a checkpoint after 3: the steps are logged there as well, so that the table is the same."""
    settings = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "run", **settings)
    whole.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = trainer(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=True)
    ours, theirs = (metric_rows(made.state.log_history) for made in (again, whole))
    assert [row["step"] for row in ours] == [2, 3, 4, 6]
    for mine, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in mine.items() if "perf/" not in k} == {
            k: v for k, v in other.items() if "perf/" not in k
        }


def test_where_only_the_best_are_saved_nothing_measured_is_lost_either(tmp_path: Path):
    """Logs every 4 steps; the first evaluation is the best until then, so that checkpoint-1 cuts an interval."""
    settings = {"max_steps": 4, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    settings["metric_for_best_model"] = "rewards/accuracies"
    whole = trainer(tmp_path, **settings)
    whole.train()
    again = trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    ours, theirs = (metric_rows(made.state.log_history) for made in (again, whole))
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "loss/sft", "rewards/margins", "num_tokens", "eval_loss"):
            assert mine[name] == other[name], name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two of four steps."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(folder, **STEPS).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("listed", [True, False], ids=["ours", "another trainer's"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_given_by_its_path_with_a_file_cut_off_is_refused(
    saved: Path, tmp_path: Path, name: str, listed: bool
):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(saved, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    if not listed:
        (folder / "complete.json").unlink()
    what = "it is half-written, or was changed since it was saved" if listed else f"{name} cannot be read: half-written"
    made = trainer(tmp_path)
    with pytest.raises(UserError, match=rf"{folder}: {what}; resume_from_checkpoint=True takes the newest") as caught:
        made.train(resume_from_checkpoint=folder)
    assert "\n" not in str(caught.value) and made.state.global_step == 0


@pytest.mark.parametrize("name", ["optimizer", "scheduler"])
def test_a_checkpoint_given_by_its_path_without_its_states_is_refused(saved: Path, tmp_path: Path, name: str):
    """transformers would go on with a fresh optimizer."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(saved, folder)
    (folder / f"{name}.pt").unlink()
    (folder / "complete.json").unlink()
    with pytest.raises(UserError, match=f"it holds no {name} to go on with .*save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    with pytest.raises(UserError, match="nowhere: there is no such folder; resume_from_checkpoint=True"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_checkpoints_of_weights_alone_are_not_gone_on_from(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    trainer(tmp_path, save_only_model=True, **STEPS).train()
    with caplog.at_level(logging.WARNING, logger="clha.training"), pytest.raises(ValueError, match="no complete"):
        trainer(tmp_path, **STEPS).train(resume_from_checkpoint=True)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("clha.")] == [
        f"checkpoint-{step} is without states to go on with (save_only_model); the one before it is taken"
        for step in (4, 2)
    ]
    with pytest.raises(UserError, match="it holds no optimizer and no scheduler to go on with"):
        trainer(tmp_path, **STEPS).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_alone_without_a_whole_checkpoint_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="no complete checkpoint in .*; train without resume_from_checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
