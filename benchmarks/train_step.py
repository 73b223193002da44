#!/usr/bin/env python3
"""One optimizer step by three ways on the same weights and data: the reference's, TRL's, ours.

The reference's way: n right-padded passes with a log-softmax over the whole vocabulary. TRL: its CPO trainer (SimPO
loss, no reference model) and its DPO trainer, at n = 2. Ours: prompts shared, packed rows, chunked log-probabilities.
Each way runs in a process of its own. On the CPU one round runs all ways once, so that all see the same weather on the
machine; on a GPU (`--device cuda`: bfloat16 over float32 weights, for all ways) they run one after the other, so that
each has its memory. Printed per way: median seconds, useful tokens per second, peak memory (of the process, or of
what it allocates on the GPU), and useful GFLOP/s as a share of the peak of matrix products of the model's own shapes;
and the ratios to ours (else to the first way).

usage: train_step.py MODEL --data hh.jsonl[.gz] [--n 4] [--prompts 8] [--rounds 5] [--ways ours,reference]
       train_step.py MODEL --data hh.jsonl[.gz] --device cuda [--prompts 32] [--checkpointing] [--lora 16]
       MODEL is a Hugging Face folder (its configuration alone: random weights); the data are HH-RLHF pairs.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peak import peak_of_own_shapes
from ways import has_weights, ours, reference, trl

WAYS = ("ours", "reference", "trl-simpo", "trl-dpo")
BUDGET = {"cpu": 512, "cuda": 16_384}


def serve(args: argparse.Namespace) -> None:
    """A way in a process of its own: one step for each line on stdin, answered with a line of JSON.

    The way "peak" answers the work of a step with the peak of its shapes: beside the ways, whose memory is measured.
    """
    import torch

    if args.way == "peak":
        torch.set_num_threads(args.threads)
        print("{}", flush=True)
        for line in sys.stdin:
            work = json.loads(line)
            share = min(1.0, args.budget / work["tokens"])  # of a micro-batch in the step
            tokens, positions = (max(1, int(work[name] * share)) for name in ("tokens", "positions"))
            peak = peak_of_own_shapes(args.model, tokens, positions, args.device, args.cpu_time)
            print(json.dumps({"peak": peak}), flush=True)
        return
    made = {"ours": ours, "reference": reference}.get(args.way)
    step, work = made(args) if made else trl(args, args.way.removeprefix("trl-"))
    named = {"device": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    print(json.dumps(work | named), flush=True)
    for _ in sys.stdin:
        gc.collect()
        try:
            print(json.dumps(timed_on_gpu(step) if args.device == "cuda" else timed(step, args.cpu_time)), flush=True)
        except torch.OutOfMemoryError:
            print(json.dumps({"error": "out of memory"}), flush=True)


def timed(step: Any, cpu_time: bool) -> dict[str, float]:
    clock = time.process_time if cpu_time else time.perf_counter
    start = clock()
    loss = step()
    seconds = clock() - start
    return {"seconds": seconds, "loss": loss, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def timed_on_gpu(step: Any) -> dict[str, float]:
    import torch

    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    loss = step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": loss, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


class Served:
    """The other end of `serve`; `argv` are its arguments, by default those of this process."""

    def __init__(self, way: str, argv: Sequence[str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *(argv or sys.argv[1:]), "--way", way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
        )
        self.work = self._read()

    def ask(self, command: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit("a process ended early; its error is above")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *given: Any, **named: Any) -> Any:
        args = super().parse_args(*given, **named)
        args.budget = args.budget or BUDGET[args.device]
        return args


def arguments() -> argparse.ArgumentParser:
    """What both this script and growth.py take."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="HH-RLHF pairs, JSON lines, .gz or plain")
    parser.add_argument("--n", type=int, default=4, help="candidates per prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1, help="take the prompts so many times in one step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=sorted(BUDGET), default="cpu")
    parser.add_argument("--budget", type=int, help=f"tokens per micro-batch of ours; by device: {BUDGET}")
    parser.add_argument("--at-once", type=int, default=0, help="prompts per pass of the reference's way; 0: all")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward, all ways")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the model, ours only")
    parser.add_argument("--lora", type=int, default=0, help="rank of an adapter to train instead of all weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time instead of wall time: for busy machines"
    )
    parser.add_argument("--way", choices=(*WAYS, "peak"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = arguments()
    parser.add_argument("--ways", default="ours,reference", help=", ".join(WAYS))
    args = parser.parse_args()
    if args.way:
        serve(args)
        return
    ways = args.ways.split(",")
    unknown = sorted(set(ways) - set(WAYS))
    if unknown:
        parser.error(f"--ways {unknown[0]}: there are {', '.join(WAYS)}")
    if args.n != 2 and any(way.startswith("trl") for way in ways):
        parser.error("TRL's ways take pairs: give --n 2")
    base = "ours" if "ours" in ways else ways[0]
    measure = one_after_the_other if args.device == "cuda" else in_turns
    report(args, *measure(args, ways, base), base)


Measured = tuple[dict[str, list[dict[str, Any]]], list[float], dict[str, Any]]


def in_turns(args: argparse.Namespace, ways: list[str], base: str) -> Measured:
    """The answers of each way, the peaks, and the work of a step."""
    served, machine = {way: Served(way) for way in ways}, Served("peak")
    for way in served.values():
        way.ask("step")  # the first one allocates
    answers: dict[str, list[dict[str, Any]]] = {way: [] for way in served}
    peaks = []
    for _ in range(args.rounds):
        for name, way in served.items():
            answers[name].append(way.ask("step"))
        peaks.append(machine.ask(json.dumps(served[base].work))["peak"])
    for way in (*served.values(), machine):
        way.close()
    return answers, peaks, served[base].work


def one_after_the_other(args: argparse.Namespace, ways: list[str], base: str) -> Measured:
    """The same, no process beside another."""
    answers, works = {}, {}
    for name in ways:
        way = Served(name)
        # The first step compiles and the second finds memory of the right sizes.
        answers[name] = [way.ask("step") for _ in range(args.rounds + 2)][2:]
        works[name] = way.work
        way.close()
    machine = Served("peak")
    peaks = [machine.ask(json.dumps(works[base]))["peak"] for _ in range(args.rounds)]
    machine.close()
    return answers, peaks, works[base]


def report(args: argparse.Namespace, answers: dict[str, Any], peaks: list[float], work: Any, base: str) -> None:
    clock = "processor time" if args.cpu_time else "wall time"
    prompts, where = args.prompts * args.repeat, work.get("device", f"{args.threads} threads")
    trained = f", LoRA of rank {args.lora}" if args.lora else ""
    trained += ", activations computed again" if args.checkpointing else ""
    trained += ", ours compiled" if args.compile else ""
    weights = "" if has_weights(args.model) else ", random weights"
    print(f"{prompts} prompts, {args.n} candidates, {args.rounds} rounds, {where}, {clock}{trained}{weights}")
    print(
        f"tokens that have to be computed: {work['tokens']:.0f}; {work['flops'] / 1e9:.0f} GFLOP; peak of the model's "
        f"own shapes {statistics.median(peaks) / 1e9:.0f} GFLOP/s ({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f})"
    )
    ran = {way: rows for way, rows in answers.items() if not any("error" in row for row in rows)}
    memory = {way: max(a["peak_gb"] for a in rows) for way, rows in ran.items()}
    for way in answers:
        if way not in ran:
            print(f"{way:10} out of memory")
            continue
        seconds = [a["seconds"] for a in ran[way]]
        median = statistics.median(seconds)
        share = statistics.median(work["flops"] / s / peak for s, peak in zip(seconds, peaks, strict=True))
        ratios = ""
        if base in ran:
            ratio = statistics.median(s / b["seconds"] for s, b in zip(seconds, ran[base], strict=True))
            ratios = f"{ratio:5.2f} x time, {memory[way] / memory[base]:4.2f} x memory of {base}  "
        print(
            f"{way:10} {median:7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})  {work['tokens'] / median:6.0f} "
            f"useful tokens/s  {work['flops'] / median / 1e9:4.0f} useful GFLOP/s, {share:.2f} of the peak  "
            f"{memory[way]:5.2f} GB  {ratios}loss {ran[way][-1]['loss']:.4f}"
        )


if __name__ == "__main__":
    main()
