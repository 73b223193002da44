"""Scoring throughput: batches by token budget and shared prompts against fixed-size batches in input order.

usage: python benchmarks/score.py MODEL_FOLDER [--prompts 24] [--layer 8] [--data HH_FILE.jsonl.gz] [--rounds 2]

The data are HH-shaped: lengths drawn as in harmless-base (or the file itself, its responses with shuffled others),
four responses a prompt. Target: at least 2 times the candidates per second of the fixed-size batches. The ways take
turns, and the fastest round of each counts. Prints the padding fraction of each way, which of them scoring takes, and
the largest difference of a feature between them.
"""

import argparse
import gzip
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESPONSES = 4
FIXED_BATCH = 16
# Words of prompts and responses in harmless-base: median and spread of the logarithm.
PROMPT_WORDS, RESPONSE_WORDS = (52, 1.0), (32, 0.9)


def synthetic(prompts: int, draw: random.Random) -> list[tuple[list[dict[str, str]], list[str]]]:
    """Dialogues with the lengths of harmless-base."""
    vocabulary = "the a of to and you that it is in for on with be as are this have not can what do they".split()  # noqa: SIM905

    def words(median: int, spread: float) -> str:
        count = min(400, max(1, round(median * draw.lognormvariate(0, spread))))
        return " ".join(draw.choices(vocabulary, k=count))

    return [
        ([{"role": "user", "content": words(*PROMPT_WORDS)}], [words(*RESPONSE_WORDS) for _ in range(RESPONSES)])
        for _ in range(prompts)
    ]


def from_file(path: Path, prompts: int, draw: random.Random) -> list[tuple[list[dict[str, str]], list[str]]]:
    """Prompts of an HH-RLHF file, each with its own two responses and those of another row."""
    with gzip.open(path, "rt") as f:
        rows = [json.loads(line) for line in f]
    split = [[r[k].rsplit("\n\nAssistant:", 1) for k in ("chosen", "rejected")] for r in draw.sample(rows, prompts + 1)]
    out = []
    for (chosen, rejected), (other, another) in pairwise(split):
        responses = [x[1].strip() or "-" for x in (chosen, rejected, other, another)]
        out.append(([{"role": "user", "content": chosen[0].strip()}], responses))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    import numpy as np
    import torch

    from clha.rewards.features import FrozenEncoder
    from clha.rewards.scoring import Padding
    from clha.rewards.texts import RewardInput

    draw = random.Random(0)
    dialogues = from_file(args.data, args.prompts, draw) if args.data else synthetic(args.prompts, draw)
    items = [RewardInput(messages, text) for messages, texts in dialogues for text in texts]
    draw.shuffle(items)  # candidates of many prompts, as they come from several shards
    encoder = FrozenEncoder(args.model, layer=args.layer, pooling="response_mean", max_tokens=1024)
    encoder.features(items[:4], tokens_per_batch=args.tokens_per_batch)  # warm up
    shares, saving = encoder.shares_prefixes, encoder.min_saving
    fixed = [list(range(i, min(i + FIXED_BATCH, len(items)))) for i in range(0, len(items), FIXED_BATCH)]
    by_length = f"by length, {args.tokens_per_batch} tokens a batch"
    ways = {f"fixed batches of {FIXED_BATCH}, input order": (False, fixed), by_length: (False, None)}
    if shares:
        ways["by length, prompts shared"] = (True, None)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values, paddings = {}, {}
    print(f"{len(items)} candidates, {args.model.name}, {args.layer} layers, {torch.get_num_threads()} threads")
    for _ in range(args.rounds):
        for name, (shared, batches) in ways.items():
            encoder.shares_prefixes, encoder.min_saving, encoder.padding = shared, 0.0, Padding()
            began = time.monotonic()
            read = encoder.features(items, tokens_per_batch=args.tokens_per_batch, batches=batches)
            seconds[name].append(time.monotonic() - began)
            values[name], paddings[name] = read.values, encoder.padding
    first, *others = values
    for name, padding in paddings.items():
        best = min(seconds[name])
        print(
            f"{name}: {len(items) / best:.1f} candidates/s ({min(seconds[first]) / best:.2f} x; rounds of "
            f"{', '.join(f'{s:.1f}' for s in seconds[name])} s), {padding.tokens} tokens computed, "
            f"padding {padding.fraction:.1%}"
        )
    if shares:
        saved = 1 - paddings["by length, prompts shared"].tokens / paddings[by_length].tokens
        taken = "they are shared" if saved >= saving else "they are not shared"
        print(f"shared prompts save {saved:.1%} of the tokens: {taken} (from {saving:.0%})")
    else:
        print("this model cannot share prompts")
    largest = max(float(np.abs(values[n] - values[first]).max() / np.abs(values[first]).max()) for n in others)
    print(f"largest difference of a feature: {largest:.1e} of the largest feature")


if __name__ == "__main__":
    main()
