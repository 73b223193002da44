"""The tables of a small chain, and train's work on them, for the tests of that stage."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_cases import node_work, prompt_row, settings, write_artifact, write_candidates, write_prompts
from transformers import AutoModelForCausalLM

from clha.schema import REWARDS, WEIGHTS
from clha.stages import train
from clha.stages.work import Work
from clha.store import Artifact, Home

PROMPTS = 10


def tables(home: Home, tokenizer: Any, dev: int = 2) -> dict[str, Artifact]:
    """Artifacts of prepare, generate, score and weigh: three responses a prompt, the longest is the best."""
    prompts, candidates, rewards, weights = [], [], [], []
    for i in range(PROMPTS):
        split = "dev" if i < dev else "train"
        prompt = prompt_row([{"role": "user", "content": f"Question {i}?"}], split)
        prompts.append(prompt)
        ids = tokenizer(f"Question {i}?")["input_ids"]
        for number in range(3):
            answer = tokenizer(f"answer {i} " * (number + 1))["input_ids"]
            row = {"prompt_token_ids": ids, "response_token_ids": [*answer, tokenizer.eos_token_id]}
            row |= {"prompt_id": prompt["prompt_id"], "candidate_id": number, "origin": "external", "text": "x"}
            row |= {"response_logprobs": None, "finish_reason": "eos", "truncated_turns": 0, "seed": 0}
            candidates.append(row | {"generator": "test"})
            score = {"prompt_id": prompt["prompt_id"], "candidate_id": number, "reward": float(number)}
            rewards.append(score | {"member_rewards": [float(number)], "truncated": False})
        weights.append(
            {
                "prompt_id": prompt["prompt_id"],
                "order": [2, 1, 0],
                "pair_weights": np.triu(np.ones((3, 3)), 1).tolist(),
                "sft_index": 0,
                "sft_lambda": 1.0,
                "flags": [],
            }
        )
    return {
        "prepare": write_prompts(home, prompts),
        "generate": write_candidates(home, candidates),
        "score": write_artifact(home, "score", {"rewards": (rewards, REWARDS)}),
        "weigh": write_artifact(home, "weigh", {"weights": (weights, WEIGHTS)}),
    }


def work(home: Home, model: Path, inputs: dict[str, Artifact], events: list | None = None, **changes: Any) -> Work:
    given = settings(train={"batch_prompts": 2, "learning_rate": 1e-3, "margin": 0.3} | changes)
    if given.train.needs_reference and "reference" not in inputs:
        made = node_work(home, given, "reference", {"generate": inputs["generate"]}, {"policy": model})
        inputs = {**inputs, "reference": train.build(made)}
    return node_work(home, given, "train", inputs, {"policy": model}, events)


def distance(a: Artifact, b: Artifact) -> float:
    """How far the weights of two trained models are apart, relative to their size.

    Not weight by weight: AdamW divides by the gradient's size, so that where it is almost zero rounding moves a weight
    by a visible share of the rate.
    """
    ours, theirs = (
        torch.cat([v.flatten() for v in AutoModelForCausalLM.from_pretrained(x.folder / "model").state_dict().values()])
        for x in (a, b)
    )
    return float((ours - theirs).norm() / theirs.norm())
