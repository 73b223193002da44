"""rescore, second half: order, pair weights and lambda from stored rewards (`weigh`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_cases import (
    candidate_row,
    given_file,
    given_row,
    node_work,
    prompt_row,
    settings,
    weigh,
    write_artifact,
    write_candidates,
)

from clha.errors import UserError
from clha.schema import CANDIDATES, REWARDS
from clha.stages import rescore
from clha.store import Artifact, ArtifactWriter, Home


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


def test_the_fitted_threshold_comes_from_the_reward_model(home: Home) -> None:
    config = json.dumps({"threshold": 50.0}).encode()
    writer = ArtifactWriter(home, "fit_reward", "0" * 24)
    writer.write_bytes("reward_model/config.json", config)
    fitted = writer.finish(rows_in=0, rows_out=0, facts={})
    rewards = {"a": [50.5, 1.0], "b": [49.5, -100.0]}
    artifact = weigh(home, rewards, sft_threshold="fitted", inputs={"fit_reward.train": fitted})
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


@pytest.mark.parametrize("method", ["calibrated", "soft_label"])
@pytest.mark.parametrize("labels", ["weight", "drop"])
def test_a_response_whose_label_is_dropped_is_not_imitated(home: Home, method: str, labels: str) -> None:
    """Above the threshold all of them are: 2 against 9 is no label to trust, p_right = 0.0036."""
    rewards = {"wrong": [2.0, 9.0], "right": [3.0, 0.0], "second": [3.0, 0.0, 9.0]}
    chosen, rejected = "dataset_chosen", "dataset_rejected"
    origins = {p: [chosen, rejected, rejected] for p in rewards}
    noise = {"method": method, "flip_rate": 0.2, "labels": labels}
    artifact = weigh(home, rewards, origins=origins, rank_by="label", noise=noise)
    rows = {r["prompt_id"]: r for r in artifact.rows("weights")}
    assert rows["right"]["sft_lambda"] == pytest.approx(np.tanh(1.5))
    assert [rows[p]["sft_lambda"] for p in ("wrong", "second")] == [0, 0]
    assert rows["wrong"]["flags"] == ["no_pairs", "sft_off", "label_contradicted"]
    assert np.sum(rows["second"]["pair_weights"]) > 0, "the label that is not doubted still counts"
    assert artifact.manifest["sft_share"] == pytest.approx(1 / 3)
    turned = weigh(home, rewards, origins=origins, rank_by="label", noise=noise | {"labels": "flip"}).rows("weights")
    assert all(r["sft_lambda"] > 0.9 for r in turned)


@pytest.mark.parametrize("method", ["none", "reference", "quantile", "calibrated", "soft_label", "from_column"])
def test_by_label_a_rejected_response_without_its_chosen_one_is_not_imitated(
    home: Home, tmp_path: Path, method: str
) -> None:
    chosen, rejected, own = "dataset_chosen", "dataset_rejected", "generated"
    origins = {"a": [rejected, own], "b": [rejected], "c": [chosen, rejected]}
    given = {"file": given_file(tmp_path, [given_row(prompt_id="c")])} if method == "from_column" else {}
    rewards = {"a": [5.0, 6.0], "b": [5.0], "c": [9.0, 0.0]}
    artifact = weigh(home, rewards, origins=origins, rank_by="label", noise={"method": method, "gap": 3.0} | given)
    rows = {r["prompt_id"]: r for r in artifact.rows("weights")}
    assert [rows[p]["sft_lambda"] for p in "ab"] == [0, 0] and rows["c"]["sft_lambda"] > 0.9
    assert rows["a"]["flags"] == ["no_pairs", "sft_off"] and rows["b"]["flags"] == ["single_candidate", "sft_off"]


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
    before, after = (artifact.manifest["calibration"][when] for when in ("before", "after"))
    assert all(after[name] < before[name] for name in ("ece", "brier", "nll"))


def test_calibration_on_labels_without_labels_is_a_clear_error(home: Home) -> None:
    with pytest.raises(UserError, match="rescore.noise.calibration is labels"):
        weigh(home, {"a": [1.0, 2.0]}, noise={"method": "calibrated", "calibration": "labels"})


def test_label_order_counts_the_pairs_that_labels_order(home: Home) -> None:
    """One of two labels is contradicted; the two generated ones beside them make ten more pairs that cannot count."""
    chosen, rejected, own = "dataset_chosen", "dataset_rejected", "generated"
    origins = {p: [chosen, rejected, own, own] for p in "ab"}
    rewards = {"a": [9.0, 1.0, 5.0, 2.0], "b": [0.0, 6.0, 8.0, 1.0]}
    facts = weigh(home, rewards, origins=origins, rank_by="label", noise={"gap": 3.0}).manifest
    assert (facts["pairs"], facts["pairs_kept"], facts["kept_fraction"]) == (2, 1, 0.5)
    assert facts["pairs_by_distance"] == {"1": [1, 2]}


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


@pytest.mark.parametrize("origins", [["generated", "generated"], ["generated", "dataset_rejected"]])
def test_ranking_by_label_without_a_chosen_response_is_a_clear_error(home: Home, origins: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"no chosen response has a reward; set generate\.include to \[chosen, rejected"
    ):
        weigh(home, {"a": [1.0, 2.0]}, origins={"a": origins}, rank_by="label", noise={"method": "none"})


def test_without_a_single_reward_there_is_nothing_to_weigh(home: Home) -> None:
    with pytest.raises(UserError, match="none of the 2 candidates has a reward; see the reasons .* of score") as caught:
        weigh(home, {}, unscored=["x", "y"], noise={"method": "calibrated"})
    assert "\n" not in str(caught.value)


RECORD = Path(__file__).parent / "rescore_outputs.json"
STORED = [  # rewards of four candidates of each of four prompts, the last two the data's chosen and rejected one
    [0.3, -1.2, 0.9, 0.1],
    [2.0, 2.4, 1.1, 2.4],
    [-0.5, -0.6, -0.7, 0.2],
    [1.5, -2.5, -1.0, 1.0],
]
SECOND = [[-v, 2.0, v, 0.5] for v in (1.0, -0.5, 2.0, 1.5)]  # what a second model says of them
BY_LABEL = {"rank_by": "label"}
METHODS: list[tuple[dict[str, Any], list[Any]]] = [  # settings, and the rewards of each model
    ({"noise": {"method": "reference", "gap": 0.5}, "sft_threshold": 0.9}, [STORED]),
    ({"noise": {"method": "quantile", "quantile": 0.25}}, [STORED]),
    ({"noise": {"method": "calibrated"}}, [STORED]),
    ({"noise": {"method": "soft_label"}}, [STORED]),
    ({"noise": {"method": "calibrated", "flip_rate": 0.2}} | BY_LABEL, [STORED]),
    ({"noise": {"method": "none"}} | BY_LABEL, [STORED]),
    ({"noise": {"method": "calibrated", "flip_rate": 0.2, "labels": "flip"}} | BY_LABEL, [STORED]),
    ({"noise": {"method": "calibrated", "flip_rate": 0.2, "labels": "drop"}} | BY_LABEL, [STORED]),
    ({"noise": {"method": "reference", "gap": 0.5}} | BY_LABEL, [STORED]),
    ({"noise": {"method": "calibrated"}}, [STORED, SECOND]),
    ({"noise": {"method": "calibrated", "calibration": "labels", "flip_rate": 0.2}}, [STORED, SECOND]),
    ({"noise": {"method": "soft_label", "flip_rate": 0.2}} | BY_LABEL, [STORED, SECOND]),
    ({"noise": {"method": "from_column"}, "sft_threshold": 0.9}, [STORED]),
]
GIVEN = [(0, 2, 0, 0.5), (0, 1, 3, 2.0), (2, 3, 1, 1.0)]  # prompt, better, worse, weight


def stored_candidates() -> list[dict[str, Any]]:
    origins = ["generated", "generated", "dataset_chosen", "dataset_rejected"]
    prompts = [prompt_row([{"role": "user", "content": f"Stored {i}?"}], "train") for i in range(len(STORED))]
    return [candidate_row(p, j, f"answer {j}", origin) for p in prompts for j, origin in enumerate(origins)]


def recorded(kind: str) -> list[Any]:
    record = json.loads(RECORD.read_text())[kind]
    assert record["code_version"] == rescore.CODE_VERSION[kind], f"record the outputs of the new version in {RECORD}"
    return record["outputs"]


@pytest.mark.parametrize("i", range(len(METHODS)))
def test_weights_of_stored_rewards_are_those_on_record_unless_the_code_version_changed(
    home: Home, tmp_path: Path, i: int
) -> None:
    """Fails when weigh's output changes without its CODE_VERSION: then cached weights would be stale."""
    found = stored_weights(home, tmp_path, *METHODS[i])
    wanted = recorded("weigh")[i]
    assert [{k: r[k] for k in ("prompt_id", "order", "sft_index", "flags")} for r in found] == [
        {k: r[k] for k in ("prompt_id", "order", "sft_index", "flags")} for r in wanted
    ]
    for name in ("pair_weights", "sft_lambda"):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in wanted], atol=1e-5)


def stored_weights(home: Home, folder: Path, changes: dict[str, Any], models: list[Any]) -> list[dict[str, Any]]:
    """The weights of the stored candidates, with the rewards of these models."""
    candidates = stored_candidates()
    rewards = [
        {"prompt_id": c["prompt_id"], "candidate_id": c["candidate_id"], "reward": float(np.mean(m)),
         "member_rewards": m, "truncated": False}
        for c, m in zip(candidates, np.array(models).reshape(len(models), -1).T.tolist(), strict=True)
    ]  # fmt: skip
    inputs = {
        "generate": write_candidates(home, candidates),
        "score": write_artifact(home, "score", {"rewards": (rewards, REWARDS)}),
    }
    if changes["noise"]["method"] == "from_column":
        ids = [c["prompt_id"] for c in candidates[::4]]
        rows = [{"prompt_id": ids[p], "better": b, "worse": w, "weight": x} for p, b, w, x in GIVEN]
        changes = changes | {"noise": {"method": "from_column", "file": given_file(folder, rows)}}
    tree = settings(rescore={"sft_threshold": 0.0} | changes)
    return rescore.build(node_work(home, tree, "weigh", inputs)).rows("weights")
