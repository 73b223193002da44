"""What surrounds the stages: which of them a request builds, the plan, attempts, locks, the report, the verdict."""

from dataclasses import replace
from pathlib import Path

import pytest
from flow_cases import files_below

from clha.errors import StageFailure, UserError
from clha.runs import existing_run, load_run, save_run
from clha.stages import runner
from clha.stages.report import report_is_fresh
from clha.store import Busy, Home
from flows import launch
from flows.launch import Request


def silent(node: str, event: dict[str, object]) -> None:
    """A listener that shows nothing."""


@pytest.fixture
def request_on_pairs(home: Home, pairs: Path, root: Path) -> Request:
    data = ("prepare.source=chat_jsonl", f"prepare.path={pairs}")
    return Request(home.root, root / "pipelines.yaml", "smoke", None, data)


@pytest.fixture
def prepared(request_on_pairs: Request) -> launch.Job:
    """A run of which `prepare` is built."""
    job = launch.accept(replace(request_on_pairs, only="prepare"))
    launch.begin(job)
    launch.run_stages(job, silent)
    return launch.accept(request_on_pairs)


def test_a_request_builds_all_stages_or_those_from_one_on_or_one_alone():
    request = Request(Path("home"), Path("settings.yaml"))
    assert request.stages() == ("prepare", "fit_reward", "generate", "rescore", "train", "evaluate")
    assert replace(request, from_stage="train").stages() == ("train", "evaluate")
    assert replace(request, only="generate").stages() == ("generate",)


def test_the_run_is_named_after_the_profile_unless_it_is_given_a_name(request_on_pairs: Request):
    assert launch.accept(request_on_pairs).name == "smoke"
    assert launch.accept(replace(request_on_pairs, run="other")).name == "other"


def test_an_adapter_that_is_not_merged_is_refused_where_it_would_be_evaluated(request_on_pairs: Request):
    request = replace(request_on_pairs, overrides=(*request_on_pairs.overrides, "train.lora={merge: false}"))
    with pytest.raises(UserError, match="train.lora.merge is false: an adapter alone cannot be evaluated"):
        launch.accept(request)
    assert launch.accept(replace(request, only="prepare")).settings.train.lora is not None


def test_a_plan_knows_what_is_stale_and_what_must_wait(request_on_pairs: Request):
    states = {entry.node.name: entry.state for entry in launch.plan(launch.accept(request_on_pairs))}
    assert states["prepare"] == "stale"
    assert {state for name, state in states.items() if name != "prepare"} == {"waiting"}


def test_a_plan_takes_what_comes_before_as_the_run_recorded_it(prepared: launch.Job, request_on_pairs: Request):
    changed = (*request_on_pairs.overrides, "prepare.split_seed=5")
    whole = launch.plan(launch.accept(replace(request_on_pairs, overrides=changed)))
    assert whole[0].state == "stale" and whole[1].state == "waiting"
    rest = launch.plan(launch.accept(replace(request_on_pairs, from_stage="fit_reward")))
    assert rest[0].node.name == "fit_reward.train" and rest[0].state == "stale"


def test_a_plan_says_which_input_was_never_built(prepared: launch.Job, request_on_pairs: Request):
    with pytest.raises(UserError, match=r"no finished prepare|no finished (generate|score)"):
        launch.plan(launch.accept(replace(request_on_pairs, only="train")))


def test_force_counts_an_attempt_for_the_nodes_to_build_and_changes_their_keys_only(
    prepared: launch.Job, request_on_pairs: Request
):
    before = existing_run(prepared.home, "smoke")
    forced = launch.accept(replace(request_on_pairs, only="prepare", force=True))
    run = launch.begin(forced)
    assert run.attempts == {"prepare": 1}
    launch.run_stages(forced, silent)
    after = existing_run(prepared.home, "smoke")
    assert after.nodes["prepare"] != before.nodes["prepare"]
    assert prepared.home.find("prepare", before.nodes["prepare"]) is not None
    again = launch.accept(replace(request_on_pairs, only="prepare"))
    assert [entry.state for entry in launch.plan(again)] == ["fresh"]


def test_recording_a_run_of_which_all_is_there_writes_nothing_the_second_time(request_on_pairs: Request, home: Home):
    first = launch.accept(replace(request_on_pairs, only="prepare"))
    launch.begin(first)
    launch.run_stages(first, silent)
    other = launch.accept(replace(request_on_pairs, only="prepare", run="other"))
    launch.record_fresh(other, launch.plan(other))
    assert existing_run(home, "other").nodes == {"prepare": existing_run(home, "smoke").nodes["prepare"]}
    before = files_below(home.root)
    launch.record_fresh(other, launch.plan(other))
    assert files_below(home.root) == before


def test_amending_a_run_saves_the_changed_setting_and_refuses_a_wrong_one(prepared: launch.Job):
    run = existing_run(prepared.home, "smoke")
    launch.amend(prepared.home, run, "train", ["train.margin=0.5"], force=False)
    saved = load_run(prepared.home, "smoke")
    assert saved is not None and saved.settings["train"]["margin"] == 0.5 and saved.attempts == {}
    with pytest.raises(UserError, match="did you mean `margin`"):
        launch.amend(prepared.home, run, "train", ["train.margn=0.5"], force=False)


