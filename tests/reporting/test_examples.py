"""Which pairs are shown as trusted least and most: by what is known of their order, not by the gap."""

from pathlib import Path
from typing import Any

import pytest
from reward_cases import (
    candidate_row,
    node_settings,
    node_work,
    prompt_row,
    settings,
    write_artifact,
    write_candidates,
    write_prompts,
)
from scipy.special import expit

from clha.reporting import sections
from clha.reporting.examples import pair_examples
from clha.reporting.noise_facts import noise_facts, read_noise, scale_is_known
from clha.schema import REWARDS
from clha.stages import rescore
from clha.store import Artifact, Home


def made(root: Path, members: list[list[list[float]]], origins: list[str], **changes: Any) -> dict[str, Artifact]:
    """Nodes of a run that weighed these rewards: of each prompt, of each candidate, of each member."""
    home, tree = Home(root).create(), settings(rescore=changes)
    prompts = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(len(members))]
    candidates = [candidate_row(p, j, f"answer {j}", origin) for p in prompts for j, origin in enumerate(origins)]
    flat = [m for of_prompt in members for m in of_prompt]
    rewards = [
        {"prompt_id": c["prompt_id"], "candidate_id": c["candidate_id"], "reward": sum(m) / len(m),
         "member_rewards": m, "truncated": False}
        for c, m in zip(candidates, flat, strict=True)
    ]  # fmt: skip
    nodes: dict[str, Artifact] = {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "score": write_artifact(
            home, "score", {"rewards": (rewards, REWARDS)}, {"settings": node_settings(tree, "score")}
        ),
    }
    inputs = {name: nodes[name] for name in ("generate", "score")}
    nodes["weigh"] = rescore.build(node_work(home, tree, "weigh", inputs))
    return nodes


def shown(nodes: dict[str, Artifact]) -> dict[str, list[tuple[str, float, float | None]]]:
    """(question, gap, probability) of the pairs in each list."""
    found = pair_examples(read_noise(nodes).pairs, nodes, known_scale=scale_is_known(nodes))
    return {name: [(e["summary"], e["gap"], e["probability"]) for e in rows] for name, rows in found.items()}


def test_pairs_that_no_label_orders_are_in_no_list_of_label_order(tmp_path: Path) -> None:
    """Chosen minus rejected -6..5 in twelve prompts; the generated ones beside them are 100 apart."""
    members = [[[float(d)], [0.0], [200.0], [100.0]] for d in range(-6, 6)]
    origins = ["dataset_chosen", "dataset_rejected", "generated", "generated"]
    noise = {"method": "calibrated", "flip_rate": 0.2}
    nodes = made(tmp_path, members, origins, rank_by="label", noise=noise)
    found = shown(nodes)
    assert [gap for _, gap, _ in found["least"]] == list(range(-6, 4))
    assert [gap for _, gap, _ in found["most"]] == list(range(5, -5, -1))
    p = expit(-6.0)
    assert found["least"][0][2] == pytest.approx(p * 0.8 / (p * 0.8 + (1 - p) * 0.2))
    facts = noise_facts(nodes, read_noise(nodes))
    assert facts["pairs"] == nodes["weigh"].manifest["pairs"] == 12, "one for each label"
    assert facts["share"] == facts["kept"] / 12 == nodes["weigh"].manifest["kept_fraction"]


def test_a_wide_gap_that_the_members_disagree_about_is_not_trusted(tmp_path: Path) -> None:
    """Mean gaps 5 (members 10 and 0), 2 (2 and 2), 0.5 (0.5 and 0.5): s^2 = 50, 5 / sqrt(1 + pi 50 / 8) = 1.10,
    so p = 0.75; the others 0.88 and 0.62."""
    members = [[[10.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]], [[0.5, 0.5], [0.0, 0.0]]]
    nodes = made(tmp_path, members, ["generated"] * 2, noise={"method": "calibrated"})
    found = shown(nodes)
    assert [gap for _, gap, _ in found["most"]] == [2.0, 5.0, 0.5]
    assert [gap for _, gap, _ in found["least"]] == [0.5, 5.0, 2.0]
    assert [round(p or 0, 2) for _, _, p in found["most"]] == [0.88, 0.75, 0.62]


def test_each_list_has_ten_pairs_of_ten_prompts_and_very_sure_ones_are_still_told_apart(tmp_path: Path) -> None:
    """Gaps of 50 to 69: every p is 1. Three candidates: the two at the ends are furthest apart."""
    members = [[[50.0 + i], [25.0], [0.0]] for i in range(20)]
    nodes = made(tmp_path, members, ["generated"] * 3, noise={"method": "reference", "gap": 1.0})
    found = shown(nodes)
    assert [gap for _, gap, _ in found["most"]] == [float(g) for g in range(69, 59, -1)]
    assert len({question for question, _, _ in found["most"]}) == len({q for q, _, _ in found["least"]}) == 10
    assert {gap for _, gap, _ in found["least"]} == {25.0}


def test_rewards_of_an_unknown_scale_show_no_probability(tmp_path: Path) -> None:
    reward = {"type": "sequence_classification", "model": "bundled:other"}
    nodes = made(tmp_path, [[[1.0], [0.0]]], ["generated"] * 2, reward=reward)
    assert [p for _, _, p in shown(nodes)["most"]] == [None]


def test_a_pair_that_is_trained_the_other_way_round_is_shown_as_turned(tmp_path: Path) -> None:
    nodes = made(
        tmp_path,
        [[[-3.0], [0.0]], [[3.0], [0.0]]],
        ["dataset_chosen", "dataset_rejected"],
        rank_by="label",
        noise={"method": "calibrated", "flip_rate": 0.2, "labels": "flip"},
    )
    section = sections.noise_section(nodes)
    assert section is not None
    assert [(e["turned"], e["weight"] > 0) for e in section["examples"]["least"]] == [(True, True), (False, True)]


def test_labels_that_calibrated_the_rewards_have_a_reliability_diagram_in_the_section(tmp_path: Path) -> None:
    members = [[[(-1) ** (i % 4 == 0) * (i % 7 + 1.0)], [0.0]] for i in range(60)]
    noise = {"method": "calibrated", "calibration": "labels"}
    nodes = made(tmp_path, members, ["dataset_chosen", "dataset_rejected"], rank_by="label", noise=noise)
    section = sections.noise_section(nodes)
    assert section is not None and "label-reliability" in [figure.name for figure in section["figures"]]
    assert section["calibration"]["after"]["nll"] < section["calibration"]["before"]["nll"]
    assert "calibration on labels" in dict(section["table"])
