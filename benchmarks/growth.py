#!/usr/bin/env python3
"""What grows with the data: time and memory of a step with the number of prompts, and the start from many rows.

Steps of ours with the given prompts, with each of them twice and four times, each size in a process of its own and all
sizes once a round; the token budget of a micro-batch is the same for all. Then a training run's start: made-up tables
of a million candidates are joined and opened in a process of their own.

usage: growth.py MODEL --data hh.jsonl[.gz] [--n 4] [--prompts 8] [--rounds 5] [--budget 512] [--rows 1000000]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from train_step import Served, arguments

_SHARDS, _N, _PROMPT, _RESPONSE = 5, 4, 100, 48

_START = """
import json, sys, time
from pathlib import Path
import torch
from clha.training.preferences import Preferences, join_preferences

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, most, folder = anonymous(), 0, Path(sys.argv[1])
from threading import Thread
def watch():
    global most
    while True:
        most = max(most, anonymous())
        time.sleep(0.02)
Thread(target=watch, daemon=True).start()
tables = {t: sorted(folder.glob(f"{t}-*.parquet")) for t in ("candidates", "rewards", "weights", "prompts")}
times = []
for _ in range(2):
    start = time.perf_counter()
    join_preferences(folder / "joined", **tables)
    data = Preferences(folder / "joined", "train")
    first = [data[i] for i in range(8)]
    times.append(time.perf_counter() - start)
print(json.dumps({"prompts": len(data), "first": times[0], "again": times[1], "mb": (most - before) / 1e3}))
"""


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    parser.add_argument("--rows", type=int, default=1_000_000, help="candidates of the start; 0: leave it out")
    args = parser.parse_args()
    repeats = [1, 2, 4]
    served = [Served("ours", argv(args, repeat)) for repeat in repeats]
    for process in served:
        process.ask("step")
    rounds = [[process.ask("step") for process in served] for _ in range(args.rounds)]
    for process in served:
        process.close()
    for i, repeat in enumerate(repeats):
        seconds = statistics.median(answers[i]["seconds"] for answers in rounds)
        memory, tokens = max(answers[i]["peak_gb"] for answers in rounds), served[i].work["tokens"]
        line = f"{args.prompts * repeat:4} prompts, {tokens:6.0f} tokens: {seconds:7.2f} s, {memory:.2f} GB"
        if i:
            ratio = statistics.median(answers[i]["seconds"] / answers[i - 1]["seconds"] for answers in rounds)
            line += f"; {ratio:.2f} x the time for {tokens / served[i - 1].work['tokens']:.2f} x the tokens"
        print(line, flush=True)
    if args.rows:
        start(args.rows)


def argv(args: argparse.Namespace, repeat: int) -> list[str]:
    """The arguments of train_step.py for one size."""
    known = vars(args)
    names = ("data", "n", "prompts", "device", "budget", "lora", "threads", "seed")
    pairs = [["--" + name, str(known[name])] for name in names]
    flags = ["--" + name.replace("_", "-") for name in ("checkpointing", "cpu_time") if known[name]]
    return [str(known["model"]), *(word for pair in pairs for word in pair), "--repeat", str(repeat), *flags]


def start(rows: int) -> None:
    """Join and open made-up tables; time to the first eight prompts, the first time and when joined already."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        write_tables(folder, rows // _N)
        print(f"tables of {rows} candidates made in {time.perf_counter() - began:.0f} s", flush=True)
        command = [sys.executable, "-c", _START, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"start from {rows} candidates of {found['prompts']} prompts: {found['first']:.1f} s the first time, "
            f"{found['again'] * 1e3:.0f} ms when joined already, {found['mb']:.0f} MB of data in memory at most"
        )


def write_tables(folder: Path, prompts: int) -> None:
    draw = np.random.default_rng(0)
    ids = np.array([f"{i:032x}" for i in range(prompts)])
    upper = np.triu(np.ones((_N, _N), dtype=np.float32), 1).tolist()

    def lists(values: np.ndarray, size: int) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, size, dtype=np.int32)), pa.array(values))

    for shard, own in enumerate(np.array_split(ids, _SHARDS)):
        rows = len(own) * _N
        prompt_ids, numbers = np.repeat(own, _N), np.tile(np.arange(_N, dtype=np.int32), len(own))
        tokens = np.repeat(draw.integers(0, 49152, (len(own), _PROMPT), dtype=np.int32), _N, 0).ravel()
        logps = -draw.random(rows * _RESPONSE, dtype=np.float32)
        tables = {
            "candidates": {
                "prompt_id": prompt_ids,
                "candidate_id": numbers,
                "prompt_token_ids": lists(tokens, _PROMPT),
                "response_token_ids": lists(draw.integers(0, 49152, rows * _RESPONSE, dtype=np.int32), _RESPONSE),
                "response_logprobs": lists(logps, _RESPONSE),
            },
            "rewards": {"prompt_id": prompt_ids, "candidate_id": numbers, "reward": -numbers.astype(np.float64)},
            "weights": {
                "prompt_id": own,
                "order": lists(numbers, _N),
                "pair_weights": [upper] * len(own),
                "sft_index": np.zeros(len(own), dtype=np.int32),
                "sft_lambda": np.ones(len(own), dtype=np.float32),
            },
            "prompts": {"prompt_id": own, "split": ["train"] * len(own)},
        }
        for name, columns in tables.items():
            pq.write_table(pa.table(columns), folder / f"{name}-{shard:05d}.parquet", row_group_size=65_536)


if __name__ == "__main__":
    main()
