"""Small real artifacts and nodes for the tests of fitting, scoring and weighing."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clha.digests import digest_of, prompt_id
from clha.progress import Event, Progress
from clha.schema import CANDIDATES, PROMPTS, REWARDS, SPLITS
from clha.settings import Settings
from clha.stages import rescore
from clha.stages.chain import nodes
from clha.stages.work import Work
from clha.store import Artifact, ArtifactWriter, Home

TINY = "bundled:tiny-random"

_GOOD = ["gladly", "warm", "clear", "kind", "exact", "helpful", "gentle", "useful", "thanks", "precise"]
_BAD = ["whatever", "nope", "dunno", "boring", "vague", "lazy", "rude", "wrong", "silly", "useless"]
_TOPICS = [
    "tea",
    "rain",
    "bread",
    "maps",
    "trains",
    "music",
    "roses",
    "bikes",
    "snow",
    "boats",
    "chess",
    "lamps",
    "soup",
    "wool",
    "kites",
]


def preference_rows(count: int, split: str = "reward_train", seed: int = 0) -> list[dict[str, Any]]:
    """Rows of `prompts` whose chosen and rejected responses prefer different words."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": f"Tell me about {draw.choice(_TOPICS)} and {i}."}]
        chosen = " ".join(draw.choices(_GOOD * 5 + _BAD, k=draw.randint(4, 9)))
        rejected = " ".join(draw.choices(_BAD * 5 + _GOOD, k=draw.randint(4, 9)))
        rows.append(prompt_row(messages, split, [chosen], [rejected]))
    return rows


def prompt_row(
    messages: list[dict[str, str]], split: str, chosen: list[str] | None = None, rejected: list[str] | None = None
) -> dict[str, Any]:
    """One row of `prompts`."""
    return {
        "prompt_id": prompt_id(messages),
        "source": "test",
        "subset": "all",
        "split": split,
        "messages": messages,
        "chosen": chosen or [],
        "rejected": rejected or [],
    }


def candidate_row(prompt: Mapping[str, Any], number: int, text: str, origin: str = "generated") -> dict[str, Any]:
    """One row of `candidates`; the token IDs are of no interest here."""
    return {
        "prompt_id": prompt["prompt_id"],
        "candidate_id": number,
        "origin": origin,
        "text": text,
        "prompt_token_ids": [1],
        "response_token_ids": [5, 2],
        "response_logprobs": None,
        "finish_reason": "eos",
        "truncated_turns": 0,
        "seed": 0,
        "generator": "test",
    }


def settings(**changes: Any) -> Settings:
    """Settings with the tiny model everywhere; `changes` are whole groups."""
    fit = {"encoder": TINY, "layer": 1, "max_tokens": 256, "folds": 3}
    tree = {
        "policy": {"model": TINY},
        "prepare": {"source": "chat_jsonl", "path": "/nowhere"},
        "fit_reward": {"train": fit, "eval": fit},
    }
    return Settings.model_validate(tree | changes)


def write_artifact(
    home: Home,
    kind: str,
    tables: Mapping[str, tuple[list[dict[str, Any]] | pa.Table, Any]],
    facts: dict[str, Any] | None = None,
) -> Artifact:
    """An artifact with one shard of each table."""
    writer = ArtifactWriter(home, kind, digest_of([kind, sorted(tables)])[:24])
    rows = 0
    for name, (content, schema) in tables.items():
        writer.write_shard(name, 0, content, schema)
        rows = len(content)
    return writer.finish(rows_in=rows, rows_out=rows, facts=facts or {})


def write_prompts(home: Home, rows: list[dict[str, Any]]) -> Artifact:
    contents = {split: digest_of([r for r in rows if r["split"] == split]) for split in SPLITS}
    return write_artifact(home, "prepare", {"prompts": (rows, PROMPTS)}, {"split_contents": contents})


def write_candidates(home: Home, rows: list[dict[str, Any]]) -> Artifact:
    return write_artifact(home, "generate", {"candidates": (rows, CANDIDATES)})


def write_bert(folder: Path, layers: int = 1) -> Path:
    """A random bidirectional encoder without a chat template, on the tiny model's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from clha.tiny_model import tiny_tokenizer

    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=512,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def node_settings(settings: Settings, node: str) -> dict[str, Any]:
    """What the manifest of a node of the chain holds as `settings`."""
    return next(n.settings for n in nodes(settings) if n.name == node)


def node_work(
    home: Home,
    settings: Settings,
    node: str,
    inputs: Mapping[str, Artifact],
    models: Mapping[str, Path] | None = None,
    events: list[Event] | None = None,
) -> Work:
    """What a stage's build function gets for `node`, without a run around it."""
    planned = next(n for n in nodes(settings) if n.name == node)
    parts = {
        "kind": planned.kind,
        "code_version": 1,
        "settings": planned.settings,
        "inputs": {name: a.content for name, a in inputs.items()},
        "models": {role: str(path) for role, path in (models or {}).items()},
        "versions": {},
    }
    key = digest_of([parts, node])[:24]
    progress = Progress(events.append if events is not None else None, interval=0)
    return Work(
        home, "test", node, settings, parts, inputs, models or {}, ArtifactWriter(home, planned.kind, key), progress
    )


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


def given_file(folder: Path, rows: list[dict[str, Any]] | pa.Table) -> str:
    path = folder / "weights.parquet"
    pq.write_table(pa.Table.from_pylist(rows) if isinstance(rows, list) else rows, path)
    return str(path)


def given_row(**changes: Any) -> dict[str, Any]:
    return {"prompt_id": "a", "better": 0, "worse": 1, "weight": 1.0} | changes
