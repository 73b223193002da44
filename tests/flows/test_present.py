"""What the UI is given: keys it accepts, tables that are JSON, lines within bounds; a lost server is no failure."""

import re
from typing import Any

import httpx
import pytest
from fabricated import Fabricated, fabricate

from clha.errors import StageFailure
from clha.reporting.noise_facts import noise_lines
from clha.runs import Run
from clha.stages.report import noise_of_run, noise_tables_of_run
from flows import present

METRICS: dict[str, Any] = {
    "reward": {"base": 0.1, "trained": 0.4, "gain": 0.3, "interval": [0.1, 0.5], "prompts": 8},
    "wins": 5,
    "ties": 1,
    "losses": 2,
    "subsets": {"harmless": {"reward": {"base": 0.1, "trained": float("nan"), "gain": 0.0, "interval": [0, 0]}}},
}


@pytest.fixture(autouse=True)
def publishing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(present, "_off", set())


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        (("demo", "fit_reward.train", "progress"), "demo-fit-reward-train-progress"),
        (("nightly-2026-01-02", "train"), "nightly-2026-01-02-train"),
        (("demo", "noise-study", "Found, by rate"), "demo-noise-study-found-by-rate"),
    ],
)
def test_artifact_keys_are_lowercase_letters_digits_and_dashes(parts: tuple[str, ...], key: str):
    assert present.artifact_key(*parts) == key


def test_artifact_keys_of_different_runs_differ():
    names = ["a-b", "a.b", "A_B", "a_b", "a--b", "a-b-", "A-B"]
    keys = {present.artifact_key(name, "train") for name in names}
    assert len(keys) == len(names) and "a-b-train" in keys
    assert all(re.fullmatch(r"a-b(-[0-9a-f]{6})?-train", key) for key in keys)


def test_the_report_of_a_result_is_a_path_to_copy_and_no_link_that_a_browser_ignores():
    text = present.result_summary("r", None, "/home/me/.clha/reports/r/report.html", 61.2, reused=True)
    assert "Report: `/home/me/.clha/reports/r/report.html`" in text and "file:" not in text and "](" not in text


def test_the_table_of_metrics_has_a_row_for_all_and_for_each_subset_and_holds_no_nan():
    rows = present.metrics_rows(METRICS)
    assert [row["subset"] for row in rows] == ["all", "harmless"]
    assert rows[0]["low"] == 0.1 and rows[0]["high"] == 0.5 and rows[1]["trained"] is None


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), OSError("gone")])
def test_a_server_that_takes_nothing_is_said_once_and_asked_no_more(error: Exception, caplog: pytest.LogCaptureFixture):
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    assert present.publish(call) is None and present.publish(call) is None
    assert len(calls) == 1
    assert sum("goes on without them" in record.message for record in caplog.records) == 1


def test_a_mistake_of_ours_is_not_taken_for_a_lost_server():
    def call() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        present.publish(call)


def test_progress_is_published_at_once_then_every_few_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    now, sent = [1000.0], []
    monkeypatch.setattr(present.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(present, "create_progress_artifact", lambda percent, **_: sent.append(percent) or "id")
    monkeypatch.setattr(present, "update_progress_artifact", lambda artifact, percent, **_: sent.append(percent))
    page = present.NodePage("r", "train")
    for step in range(101):
        page.listen("train", {"event": "progress", "done": step, "total": 100, "unit": "steps", "note": ""})
        now[0] += 0.1  # 10 seconds in all
    assert sent[0] == 0 and sent[-1] == 100 and len(sent) == 5


def test_the_output_of_a_node_is_cut_after_many_lines(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="clha")
    page = present.NodePage("r", "generate")
    for i in range(5000):
        page.listen("generate", {"event": "output", "line": f"0%|\r50%|\rline {i}"})
    messages = [record.message for record in caplog.records]
    assert len(messages) == 1001 and messages[3] == "line 3" and "log file" in messages[-1]


@pytest.fixture(scope="module")
def rescored(tmp_path_factory: pytest.TempPathFactory) -> Fabricated:
    """A finished run; not changed by tests."""
    return fabricate(tmp_path_factory.mktemp("rescored") / "home", prompts=40, tests=12, hostile=False)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tables and texts that would be sent to the server."""
    tables: list[dict[str, Any]] = []
    monkeypatch.setattr(present, "create_table_artifact", lambda rows, **named: tables.append({"rows": rows} | named))
    monkeypatch.setattr(
        present, "create_markdown_artifact", lambda text, **named: tables.append({"text": text} | named)
    )
    return tables


def test_the_noise_artifact_is_the_table_of_clha_noise(rescored: Fabricated, sent: list[dict[str, Any]]):
    present.publish_noise(rescored.home, rescored.run)
    table = sent[0]
    lines = noise_lines(noise_of_run(rescored.home, rescored.run))
    assert table["rows"] == [{"figure": what, "value": value} for what, value in lines]
    assert {"rule", "pairs kept", "effective sample size", "reward gap", "calibration", "length"} <= {
        row["figure"] for row in table["rows"]
    }
    assert (table["key"], table["description"]) == ("demo-noise", "noise of run demo")


def test_the_pairs_and_the_reliability_of_the_noise_report_are_artifacts_of_their_own(
    rescored: Fabricated, sent: list[dict[str, Any]]
):
    present.publish_noise(rescored.home, rescored.run)
    assert [artifact["key"] for artifact in sent] == ["demo-noise", "demo-noise-pairs", "demo-noise-reliability"]
    tables = noise_tables_of_run(rescored.home, rescored.run)
    assert sent[1]["text"] == tables.pairs and tables.pairs.count("\n| ") == 2 * (1 + 10)
    assert sent[2]["rows"] == tables.reliability
    assert set(tables.reliability[0]) == {
        "of", "bin", "predicted before", "observed before", "n before", "predicted after", "observed after", "n after"
    }  # fmt: skip


def test_without_a_fitted_reward_model_or_calibration_on_labels_there_is_no_table_of_reliability(
    rescored: Fabricated, sent: list[dict[str, Any]]
):
    own = {name: key for name, key in rescored.run.nodes.items() if name != "fit_reward.train"}
    present.publish_noise(rescored.home, Run("demo", "demo", rescored.run.settings, own))
    assert [artifact["key"] for artifact in sent] == ["demo-noise", "demo-noise-pairs"]


@pytest.mark.parametrize("error", [StageFailure("damaged Parquet file"), KeyError("no reward"), OSError("gone")])
def test_rewards_that_cannot_be_read_for_the_ui_do_not_fail_a_stage_that_is_done(
    rescored: Fabricated,
    sent: list[dict[str, Any]],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("clha.stages.report.noise_tables_of_run", fail)
    present.publish_noise(rescored.home, rescored.run)
    assert not sent and not present._off, "the server is not to blame"
    assert "no table about noise for the UI" in caplog.text


def test_without_a_server_nothing_is_read_for_the_noise_artifact(
    rescored: Fabricated, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(present, "_off", {"ConnectError"})
    monkeypatch.setattr("clha.stages.report.noise_tables_of_run", lambda *_: pytest.fail("read"))
    present.publish_noise(rescored.home, rescored.run)


def test_a_server_that_is_lost_at_the_noise_artifact_fails_no_stage(
    rescored: Fabricated, monkeypatch: pytest.MonkeyPatch
):
    def gone(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(present, "create_table_artifact", gone)
    present.publish_noise(rescored.home, rescored.run)
    assert present._off == {"ConnectError"}
