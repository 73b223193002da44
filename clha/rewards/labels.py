"""Dataset labels judged by the reward models: for each chosen and rejected candidate, is the label right?"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clha import noise
from clha.rewards.trust import LabelTrust
from clha.rewards.weighing import RewardTable, all_ranked
from clha.settings import Noise

LABELS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen", pa.int32()),  # candidate ids
        ("rejected", pa.int32()),
        ("reward_difference", pa.float64()),  # chosen minus rejected
        ("p_preferred", pa.float64()),  # that the chosen one is better, by the reward models alone
        ("p_right", pa.float64()),  # that the label is right, the annotators' flip rate included
        ("used", pa.string()),  # what the run makes of it: kept, dropped, flipped; by reward: not used
    ]
)


def judge_labels(table: RewardTable, trust: LabelTrust, settings: Noise, rank_by: str) -> pa.Table:
    """One row for each pair of a chosen and a rejected candidate of the same prompt; empty without such pairs."""
    columns: dict[str, list[Any]] = {name: [] for name in LABELS.names}
    for *_, r in all_ranked(table, "label"):
        pairs = noise.labelled_pairs(r.labels)
        if not pairs.any() or trust.flip_rate is None:
            continue
        p = trust.order_probability(r.members)[pairs]
        right = noise.label_probability(p, trust.flip_rate)
        prompt, chosen, rejected = np.nonzero(pairs)
        difference = noise.differences(r.rewards)[pairs]
        columns["prompt_id"].append(table.prompt_ids.take(pa.array(r.prompts[prompt])))
        columns["chosen"].append(pa.array(r.candidates[prompt, chosen], pa.int32()))
        columns["rejected"].append(pa.array(r.candidates[prompt, rejected], pa.int32()))
        columns["reward_difference"].append(pa.array(difference))
        columns["p_preferred"].append(pa.array(p))
        columns["p_right"].append(pa.array(right))
        columns["used"].append(pa.array(_used(right, settings, rank_by), pa.string()))
    if not columns["used"]:
        return LABELS.empty_table()
    return pa.table([pa.chunked_array(columns[name]) for name in LABELS.names], schema=LABELS)


def _used(right: NDArray[np.float64], settings: Noise, rank_by: str) -> NDArray[np.str_]:
    """What a calibrated rule does with each label; other rules and reward order do not go by p(label right)."""
    if rank_by != "label" or settings.method not in ("calibrated", "soft_label"):
        return np.full(len(right), "not used")
    return np.where(right >= 0.5, "kept", "flipped" if settings.labels == "flip" else "dropped")


def label_facts(labels: pa.Table) -> dict[str, Any]:
    """Mean p(label right), and how many labels the reward models rather contradict."""
    right = labels["p_right"].to_numpy()
    return {
        "labels_judged": len(right),
        "labels_p_right": float(right.mean()),
        "labels_doubted": int((right < 0.5).sum()),
    }
