"""Weights of a million prompts with four candidates from stored rewards: seconds and peak memory of the node `weigh`.

usage: python benchmarks/weights.py [--prompts 1000000] [--method quantile] [--members 1] [--labels]
--labels: two of the candidates are the data's, a fifth of their labels flipped; rewards are calibrated on them.
Target: at most 60 s and 2 GB, on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CANDIDATES = 4
SHARD = 65_536
FLIPPED = 0.2


def write_inputs(home_folder: str, prompts: int, members: int, labels: bool) -> None:
    """Artifacts `generate` and `score` as the stages write them, with random rewards and short texts."""
    import numpy as np
    import pyarrow as pa

    from clha.schema import CANDIDATES as SCHEMA
    from clha.schema import REWARDS
    from clha.store import ArtifactWriter, Home

    home = Home(Path(home_folder)).create()
    draw = np.random.default_rng(0)
    writers = {kind: ArtifactWriter(home, kind, "0" * 24) for kind in ("generate", "score")}
    for index, start in enumerate(range(0, prompts, SHARD)):
        count = min(SHARD, prompts - start)
        ids = np.repeat([f"{i:032x}" for i in range(start, start + count)], CANDIDATES)
        number = np.tile(np.arange(CANDIDATES, dtype=np.int32), count)
        rows = len(ids)
        quality = draw.normal(0, 2, (count, CANDIDATES))
        scores = (quality[..., None] + draw.normal(0, 0.5, (count, CANDIDATES, members))).reshape(rows, members)
        reward = pa.table(
            {
                "prompt_id": ids,
                "candidate_id": number,
                "reward": scores.mean(axis=1),
                "member_rewards": pa.FixedSizeListArray.from_arrays(pa.array(scores.ravel()), members).cast(
                    pa.list_(pa.float64())
                ),
                "truncated": np.zeros(rows, dtype=bool),
            },
            schema=REWARDS,
        )
        writers["score"].write_shard("rewards", index, reward)
        constant = {
            "origin": "generated", "text": "An answer.", "prompt_token_ids": [1, 2], "response_token_ids": [3, 4],
            "response_logprobs": [-1.0, -1.0], "finish_reason": "eos", "truncated_turns": 0, "seed": 0,
            "generator": "m",
        }  # fmt: skip
        columns = {"prompt_id": pa.array(ids), "candidate_id": pa.array(number)}
        columns |= {k: pa.array([v] * rows, SCHEMA.field(k).type) for k, v in constant.items()}
        if labels:
            first = draw.random(count) < 1 / (1 + np.exp(quality[:, 1] - quality[:, 0]))
            first ^= draw.random(count) < FLIPPED
            origins = np.full((count, CANDIDATES), "generated", dtype=object)
            origins[:, 0] = np.where(first, "dataset_chosen", "dataset_rejected")
            origins[:, 1] = np.where(first, "dataset_rejected", "dataset_chosen")
            columns["origin"] = pa.array(origins.ravel(), pa.string())
        writers["generate"].write_shard("candidates", index, pa.table(columns, schema=SCHEMA))
    for writer in writers.values():
        writer.finish(rows_in=prompts, rows_out=prompts, facts={})


def weigh(home_folder: str, method: str, members: int, labels: bool) -> None:
    """Build the node in this process and print what it took."""
    from reward_cases import node_work, settings

    from clha.stages import rescore
    from clha.stages.work import peak_memory_bytes
    from clha.store import Home

    home = Home(Path(home_folder))
    inputs = {kind: home.find(kind, "0" * 24) for kind in ("generate", "score")}
    assert all(inputs.values())
    noise: dict[str, Any] = {"method": method} | ({"calibration": "labels"} if labels else {})
    work = node_work(home, settings(rescore={"noise": noise, "shard_size": 8192}), "weigh", inputs)
    began = time.monotonic()
    artifact = rescore.build(work)
    seconds, memory = time.monotonic() - began, peak_memory_bytes() / 1e9
    m = artifact.manifest
    named = f"{method}, {members} member{'s' if members > 1 else ''}{', calibrated on labels' if labels else ''}"
    print(
        f"{m['rows_out']} prompts, {named}: {seconds:.1f} s, peak {memory:.2f} GB, "
        f"kept {m['kept_fraction']:.3f}, {'within' if seconds <= 60 and memory <= 2 else 'MISSES'} 60 s and 2 GB"
    )
    if labels:
        low, high = m["flip_rate"]["interval"]
        print(f"flip rate {m['flip_rate']['estimate']:.4f} [{low:.4f}, {high:.4f}], true {FLIPPED}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--method", default="quantile")
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--home", help="weigh the inputs in this folder (used by the script itself)")
    args = parser.parse_args()
    if args.home:
        weigh(args.home, args.method, args.members, args.labels)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder, args.prompts, args.members, args.labels)
        # A process of its own, so that the peak is that of weighing and not of making the data.
        again = ["--home", folder, "--method", args.method, "--members", str(args.members)]
        subprocess.run([sys.executable, __file__, *again, *(["--labels"] if args.labels else [])], check=True)


if __name__ == "__main__":
    main()