def test_the_lock_of_a_run_is_shared_inside_one_process_and_held_against_others(home: Home):
    with launch.locked(home, "r"):
        with launch.locked(home, "r"):
            pass
        with pytest.raises(Busy), home.lock("run-r"):
            pass
    with home.lock("run-r"):
        pass


def test_a_report_is_fresh_while_the_run_points_at_what_it_shows(prepared: launch.Job):
    home = prepared.home
    run = existing_run(home, prepared.name)
    assert not report_is_fresh(home, run)
    page = launch.build_report(home, run.name, prepared.settings, silent)
    run = existing_run(home, prepared.name)
    assert report_is_fresh(home, run)
    body = page.read_text()
    page.unlink()
    assert not report_is_fresh(home, run), "recorded, but not there"
    page.write_text(body)
    assert report_is_fresh(home, run)
    run.nodes["prepare"] = "another"
    assert not report_is_fresh(home, run)


def test_what_is_taken_as_recorded_keeps_the_settings_that_it_was_made_with(prepared: launch.Job):
    """Otherwise the run file would say that the finished artifact came from data that it never saw."""
    asked = replace(prepared.request, overrides=(), only="fit_reward")
    elsewhere = launch.accept(replace(asked, overrides=("fit_reward.train.seed=7",)))
    assert elsewhere.settings.prepare == prepared.settings.prepare and elsewhere.settings.fit_reward is not None
    assert elsewhere.settings.fit_reward.train.seed == 7
    with pytest.raises(UserError, match=r"^--set prepare.split_seed=5: prepare is not built now but taken as run "):
        launch.accept(replace(asked, overrides=("prepare.split_seed=5",)))


def test_a_finished_stage_is_looked_at_and_built_upon_without_its_data(prepared: launch.Job, tmp_path: Path):
    gone = str(tmp_path / "moved.jsonl")
    run = existing_run(prepared.home, prepared.name)
    run.settings["prepare"]["path"] = [gone]
    save_run(prepared.home, run)
    rows = runner.status(prepared.home, run, launch.saved_settings(run))
    states = {row["node"]: row["state"] for row in rows}
    assert states["prepare"] == "unknown" and gone in rows[0]["reason"] and rows[0]["rows_out"]
    assert states["generate"] == "stale", "planned on what the run recorded"
    job = launch.accept(replace(prepared.request, overrides=(), only="fit_reward"))
    assert {entry.state for entry in launch.plan(job)} == {"stale"}
    with pytest.raises(UserError, match="no file at"):
        launch.accept(replace(prepared.request, overrides=(f"prepare.path={gone}",)))


def test_a_damaged_input_is_put_aside_and_built_anew(prepared: launch.Job):
    home = prepared.home
    folder = home.artifact_folder("prepare", existing_run(home, prepared.name).nodes["prepare"])
    shard = folder / "prompts-00000.parquet"
    whole = shard.read_bytes()
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    job = launch.accept(replace(prepared.request, overrides=(), only="fit_reward"))
    with pytest.raises(StageFailure, match=r"input prepare was damaged on disk \(prompts-00000.parquet .*run again"):
        launch.run_stages(job, silent)
    assert not folder.exists() and list((home.root / "damaged" / "prepare").iterdir())
    launch.run_stages(replace(prepared, stages=("prepare",)), silent)
    assert shard.read_bytes() == whole


def test_a_report_that_cannot_be_built_is_one_line_with_its_log(prepared: launch.Job):
    prepared.home.reports.write_text("a file where the folder should be")
    with pytest.raises((UserError, StageFailure), match=r"^report: [^\n]+report\.log\)$"):
        launch.build_report(prepared.home, "smoke", prepared.settings, silent)


@pytest.mark.parametrize(
    ("interval", "said"),
    [([0.1, 0.5], "is better"), ([-0.1, 0.5], "not told apart"), ([-0.5, -0.1], "is worse")],
)
def test_the_verdict_says_what_the_interval_allows(interval: list[float], said: str):
    reward = {"base": 0.25, "trained": 0.5, "gain": 0.25, "interval": interval, "prompts": 96, "p_value": 0.01}
    same = {"repetition_4": 0.1}
    metrics = {"reward": reward, "judge": {"unseen": True}, "repetition": {"base": same, "trained": same}}
    metrics["silent"] = {"base": 0, "trained": 0, "prompts": 96}
    figures, sentence = launch.outcome(metrics)
    assert "held-out reward 0.25 before, 0.50 after, gain +0.25" in figures
    assert said in sentence and "96 prompts" in sentence


def test_after_a_wait_a_job_takes_what_the_run_says_by_then(prepared: launch.Job, request_on_pairs: Request):
    job = launch.accept(replace(request_on_pairs, only="fit_reward"))
    other = launch.accept(replace(request_on_pairs, overrides=(*request_on_pairs.overrides, "generate.seed=77")))
    launch.begin(other)
    assert job.settings.generate.seed != 77
    assert launch.retaken(job).settings.generate.seed == 77
    assert launch.retaken(prepared) is prepared, "it builds everything itself"
