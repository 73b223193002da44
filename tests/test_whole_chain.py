"""The whole chain on the smoke profile, with real vLLM and real Prefect."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from chains import ROOT, artifact_folder, clha, file_digests, referee, run_file


def snapshot(home: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of everything under artifacts/."""
    files = (p for p in (home / "artifacts").rglob("*") if p.is_file())
    return {str(p.relative_to(home)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def test_it_ends_with_a_report_a_verdict_and_the_way_to_the_ui(smoke_home: Path):
    output = (smoke_home / "output.txt").read_text()
    assert (smoke_home / "reports" / "smoke" / "report.html").is_file()
    assert "report.html" in output and "clha ui" in output
    assert "held-out reward" in output.lower()


def test_the_referee_finds_nothing_broken(smoke_home: Path, shared: Path):
    referee(shared, smoke_home, "smoke")


def test_every_prompt_of_train_and_dev_has_candidates_rewards_and_weights_or_is_quarantined(smoke_home: Path):
    def ids(node: str, table: str) -> list[str]:
        files = sorted(artifact_folder(smoke_home, "smoke", node).glob(f"{table}-*.parquet"))
        return [i for f in files for i in pq.read_table(f, columns=["prompt_id"])["prompt_id"].to_pylist()]

    folder = artifact_folder(smoke_home, "smoke", "prepare")
    prompts = [r for f in folder.glob("prompts-*.parquet") for r in pq.read_table(f).to_pylist()]
    wanted = {r["prompt_id"] for r in prompts if r["split"] in ("train", "dev")}
    assert wanted == set(ids("generate", "candidates")) | set(ids("generate", "quarantine"))
    assert len(ids("weigh", "weights")) == len(set(ids("weigh", "weights")))
    assert set(ids("weigh", "weights")) | set(ids("weigh", "quarantine")) == set(ids("score", "rewards"))


def test_no_work_and_no_temporary_file_is_left(smoke_home: Path):
    assert not [p for p in (smoke_home / "work").rglob("*") if p.is_file()]
    assert not [p for p in (smoke_home / "artifacts").rglob("*") if ".tmp" in p.name]


def test_a_second_run_does_nothing_and_says_so(smoke_home: Path):
    before = snapshot(smoke_home)
    done = clha(smoke_home, "run", "--profile", "smoke", "--run", "smoke")
    assert snapshot(smoke_home) == before
    assert "nothing to do" in done.stdout.lower() or "up to date" in done.stdout.lower()


@pytest.mark.slow
def test_a_changed_training_setting_reuses_generation_and_scores(smoke_copy: Path):
    nodes = run_file(smoke_copy, "smoke")["nodes"]
    clha(smoke_copy, "run", "--profile", "smoke", "--run", "smoke", "--set", "train.margin=0.7")
    after = run_file(smoke_copy, "smoke")["nodes"]
    changed = {name for name in nodes if nodes[name] != after[name]}
    assert changed == {"train", "answers.trained", "evaluate"}


def test_fewer_training_prompts_leave_reward_models_and_the_answers_of_the_base_as_they_are(smoke_copy: Path):
    clha(smoke_copy, "run-stage", "prepare", "--run", "smoke", "--set", "prepare.limits.train=9")
    nodes = json.loads(clha(smoke_copy, "status", "--run", "smoke", "--json").stdout)["nodes"]
    states = {row["node"]: row["state"] for row in nodes}
    kept = {"prepare", "fit_reward.train", "fit_reward.eval", "answers.base"}
    assert {name for name, state in states.items() if state == "fresh"} == kept
    why = clha(smoke_copy, "why", "generate", "--run", "smoke", "--set", "prepare.limits.train=9").stdout
    assert why.count("\n") == 1 and "generate: inputs.prepare.train: " in why


def test_another_run_with_the_same_settings_shares_every_artifact(smoke_copy: Path):
    before = snapshot(smoke_copy)
    clha(smoke_copy, "run", "--profile", "smoke", "--run", "other")
    assert snapshot(smoke_copy) == before
    assert run_file(smoke_copy, "other")["nodes"] == run_file(smoke_copy, "smoke")["nodes"]


def test_a_stage_run_alone_without_prefect_makes_the_same_artifact(smoke_copy: Path, smoke_home: Path):
    for kind in ("score", "weigh"):
        shutil.rmtree(smoke_copy / "artifacts" / kind)
    clha(smoke_copy, "run-stage", "rescore", "--run", "smoke")
    for node in ("score", "weigh"):
        assert file_digests(smoke_copy, "smoke", node) == file_digests(smoke_home, "smoke", node)


@pytest.mark.slow
def test_force_builds_anew_under_another_key_and_keeps_the_old_artifact(smoke_copy: Path):
    old = artifact_folder(smoke_copy, "smoke", "weigh")
    clha(smoke_copy, "run", "--profile", "smoke", "--run", "smoke", "--only", "rescore", "--force")
    new = artifact_folder(smoke_copy, "smoke", "weigh")
    assert new != old and old.is_dir() and new.is_dir()


def test_status_tells_key_state_folder_and_rows_of_each_node(smoke_home: Path):
    rows = json.loads(clha(smoke_home, "status", "--run", "smoke", "--json").stdout)
    rows = rows["nodes"] if isinstance(rows, dict) else rows
    assert {r["node"] for r in rows} == set(run_file(smoke_home, "smoke")["nodes"])
    for row in rows:
        assert row["state"] == "fresh" and Path(row["folder"]).is_dir() and row["key"] in row["folder"]
        assert row["rows_in"] == row["rows_out"] + row["rows_quarantined"]


def test_why_answers_in_one_line(smoke_home: Path):
    done = clha(smoke_home, "why", "train", "--run", "smoke")
    assert done.stdout.count("\n") == 1 and "up to date" in done.stdout


def test_the_noise_of_a_run_is_shown_without_its_models(smoke_home: Path):
    shown = clha(smoke_home, "noise", "--run", "smoke").stdout
    assert "pairs kept" in shown and "effective sample size" in shown and "reward model" in shown
    facts = json.loads(clha(smoke_home, "noise", "--json").stdout)
    manifest = json.loads((artifact_folder(smoke_home, "smoke", "weigh") / "manifest.json").read_text())
    assert facts["run"] == "smoke" and facts["kept"] == manifest["pairs_kept"] and facts["pairs"] == manifest["pairs"]
    assert facts["effective"] == pytest.approx(manifest["effective_sample_size"])
    assert facts["cut"] == manifest["gap"]


def test_content_digests_are_those_on_record_unless_the_code_version_changed(smoke_home: Path):
    """Fails when a stage's output changes without its CODE_VERSION: then cached artifacts would be stale.

    Only nodes whose output does not depend on the processor's floating point are held to digests of bytes.
    """
    record = json.loads((ROOT / "tests" / "smoke_digests.json").read_text())
    folder = artifact_folder(smoke_home, "smoke", "prepare")
    manifest = json.loads((folder / "manifest.json").read_text())
    digests = {f["name"]: f["sha256"] for f in manifest["files"] if f["name"].startswith("prompts-")}
    assert record["prepare"] == {"code_version": manifest["code_version"], "files": digests}, (
        "prepare's output changed: raise CODE_VERSION in clha/stages/prepare.py and record the new digests"
    )


@pytest.mark.slow
def test_a_run_on_real_data_ends_in_a_report_and_the_referee_is_content(shared: Path, tmp_path: Path):
    home = tmp_path / "home"
    data = shared / "hh-rlhf" / "harmless-base.jsonl.gz"
    clha(
        home, "run", "--profile", "smoke", "--run", "hh",
        "--set", "prepare.source=hh_rlhf", "--set", f"prepare.path={data}",
    )  # fmt: skip
    referee(shared, home, "hh")
