"""The flows in process: what a scheduled run takes over, and what the UI shows of a stage."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flow_cases import write_pairs

from clha.errors import UserError
from clha.runs import existing_run
from clha.store import Home
from flows import launch, server

AT = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
LATER = datetime(2026, 3, 2, 3, 0, tzinfo=UTC)


@pytest.fixture
def prefect_server(shared_server: server.Server) -> Iterator[None]:
    """Flows of this process go to the shared server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: shared_server.api}):
        yield


@pytest.fixture
def request_on_pairs(home: Home, tmp_path: Path, root: Path) -> launch.Request:
    data = write_pairs(tmp_path / "pairs.jsonl", 160)
    overrides = ("prepare.source=chat_jsonl", f"prepare.path={data}", "schedule.fresh=[data]")
    return launch.Request(home.root, root / "pipelines.yaml", "smoke", None, overrides, only="prepare")


def artifacts(run: str) -> dict[str, Any]:
    """key -> the newest artifact whose key begins with the run's name."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(like_=f"{run}-%")))
    return {artifact.key: artifact for artifact in sorted(found, key=lambda artifact: artifact.created)}


def parameters(request: launch.Request, run: str) -> dict[str, Any]:
    return {
        "run": run,
        "profile": request.profile,
        "config": str(request.config),
        "home": str(request.home),
        "overrides": list(request.overrides),
        "only": request.only,
    }


def test_a_stage_shows_a_summary_its_progress_and_its_quarantine(
    prefect_server: None, request_on_pairs: launch.Request, tmp_path: Path
):
    from flows.pipeline import pipeline
    from flows.present import artifact_key

    with open(tmp_path / "pairs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"messages": [{"role": "user", "content": "Only this?"}], "chosen": "", "rejected": "x"}\n')
    keys = pipeline(**parameters(request_on_pairs, "Shown.1"))
    assert list(keys) == ["prepare"]
    name = artifact_key("Shown.1")
    shown = artifacts(name)
    assert {f"{name}-{what}" for what in ("prepare", "prepare-progress", "prepare-quarantine", "result")} <= set(shown)
    assert "| prepare | built |" in shown[f"{name}-prepare"].data
    assert float(shown[f"{name}-prepare-progress"].data) == 100
    pipeline(**parameters(request_on_pairs, "Shown.1"))
    shown = artifacts(name)
    assert "| prepare | reused |" in shown[f"{name}-prepare"].data
    assert "every stage was reused" in shown[f"{name}-result"].data


def test_a_flow_run_whose_process_died_is_set_to_crashed_and_one_at_work_is_not(
    prefect_server: None, home: Home, monkeypatch: pytest.MonkeyPatch
):
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows import orphans
    from flows.noise_study import noise_study
    from flows.prepare import prepare

    with get_client(sync_client=True) as client:
        made = {
            run: client.create_flow_run(prepare, parameters={"run": run, "home": place}, state=Running(), name=run)
            for run, place in (("dead", str(home.root)), ("alive", str(home.root)), ("foreign", "/somewhere/else"))
        }
        for name in ("dead study", "study"):
            given = {"run": name.partition(" ")[0], "home": str(home.root)}
            made[name] = client.create_flow_run(noise_study, parameters=given, state=Running(), name=name)
        assert orphans.bury(home) == [], "they have only just begun"
        monkeypatch.setattr(orphans, "_YOUNG", timedelta(0))
        with home.lock("run-alive"), home.lock("study-study"):
            assert sorted(orphans.bury(home)) == ["dead", "dead study"]
        states = {run: client.read_flow_run(flow_run.id).state_name for run, flow_run in made.items()}
    alive = {"alive": "Running", "foreign": "Running", "study": "Running"}
    assert states == {"dead": "Crashed", "dead study": "Crashed"} | alive


def test_a_mistake_fails_the_flow_with_its_one_line(prefect_server: None, request_on_pairs: launch.Request):
    from flows.pipeline import pipeline

    wrong = replace(request_on_pairs, overrides=("train.margn=1",))
    with pytest.raises(UserError, match="did you mean `margin`"):
        pipeline(**parameters(wrong, "wrong"))


def test_a_stage_flow_takes_changed_settings_and_force(prefect_server: None, request_on_pairs: launch.Request):
    from flows.pipeline import pipeline
    from flows.prepare import prepare

    first = pipeline(**parameters(request_on_pairs, "amended"))
    home = str(request_on_pairs.home)
    changed = prepare(run="amended", home=home, overrides=["prepare.split_seed=3"])
    forced = prepare(run="amended", home=home, force=True)
    assert len({first["prepare"], changed["prepare"], forced["prepare"]}) == 3
    run = existing_run(Home(request_on_pairs.home), "amended")
    assert run.settings["prepare"]["split_seed"] == 3 and run.attempts == {"prepare": 1}


def test_a_scheduled_run_with_fresh_data_reads_the_source_as_it_is_now(request_on_pairs: launch.Request):
    from flows.pipeline import scheduled

    made = scheduled(request_on_pairs, "smoke-20260301T030000Z", AT, "smoke")
    assert made == replace(request_on_pairs, run="smoke-20260301T030000Z")


def test_a_scheduled_run_with_a_fresh_seed_samples_anew_each_time_and_the_same_when_repeated(
    request_on_pairs: launch.Request,
):
    from flows.pipeline import scheduled

    request = replace(request_on_pairs, overrides=(*request_on_pairs.overrides, "schedule.fresh=[data,seed]"))
    seeds = [
        launch.accept(scheduled(request, f"smoke-{i}", at, "smoke")).settings.generate.seed
        for i, at in enumerate((AT, LATER, AT))
    ]
    assert seeds[0] == seeds[2] != seeds[1]


def test_a_scheduled_run_without_fresh_data_takes_the_prompts_of_the_last_one(request_on_pairs: launch.Request):
    from flows.pipeline import scheduled

    request = replace(request_on_pairs, overrides=(*request_on_pairs.overrides, "schedule.fresh=[]"))
    first = scheduled(request, "smoke-20260301T030000Z", AT, "smoke")
    assert first.from_stage is None, "there is nothing to take over yet"
    job = launch.accept(first)
    launch.begin(job)
    launch.run_stages(job, lambda node, event: None)

    source = Path(next(o for o in request.overrides if o.startswith("prepare.path=")).removeprefix("prepare.path="))
    write_pairs(source, 170)
    second = scheduled(replace(request, only=None), "smoke-20260302T030000Z", LATER, "smoke")
    assert second.stages()[0] == "fit_reward"
    home = Home(request.home)
    recorded = existing_run(home, "smoke-20260302T030000Z").nodes
    assert recorded == {"prepare": existing_run(home, "smoke-20260301T030000Z").nodes["prepare"]}
    planned = launch.plan(launch.accept(second))
    assert planned[0].node.name == "fit_reward.train" and planned[0].state == "stale"
