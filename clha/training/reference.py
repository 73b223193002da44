"""Summed log-probabilities under the policy as it was before training: what DPO compares with, computed once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clha.training import policy
from clha.training.batches import Layout
from clha.training.logprobs import sum_by_response

REFERENCE = pa.schema([("prompt_id", pa.string()), ("logps", pa.list_(pa.float64()))])
_PROMPTS_AT_ONCE = 64


@torch.no_grad()
def reference_logps(
    model: Any, prompts: Any, layout: Layout, budget: int, said: Callable[[int, int], None] = lambda done, total: None
) -> pa.Table:
    """One row per prompt, with the summed log-probability of each response in rank order, in nats.

    Args:
        model: attached (`policy.attach`), not trained yet.
        prompts: items are `RankedPrompt`.
        layout, budget: how to lay them out, tokens per micro-batch.
        said: told (done, total) now and then.
    """
    was_training = model.training
    model.eval()
    ids: list[str] = []
    sums: list[list[float]] = []
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        part = [prompts[i] for i in range(start, min(start + _PROMPTS_AT_ONCE, len(prompts)))]
        found: dict[str, list[float]] = {}
        for batch in layout.micro_batches(part, budget):
            logps = policy.response_logps(model, batch)
            rows = sum_by_response(logps.double(), batch.target_cell, *batch.candidate_mask.shape).tolist()
            found |= dict(zip(batch.prompt_ids, rows, strict=True))
        for prompt in part:
            ids.append(prompt.prompt_id)
            sums.append(found[prompt.prompt_id][: len(prompt)])
        said(len(ids), len(prompts))
    model.train(was_training)
    return pa.table([ids, sums], schema=REFERENCE)


def read_reference(path: Path, prompts: Any) -> np.ndarray:
    """[prompts, n] for `Preferences.reference`, NaN where a prompt has fewer responses; joined by prompt id.

    Raises:
        ValueError: a prompt has no row, or another number of responses.
    """
    table = pq.read_table(path)
    rows = dict(zip(table["prompt_id"].to_pylist(), table["logps"].to_pylist(), strict=True))
    out = np.full((len(prompts), prompts.max_candidates), np.nan)
    for i in range(len(prompts)):
        prompt = prompts[i]
        logps = rows.get(prompt.prompt_id)
        if logps is None or len(logps) != len(prompt):
            raise ValueError(f"{path}: does not fit prompt {prompt.prompt_id}; delete it, it is computed again")
        out[i, : len(logps)] = logps
    return out
