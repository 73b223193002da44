"""Throughput of the generate stage against a bare `LLM.generate` over the same prompts.

    python benchmarks/generate.py [--prompts 64] [--n 4] [--max-tokens 48] [--rounds 2]

Each measurement is a process of its own that loads the model, warms up and then takes the time; kinds are interleaved.
`stage`: token ids from messages, sampling with log-probabilities, cutting, merging, Parquet shards. `bare`: the same
token ids, seeds and log-probabilities through `LLM.generate`, with vLLM's detokenizer. `bare, plain`: without seeds and
log-probabilities, which training needs: the fastest that vLLM does here.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("stage", "bare", "bare, plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--file", type=Path, default=ROOT / "data" / "sample" / "prompts.jsonl", help="chat JSONL")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("CLHA_HOME", ".clha")))
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print("RESULT " + json.dumps(measured(options)))
        return
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind in KINDS:
            child = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--measure", kind],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            line = next(line for line in child.stdout.splitlines() if line.startswith("RESULT "))
            result = json.loads(line.removeprefix("RESULT "))
            rates[kind].append(result["tokens"] / result["seconds"])
            print(
                f"{kind}: {rates[kind][-1]:.1f} tokens/s ({result['tokens']} in {result['seconds']:.1f} s, "
                f"{result['cpu_seconds']:.1f} s of CPU), "
                f"engine ready after {result['start_seconds']:.1f} s, peak {result['peak_bytes'] / 1e9:.1f} GB",
                flush=True,
            )
    middle = {kind: statistics.median(values) for kind, values in rates.items()}
    for kind in KINDS[1:]:
        print(f"stage / {kind}: {middle['stage'] / middle[kind]:.3f}")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens, seconds, start-up seconds and peak memory of one kind of run in this process."""
    from clha.chat import load_chat
    from clha.digests import prompt_id
    from clha.generation.requests import Sampling
    from clha.models import resolve_model
    from clha.settings import Engine as EngineSettings
    from clha.stages.work import peak_memory_bytes
    from clha.store import Home

    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    folder = resolve_model(options.model, Home(options.home).create()).path
    chat = load_chat(folder)
    lines = options.file.read_text(encoding="utf-8").splitlines()
    prompts = [{"messages": json.loads(line)["messages"], "source": "benchmark"} for line in lines[: options.prompts]]
    for prompt in prompts:
        prompt["prompt_id"] = prompt_id(prompt["messages"])
    settings = EngineSettings(max_model_len=options.max_prompt_tokens + options.max_tokens)
    sampling = Sampling(options.n, 1.0, 1.0, options.max_tokens, stop_token_ids=tuple(sorted(chat.special_ids)))
    measure = stage if options.measure == "stage" else bare
    result = measure(options, folder, chat, prompts, settings, sampling)
    return {**result, "peak_bytes": peak_memory_bytes()}


def stage(
    options: argparse.Namespace, folder: Path, chat: Any, prompts: list[Any], settings: Any, sampling: Any
) -> Any:
    """What the stage does, without its process and without the engine's start."""
    from clha.digests import seed_of
    from clha.generation.candidates import COUNTED, candidate_rows, checked_samples, finished_response
    from clha.generation.engine import InProcessEngine
    from clha.generation.requests import Request
    from clha.generation.sharded import Plan, generate_shards
    from clha.progress import Progress
    from clha.schema import CANDIDATES
    from clha.store import ArtifactWriter, Home

    started = time.monotonic()
    engine = InProcessEngine(folder, settings, sampling, 0)
    for k in range(2):
        engine.submit(Request(f"warm-up {k}", [5 + k] * 8, k))
    while engine.pending:
        engine.poll()
    ready, cpu = time.monotonic(), time.process_time()

    def rows(prompt: Any, encoded: Any, result: Any, counts: Counter[str]) -> list[Any]:
        samples = checked_samples(result.samples, options.n)
        responses = [finished_response(chat, sample, ()) for sample in samples]
        return candidate_rows(
            prompt["prompt_id"], encoded, responses, [], seed=0, generator="benchmark", source="", counts=counts
        )

    with tempfile.TemporaryDirectory() as home:
        writer = ArtifactWriter(Home(Path(home)).create(), "generate", "0" * 24)
        plan = Plan(
            "candidates",
            CANDIDATES,
            prompts,
            options.shard_size,
            options.max_prompt_tokens,
            options.n * options.max_tokens,
            lambda prompt: seed_of(0, prompt),
            COUNTED,
        )
        done = generate_shards(writer, Progress(), plan, chat, lambda: engine, rows)
    return {
        "tokens": done.counts["tokens_out"],
        "seconds": time.monotonic() - ready,
        "cpu_seconds": time.process_time() - cpu,
        "start_seconds": ready - started,
    }


def bare(options: argparse.Namespace, folder: Path, chat: Any, prompts: list[Any], settings: Any, sampling: Any) -> Any:
    """`LLM.generate` over all prompts at once, with the engine arguments that the stage uses."""
    from clha.digests import seed_of
    from clha.generation.engine import engine_arguments

    started = time.monotonic()
    arguments = engine_arguments(folder, settings, sampling, 0) | {"skip_tokenizer_init": False}
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(**arguments)
    plain = options.measure == "bare, plain"
    params = [
        SamplingParams(
            n=options.n,
            temperature=1.0,
            max_tokens=options.max_tokens,
            seed=None if plain else seed_of(0, prompt["prompt_id"]),
            logprobs=None if plain else 0,
            flat_logprobs=not plain,
        )
        for prompt in prompts
    ]
    asked = [
        TokensPrompt(prompt_token_ids=chat.encode_prompt(p["messages"], options.max_prompt_tokens).token_ids)
        for p in prompts
    ]
    llm.generate([TokensPrompt(prompt_token_ids=[5 + k] * 8) for k in range(2)], params[:2], use_tqdm=False)
    ready, cpu = time.monotonic(), time.process_time()
    outputs = llm.generate(asked, params, use_tqdm=False)
    return {
        "tokens": sum(len(o.token_ids) for output in outputs for o in output.outputs),
        "seconds": time.monotonic() - ready,
        "cpu_seconds": time.process_time() - cpu,
        "start_seconds": ready - started,
    }


if __name__ == "__main__":
    main()
