"""The scripts in benchmarks/ run on a tiny model; people look at their figures."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chains import ROOT, environment


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in the form of HH-RLHF."""
    path = tmp_path_factory.mktemp("pairs") / "hh.jsonl"
    rows = []
    for i in range(24):
        question = f"\n\nHuman: What is {i} plus {i}, please?\n\nAssistant:"
        rows.append({"chosen": f"{question} It is {i + i}.", "rejected": f"{question} Who wants to know? Not I."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(home: Path, script: str, *arguments: str | Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_all_ways_of_a_step_have_the_same_loss(tiny_model: Path, pairs: Path, tmp_path: Path):
    out = printed(
        tmp_path, "train_step.py", tiny_model, "--data", pairs, "--ways", "ours,reference", "--rounds", "1",
        "--prompts", "4", "--n", "3",
    )  # fmt: skip
    losses = {way: float(loss) for way, loss in re.findall(r"^(ours|reference) .* loss ([\d.]+)$", out, re.MULTILINE)}
    assert set(losses) == {"ours", "reference"}
    assert losses["ours"] == pytest.approx(losses["reference"], rel=1e-4)


@pytest.mark.slow
def test_what_grows_is_printed(tiny_model: Path, pairs: Path, tmp_path: Path):
    arguments = ("--prompts", "2", "--n", "2", "--rounds", "1", "--rows", "4000")
    out = printed(tmp_path, "growth.py", tiny_model, "--data", pairs, *arguments)
    assert "1000 prompts" in out.replace(",", "")


@pytest.mark.slow
def test_the_parts_of_a_step_are_printed(tiny_model: Path, pairs: Path, tmp_path: Path):
    out = printed(tmp_path, "profile_step.py", tiny_model, "--data", pairs, "--prompts", "2", "--n", "2")
    assert "products with weight matrices" in out


@pytest.mark.slow
def test_ways_of_scoring_have_the_same_features(tiny_model: Path, tmp_path: Path):
    out = printed(tmp_path, "score.py", tiny_model, "--prompts", "6", "--layer", "1", "--rounds", "1")
    (difference,) = re.findall(r"largest difference of a feature: ([\d.e+-]+) of the largest", out)
    assert float(difference) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--method", "calibrated", "--labels")], ids=["", "labels"])
def test_weights_of_many_prompts_are_made(tmp_path: Path, more: tuple[str, ...]):
    assert re.search(r"[\d.]+ s", printed(tmp_path, "weights.py", "--prompts", "2000", *more))


@pytest.mark.slow
def test_generating_is_timed_against_bare_vllm(tmp_path: Path):
    arguments = ("--model", "bundled:tiny-random", "--prompts", "4", "--n", "2", "--max-tokens", "4", "--rounds", "1")
    assert "bare, plain" in printed(tmp_path, "generate.py", *arguments, "--home", tmp_path)
