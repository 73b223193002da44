"""Summed log-probabilities under the policy as it was before training: what DPO compares with, computed once."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clha.errors import UserError
from clha.schema import REFERENCE
from clha.training import policy
from clha.training.batches import Layout, RankedPrompt
from clha.training.datasets import View
from clha.training.logprobs import sum_by_response

_PROMPTS_AT_ONCE = 64


@torch.no_grad()
def reference_logps(
    model: Any, prompts: Iterable[RankedPrompt], layout: Layout, budget: int, *, bf16: bool = False
) -> Iterator[np.ndarray]:
    """The summed log-probability of each response, in nats: [n] float64 for each prompt, in order.

    Args:
        model: attached (`policy.attach`), not trained yet.
        prompts: what to compute; read as it is needed.
        layout, budget: how to lay them out, tokens per micro-batch.
        bf16: compute in bfloat16, as training does with `bf16`.
    """
    was_training, layout = model.training, replace(layout, device=next(model.parameters()).device)
    model.eval()
    try:
        for part in _parts(prompts):
            found: dict[int, list[float]] = {}
            numbered = [replace(prompt, prompt_id=str(i)) for i, prompt in enumerate(part)]
            for batch in layout.micro_batches(numbered, budget):
                with torch.autocast(layout.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
                    logps = policy.response_logps(model, batch)
                rows = sum_by_response(logps.double(), batch.target_cell, *batch.candidate_mask.shape).tolist()
                found |= dict(zip(map(int, batch.prompt_ids), rows, strict=True))
            for i, prompt in enumerate(part):
                yield np.array(found[i][: len(prompt)])
    finally:
        model.train(was_training)


def _parts(prompts: Iterable[RankedPrompt]) -> Iterator[list[RankedPrompt]]:
    part: list[RankedPrompt] = []
    for prompt in prompts:
        part.append(prompt)
        if len(part) == _PROMPTS_AT_ONCE:
            yield part
            part = []
    if part:
        yield part


def unranked_prompts(candidates: pa.Table) -> tuple[list[RankedPrompt], list[list[int]]]:
    """Rows of `candidates` as prompts with their responses, in the order of the table, and the candidate ids."""
    columns = ("prompt_id", "candidate_id", "prompt_token_ids", "response_token_ids")
    prompts, numbers = [], []
    for _, group in groupby(candidates.select(columns).to_pylist(), key=lambda row: row["prompt_id"]):
        rows = list(group)
        n = len(rows)
        prompts.append(
            RankedPrompt(
                prompt_id=rows[0]["prompt_id"],
                prompt=np.array(rows[0]["prompt_token_ids"], dtype=np.int32),
                responses=[np.array(row["response_token_ids"], dtype=np.int32) for row in rows],
                rewards=np.zeros(n),
                pair_weights=np.zeros((n, n), dtype=np.float32),
                sft_index=0,
                sft_lambda=0.0,
            )
        )
        numbers.append([row["candidate_id"] for row in rows])
    return prompts, numbers


def reference_table(prompts: Sequence[RankedPrompt], numbers: Sequence[Sequence[int]], logps: Any) -> pa.Table:
    """One row for each candidate: prompt_id, candidate_id, logp."""
    rows = [
        {"prompt_id": prompt.prompt_id, "candidate_id": number, "logp": float(logp)}
        for prompt, own, sums in zip(prompts, numbers, logps, strict=True)
        for number, logp in zip(own, sums, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=REFERENCE)


class WithReference(View):
    """A dataset of `RankedPrompt` whose items carry the reference's log-probabilities."""

    def __init__(self, dataset: Any, model: Any, layout: Layout, budget: int, bf16: bool) -> None:
        self._dataset, self.max_candidates = dataset, dataset.max_candidates
        prompts = (dataset[i] for i in range(len(dataset)))
        self._logps = list(reference_logps(model, prompts, layout, budget, bf16=bf16))

    def _item(self, i: int) -> RankedPrompt:
        return replace(self._dataset[i], reference_logps=self._logps[i])


def with_reference(dataset: Any, model: Any, layout: Layout, budget: int, bf16: bool, trained: bool = False) -> Any:
    """`dataset`, with log-probabilities of `model` as it is now where it has none of a reference.

    Raises:
        UserError: it has none, and `model` is `trained` already, so that it is no reference any more.
    """
    if dataset is None or len(dataset) == 0 or dataset[0].reference_logps is not None:
        return dataset
    if trained:
        raise UserError(
            "dataset: the loss needs log-probabilities under the model as it was before training, and it has been "
            "trained meanwhile; give the trainer this dataset as (one of a dict of) eval_dataset"
        )
    return WithReference(dataset, model, layout, budget, bf16)
