"""rescore: rewards of all candidates (`score`), and what follows from them (`weigh`)."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reward_cases import (
    candidate_row,
    node_work,
    preference_rows,
    prompt_row,
    settings,
    write_artifact,
    write_candidates,
    write_prompts,
)

from clha.errors import UserError
from clha.rewards import adapters
from clha.schema import CANDIDATES, REWARDS
from clha.stages import fit_reward, rescore
from clha.stages.work import Work
from clha.store import Artifact, Home


@pytest.fixture
def fitted(home: Home, tiny_model: Path) -> Artifact:
    prompts = write_prompts(home, preference_rows(40))
    return fit_reward.build(
        node_work(home, settings(), "fit_reward.train", {"prepare": prompts}, {"encoder": tiny_model})
    )


def some_candidates(prompts: int, each: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(prompts)]
    words = ["warm", "rude", "exact", "dunno", "clear and kind", "boring nope nope"]
    texts = [[f"{words[(i + j) % 6]} {i} {'so ' * (j * (i % 4))}" for j in range(each)] for i in range(prompts)]
    return rows, [candidate_row(r, j, t) for r, ts in zip(rows, texts, strict=True) for j, t in enumerate(ts)]


def score_work(home: Home, model: Path, fitted: Artifact, prompts: list, candidates: list, **changes: Any) -> Work:
    inputs = {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "fit_reward.train": fitted,
    }
    rescored = {"shard_size": 8} | changes
    return node_work(home, settings(rescore=rescored), "score", inputs, {"rescore.reward": model})


def test_every_candidate_gets_one_reward(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(7, 3)
    artifact = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    rows = artifact.rows("rewards")
    assert [(r["prompt_id"], r["candidate_id"]) for r in rows] == [
        (c["prompt_id"], c["candidate_id"]) for c in candidates
    ]
    assert len(artifact.shards("rewards")) == 3  # 21 candidates, 8 a shard
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (21, 21)


def test_shards_and_batches_do_not_change_rewards(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(7, 3)
    first = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    reward = {"tokens_per_batch": 64}
    second = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates, shard_size=5, reward=reward))
    a, b = (np.array([r["reward"] for r in x.rows("rewards")]) for x in (first, second))
    assert np.abs(a - b).max() < 1e-5


def test_a_killed_score_goes_on_from_its_finished_shards(
    home: Home, tiny_model: Path, fitted: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, candidates = some_candidates(7, 3)
    work = score_work(home, tiny_model, fitted, prompts, candidates)

    class Killed(BaseException):
        pass

    def die(done: int, total: int, unit: str, note: str = "") -> None:
        if done > 16:
            raise Killed

    monkeypatch.setattr(work.progress, "update", die)
    with pytest.raises(Killed):
        rescore.build(work)
    finished = sorted(work.writer.folder.glob("rewards-*.parquet"))
    assert len(finished) == 2
    stamps = [p.stat().st_mtime_ns for p in finished]
    scored: list[int] = []
    score = adapters.EncoderHead.score

    def count(self: Any, inputs: Any, progress: Any = None) -> Any:
        scored.append(len(inputs))
        return score(self, inputs, progress)

    monkeypatch.setattr(adapters.EncoderHead, "score", count)
    artifact = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    assert scored == [5]
    assert [p.stat().st_mtime_ns for p in artifact.shards("rewards")][:2] == stamps
    assert Counter(r["prompt_id"] for r in artifact.rows("rewards")) == {p["prompt_id"]: 3 for p in prompts}


def test_two_processes_share_the_shards_and_make_the_same_table(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(14, 3)
    candidates[12]["text"] = "  "
    alone = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    whole = {name: alone.read(name).to_pylist() for name in ("rewards", "quarantine")}
    first = pq.read_table(alone.shards("rewards")[0])
    work = score_work(home, tiny_model, fitted, prompts, candidates, processes=2)
    assert alone.key == work.writer.key, "the number of processes is in no key"
    work.writer.write_shard("rewards", 0, first)
    stamp = work.writer.shard_path("rewards", 0).stat().st_mtime_ns
    shared = rescore.build(work)
    assert shared.shards("rewards")[0].stat().st_mtime_ns == stamp, "a finished shard is kept"
    assert len(shared.shards("rewards")) == len(alone.shards("rewards")) == 6
    rows = shared.rows("rewards")
    assert [(r["prompt_id"], r["candidate_id"]) for r in rows] == [
        (r["prompt_id"], r["candidate_id"]) for r in whole["rewards"]
    ]
    rewards = [[r["reward"] for r in table] for table in (rows, whole["rewards"])]
    assert np.abs(np.subtract(*rewards)).max() < 1e-5
    assert shared.rows("quarantine") == whole["quarantine"]
    assert "2 processes" in shared.manifest["device"] and shared.manifest["padding_fraction"] is not None


def test_a_reward_model_that_cannot_be_loaded_stops_all_processes_with_its_reason(
    home: Home, tiny_model: Path, fitted: Artifact
) -> None:
    prompts, candidates = some_candidates(7, 3)
    reward = {"type": "sequence_classification", "model": str(tiny_model)}
    work = score_work(home, tiny_model, fitted, prompts, candidates, processes=2, reward=reward, sft_threshold=0.0)
    with pytest.raises(UserError, match="outputs, a reward model has one"):
        rescore.build(work)
    assert not list(work.writer.folder.glob("rewards-*.parquet"))


def test_a_candidate_that_cannot_be_read_is_quarantined_with_the_reason(
    home: Home, tiny_model: Path, fitted: Artifact
) -> None:
    prompts, candidates = some_candidates(7, 3)
    candidates[4]["text"] = "  "
    artifact = rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))
    assert artifact.manifest["quarantined"] == {"reward not finite": 1}
    (row,) = artifact.rows("quarantine")
    assert row["prompt_id"] == candidates[4]["prompt_id"]
    assert row["detail"].startswith("candidate 1: empty_response")


def test_too_many_bad_candidates_stop_the_run(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(7, 3)
    for c in candidates[:4]:
        c["text"] = " "
    with pytest.raises(UserError, match="4 of 21 rows are bad.*rescore.max_quarantined"):
        rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))


def test_a_constant_reward_model_is_an_error_that_says_so(home: Home, tiny_model: Path, fitted: Artifact) -> None:
    prompts, candidates = some_candidates(4, 2)
    for c in candidates:
        c["text"] = "the same"
    for p in prompts:
        p["messages"] = prompts[0]["messages"]
    with pytest.raises(UserError, match="gives all 8 candidates the same reward"):
        rescore.build(score_work(home, tiny_model, fitted, prompts, candidates))


def weigh(
    home: Home,
    rewards: dict[str, list[float]],
    *,
    origins: dict[str, list[str]] | None = None,
    unscored: list[str] | None = None,
    inputs: dict[str, Artifact] | None = None,
    **changes: Any,
) -> Artifact:
    """Weigh candidates with these rewards; prompts without any are `unscored`."""
    candidates, rows = [], []
    for prompt in [*rewards, *(unscored or [])]:
        for i, reward in enumerate(rewards.get(prompt, [0.0])):
            origin = (origins or {}).get(prompt, ["generated"] * 9)[i]
            candidates.append(candidate_row({"prompt_id": prompt}, i, f"text {i}", origin))
            if prompt in rewards:
                row = {"prompt_id": prompt, "candidate_id": i, "reward": reward, "member_rewards": [reward]}
                rows.append(row | {"truncated": False})
    artifacts = {
        "generate": write_artifact(home, "generate", {"candidates": (candidates, CANDIDATES)}),
        "score": write_artifact(home, "score", {"rewards": (rows, REWARDS)}),
    }
    return rescore.build(node_work(home, settings(rescore=changes), "weigh", artifacts | (inputs or {})))


def test_the_figure_of_the_paper(home: Home) -> None:
    """Rewards 4.581, -0.612, 2.390: in order 4.581, 2.390, -0.612. Differences 2.191 (noise), 5.193, 3.002."""
    artifact = weigh(home, {"a": [4.581, -0.612, 2.390]}, noise={"method": "reference", "gap": 3.0})
    (row,) = artifact.rows("weights")
    assert row["order"] == [0, 2, 1]
    assert row["pair_weights"] == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert (row["sft_index"], row["sft_lambda"]) == (0, 1.0)
    assert artifact.manifest["kept_fraction"] == pytest.approx(2 / 3)
    assert artifact.manifest["pairs_by_distance"] == {"1": [1, 2], "2": [1, 1]}


def test_a_difference_of_exactly_the_gap_is_noise(home: Home) -> None:
    artifact = weigh(home, {"a": [4.0, 1.0], "b": [4.5, 1.0]}, noise={"method": "reference", "gap": 3.0})
    assert [r["pair_weights"] for r in artifact.rows("weights")] == [[[0, 0], [0, 0]], [[0, 1], [0, 0]]]


def test_lambda_is_off_at_the_threshold_and_on_above_it(home: Home) -> None:
    artifact = weigh(home, {"a": [0.5, -3], "b": [0.25, -3], "c": [-1.0, -9]}, sft_threshold=0.25)
    assert [r["sft_lambda"] for r in artifact.rows("weights")] == [1.0, 0.0, 0.0]
    assert artifact.manifest["sft_share"] == pytest.approx(1 / 3)


def test_the_fitted_threshold_comes_from_the_reward_model(home: Home, fitted: Artifact) -> None:
    artifact = weigh(home, {"a": [99.0, 1.0], "b": [-99.0, -100.0]}, sft_threshold="fitted",
                     inputs={"fit_reward.train": fitted})  # fmt: skip
    assert [r["sft_lambda"] for r in artifact.rows("weights")] == [1.0, 0.0]


def test_the_quantile_method_drops_that_share_of_the_pairs(home: Home) -> None:
    """Gaps 1, 2, 3, 4: their median is 2.5, so 3 and 4 are kept."""
    rewards = {p: [float(g), 0.0] for p, g in zip("abcd", (1, 2, 3, 4), strict=True)}
    artifact = weigh(home, rewards, noise={"method": "quantile", "quantile": 0.5})
    assert artifact.manifest["gap"] == 2.5
    assert [r["pair_weights"][0][1] for r in artifact.rows("weights")] == [0, 0, 1, 1]


def test_without_a_method_every_pair_and_response_counts(home: Home) -> None:
    artifact = weigh(home, {"a": [-5.0, -5.1, -4.0]}, noise={"method": "none"})
    (row,) = artifact.rows("weights")
    assert row["pair_weights"] == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert row["sft_lambda"] == 1.0


def test_prompts_of_unlike_size_keep_their_own_figures(home: Home) -> None:
    rewards = {"a": [1.0, 9.0], "b": [0.0], "c": [2.0, 8.0, 5.5, 5.0], "d": [7.0, 0.0]}
    artifact = weigh(home, rewards, noise={"method": "reference", "gap": 1.0}, shard_size=3)
    rows = {r["prompt_id"]: r for r in artifact.rows("weights")}
    assert list(rows) == ["a", "b", "c", "d"]
    assert [rows[p]["order"] for p in "abcd"] == [[1, 0], [0], [1, 2, 3, 0], [0, 1]]
    assert rows["b"]["pair_weights"] == [[0]]
    assert rows["b"]["flags"] == ["single_candidate", "sft_off"]
    assert rows["c"]["pair_weights"] == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_prompt_without_rewards_is_quarantined(home: Home) -> None:
    artifact = weigh(home, {"a": [1.0, 2.0], "b": [2.0, 1.0]}, unscored=["x"])
    assert artifact.rows("quarantine") == [{"prompt_id": "x", "reason": "no scored candidate", "detail": ""}]
    assert (artifact.manifest["rows_in"], artifact.manifest["rows_out"]) == (3, 2)


def test_by_label_the_chosen_one_stands_first_and_only_labelled_pairs_count(home: Home) -> None:
    chosen, rejected = "dataset_chosen", "dataset_rejected"
    origins = {"a": ["generated", rejected, chosen], "b": [chosen, rejected]}
    artifact = weigh(
        home,
        {"a": [9.0, 1.0, 5.0], "b": [0.0, 6.0]},
        origins=origins,
        rank_by="label",
        noise={"method": "reference", "gap": 3.0},
    )
    rows = {r["prompt_id"]: r for r in artifact.rows("weights")}
    assert rows["a"]["order"] == [2, 1, 0]
    assert rows["a"]["pair_weights"] == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert rows["b"]["order"] == [0, 1]
    assert rows["b"]["pair_weights"] == [[0, 0], [0, 0]]  # the reward model contradicts the label


def test_calibrated_weights_worked_by_hand(home: Home) -> None:
    """Rewards in log-odds, difference 2: p = 0.8808, w = 0.7616; 0.5: p = 0.6225, w = 0.2449; mean 0.5033."""
    rewards = {"a": [2.0, 0.0], "b": [0.5, 0.0]}
    artifact = weigh(home, rewards, noise={"method": "calibrated"}, sft_threshold=0.0)
    a, b = artifact.rows("weights")
    assert a["pair_weights"][0][1] == pytest.approx(0.76159 / 0.50326, rel=1e-4)
    assert b["pair_weights"][0][1] == pytest.approx(0.24492 / 0.50326, rel=1e-4)
    assert a["sft_lambda"] == pytest.approx(0.76159, rel=1e-4)  # 2 above the threshold: the same rule
    total, squares = 0.76159 + 0.24492, 0.76159**2 + 0.24492**2
    assert artifact.manifest["effective_sample_size"] == pytest.approx(total**2 / squares, rel=1e-3)


def test_soft_labels_are_the_probability_and_its_reverse(home: Home) -> None:
    artifact = weigh(home, {"a": [2.0, 0.0]}, noise={"method": "soft_label"})
    (row,) = artifact.rows("weights")
    assert row["pair_weights"][0][1] == pytest.approx(0.88080, rel=1e-4)
    assert row["pair_weights"][1][0] == pytest.approx(0.11920, rel=1e-4)
    assert artifact.manifest["pairs_kept"] == 1


LABELLED = {"right": [3.0, 0.0], "wrong": [0.0, 3.0]}
ORIGINS = {p: ["dataset_chosen", "dataset_rejected"] for p in LABELLED}


def labelled(home: Home, **noise: Any) -> Artifact:
    return weigh(home, LABELLED, origins=ORIGINS, rank_by="label", noise={"flip_rate": 0.2, **noise})


def test_labels_are_judged_with_the_flip_rate(home: Home) -> None:
    """p = sigmoid(3) = 0.95257; right: .8 x .95257 / (.8 x .95257 + .2 x .04743) = 0.98770; wrong: 0.16607."""
    artifact = labelled(home, method="calibrated")
    rows = {r["prompt_id"]: r for r in artifact.rows("labels")}
    assert rows["right"]["p_right"] == pytest.approx(0.98770, abs=1e-5)
    assert rows["wrong"]["p_right"] == pytest.approx(0.16607, abs=1e-5)
    assert [rows[p]["used"] for p in ("right", "wrong")] == ["kept", "dropped"]
    assert [rows[p]["reward_difference"] for p in ("right", "wrong")] == [3.0, -3.0]
    assert artifact.manifest["labels_doubted"] == 1


def test_a_doubted_label_is_dropped_by_default_and_flagged(home: Home) -> None:
    rows = {r["prompt_id"]: r for r in labelled(home, method="calibrated").rows("weights")}
    assert rows["right"]["pair_weights"] == [[0, 1], [0, 0]]  # the only pair kept has the mean weight
    assert rows["wrong"]["pair_weights"] == [[0, 0], [0, 0]]
    assert "label_contradicted" in rows["wrong"]["flags"]


def test_a_doubted_label_is_turned_round_on_request(home: Home) -> None:
    """|2p - 1|: 0.97540 and 0.66785, divided by their mean; the SFT part goes to the response that was rejected."""
    rows = {r["prompt_id"]: r for r in labelled(home, method="calibrated", labels="flip").rows("weights")}
    mean = (0.97540 + 0.66785) / 2
    assert rows["right"]["pair_weights"][0][1] == pytest.approx(0.97540 / mean, rel=1e-4)
    assert rows["wrong"]["pair_weights"][0][1] == 0
    assert rows["wrong"]["pair_weights"][1][0] == pytest.approx(0.66785 / mean, rel=1e-4)
    assert (rows["right"]["sft_index"], rows["wrong"]["sft_index"]) == (0, 1)


def test_labels_may_be_dropped_without_being_weighted(home: Home) -> None:
    rows = {r["prompt_id"]: r for r in labelled(home, method="calibrated", labels="drop").rows("weights")}
    assert rows["right"]["pair_weights"][0][1] == 1
    assert rows["wrong"]["pair_weights"][0][1] == 0


def test_a_doubted_soft_label_is_dropped_unless_flipped(home: Home) -> None:
    rows = {r["prompt_id"]: r for r in labelled(home, method="soft_label").rows("weights")}
    assert np.sum(rows["wrong"]["pair_weights"]) == 0
    flipped = {r["prompt_id"]: r for r in labelled(home, method="soft_label", labels="flip").rows("weights")}
    assert flipped["wrong"]["pair_weights"][0][1] == pytest.approx(0.16607, abs=1e-4)
    assert flipped["wrong"]["pair_weights"][1][0] == pytest.approx(1 - 0.16607, abs=1e-4)


def test_by_reward_labels_are_judged_but_not_used(home: Home) -> None:
    artifact = weigh(home, LABELLED, origins=ORIGINS, noise={"method": "none", "flip_rate": 0.2})
    assert {r["used"] for r in artifact.rows("labels")} == {"not used"}


def test_flip_rate_and_factor_are_fitted_on_the_labels(home: Home) -> None:
    draw = np.random.default_rng(0)
    d = draw.normal(0, 2, 3000)
    better = draw.random(3000) < 1 / (1 + np.exp(-3 * d))
    kept = draw.random(3000) >= 0.2
    rewards = {f"p{i}": [x, 0.0] for i, x in enumerate(np.where(better == kept, d, -d).tolist())}
    origins = {p: ["dataset_chosen", "dataset_rejected"] for p in rewards}
    artifact = weigh(
        home, rewards, origins=origins, rank_by="label", noise={"method": "calibrated", "calibration": "labels"}
    )
    assert artifact.manifest["calibration_factors"][0] == pytest.approx(3, rel=0.35)
    found = artifact.manifest["flip_rate"]
    assert found["estimate"] == pytest.approx(0.2, abs=0.04)
    assert found["interval"][0] < 0.2 < found["interval"][1]


def test_calibration_on_labels_without_labels_is_a_clear_error(home: Home) -> None:
    with pytest.raises(UserError, match="rescore.noise.calibration is labels"):
        weigh(home, {"a": [1.0, 2.0]}, noise={"method": "calibrated", "calibration": "labels"})


def given_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "weights.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_own_weights_are_taken_from_their_column(home: Home, tmp_path: Path) -> None:
    rows = [
        {"prompt_id": "a", "better": 1, "worse": 0, "trust": 0.75},
        {"prompt_id": "a", "better": 0, "worse": 2, "trust": 2.0},  # against the order of rewards: the reverse hinge
        {"prompt_id": "elsewhere", "better": 0, "worse": 1, "trust": 1.0},
    ]
    noise = {"method": "from_column", "file": given_file(tmp_path, rows), "column": "trust"}
    artifact = weigh(home, {"a": [1.0, 3.0, 2.0], "b": [5.0, 1.0]}, noise=noise)
    a, b = artifact.rows("weights")
    assert a["order"] == [1, 2, 0]
    assert a["pair_weights"] == [[0, 0, 0.75], [0, 0, 0], [0, 2.0, 0]]
    assert np.sum(b["pair_weights"]) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt_id": "a", "better": 0, "worse": 1}], "has no column `weight`"),
        ([{"prompt_id": "a", "better": 0, "worse": 1, "weight": -1.0}], "negative or not finite"),
        ([{"prompt_id": "a", "better": 0, "worse": 1, "weight": 1.0}] * 2, "names a pair twice"),
    ],
)
def test_a_bad_file_of_weights_is_a_clear_error(home: Home, tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weigh(home, {"a": [1.0, 3.0]}, noise={"method": "from_column", "file": given_file(tmp_path, rows)})


def test_an_ensemble_that_disagrees_weighs_less(home: Home) -> None:
    candidates = [candidate_row({"prompt_id": p}, i, f"text {i}") for p in "ab" for i in range(2)]
    members = {"a": [[2.0, 2.0], [0.0, 0.0]], "b": [[4.0, 0.0], [0.0, 0.0]]}
    rows = [
        {"prompt_id": p, "candidate_id": i, "reward": float(np.mean(m)), "member_rewards": m, "truncated": False}
        for p, ms in members.items()
        for i, m in enumerate(ms)
    ]
    artifacts = {
        "generate": write_artifact(home, "generate", {"candidates": (candidates, CANDIDATES)}),
        "score": write_artifact(home, "score", {"rewards": (rows, REWARDS)}),
    }
    chain = settings(rescore={"noise": {"method": "calibrated"}})
    a, b = rescore.build(node_work(home, chain, "weigh", artifacts)).rows("weights")
    assert a["pair_weights"][0][1] > b["pair_weights"][0][1] > 0


def test_ranking_by_label_without_labels_is_a_clear_error(home: Home) -> None:
    with pytest.raises(UserError, match="set generate.include"):
        weigh(home, {"a": [1.0, 2.0]}, rank_by="label")


RECORD = Path(__file__).parent / "rescore_outputs.json"
STORED = [  # rewards of four candidates of each of four prompts, the last two the data's chosen and rejected one
    [0.3, -1.2, 0.9, 0.1],
    [2.0, 2.4, 1.1, 2.4],
    [-0.5, -0.6, -0.7, 0.2],
    [1.5, -2.5, -1.0, 1.0],
]
METHODS = [
    {"noise": {"method": "reference", "gap": 0.5}, "sft_threshold": 0.9},
    {"noise": {"method": "quantile", "quantile": 0.25}},
    {"noise": {"method": "calibrated"}},
    {"noise": {"method": "soft_label"}},
    {"noise": {"method": "calibrated", "flip_rate": 0.2}, "rank_by": "label"},
    {"noise": {"method": "none"}, "rank_by": "label"},
]


def stored_candidates() -> list[dict[str, Any]]:
    origins = ["generated", "generated", "dataset_chosen", "dataset_rejected"]
    prompts = [prompt_row([{"role": "user", "content": f"Stored {i}?"}], "train") for i in range(len(STORED))]
    return [candidate_row(p, j, f"answer {j}", origin) for p in prompts for j, origin in enumerate(origins)]


def recorded(kind: str) -> list[Any]:
    record = json.loads(RECORD.read_text())[kind]
    assert record["code_version"] == rescore.CODE_VERSION[kind], f"record the outputs of the new version in {RECORD}"
    return record["outputs"]


@pytest.mark.parametrize(("i", "changes"), enumerate(METHODS))
def test_weights_of_stored_rewards_are_those_on_record_unless_the_code_version_changed(
    home: Home, i: int, changes: dict[str, Any]
) -> None:
    """Fails when weigh's output changes without its CODE_VERSION: then cached weights would be stale."""
    candidates = stored_candidates()
    rewards = [
        {"prompt_id": c["prompt_id"], "candidate_id": c["candidate_id"], "reward": r, "member_rewards": [r],
         "truncated": False}
        for c, r in zip(candidates, np.ravel(STORED).tolist(), strict=True)
    ]  # fmt: skip
    inputs = {
        "generate": write_candidates(home, candidates),
        "score": write_artifact(home, "score", {"rewards": (rewards, REWARDS)}),
    }
    tree = settings(rescore={"sft_threshold": 0.0} | changes)
    found = rescore.build(node_work(home, tree, "weigh", inputs)).rows("weights")
    wanted = recorded("weigh")[i]
    assert [{k: r[k] for k in ("prompt_id", "order", "sft_index", "flags")} for r in found] == [
        {k: r[k] for k in ("prompt_id", "order", "sft_index", "flags")} for r in wanted
    ]
    for name in ("pair_weights", "sft_lambda"):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in wanted], atol=1e-5)
