#!/usr/bin/env python3
"""One optimizer step by three ways on the same weights and data: the reference's, TRL's, ours.

The reference's way: n right-padded passes with a log-softmax over the whole vocabulary. TRL: its CPO trainer (SimPO
loss, no reference model) and its DPO trainer, at n = 2. Ours: prompts shared, packed rows, chunked log-probabilities.
Each way runs in a process of its own; one round runs all ways once, so that all see the same weather on the machine.
Printed per way: median seconds, useful tokens per second, peak memory, and useful GFLOP/s as a share of the peak of
matrix products of the model's own shapes, measured in the same round; and the ratios to ours (else to the first way).

usage: train_step.py MODEL --data hh.jsonl[.gz] [--n 4] [--prompts 8] [--rounds 5] [--ways ours,reference]
       MODEL is a Hugging Face folder; the data are HH-RLHF pairs.
"""

import argparse
import gc
import gzip
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WAYS = ("ours", "reference", "trl-simpo", "trl-dpo")
MAX_PROMPT, MAX_RESPONSE = 384, 128


def read_pairs(path: Path) -> list[tuple[list[dict[str, str]], str, str]]:
    """(messages, chosen, rejected) of HH-RLHF rows whose dialogues part in the last turn only."""
    data = path.read_bytes()
    pairs = []
    for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines():
        row = json.loads(line)
        chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
        if chosen[:-1] == rejected[:-1] and chosen[:-1] and chosen[-1]["content"] and rejected[-1]["content"]:
            pairs.append((chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]))
    return pairs


def _turns(text: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[parts[i]], "content": parts[i + 1].strip()} for i in range(1, len(parts) - 1, 2)]


def ranked_prompts(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    """The prompts of the step; beyond two candidates, responses of other rows stand in, with their real lengths."""
    import numpy as np

    from clha.training.batches import RankedPrompt

    pairs = read_pairs(args.data)
    draw = np.random.default_rng(args.seed)
    rows = [pairs[i] for i in draw.permutation(len(pairs))[: args.prompts]] * args.repeat
    pool = [response for _, chosen, rejected in pairs for response in (chosen, rejected)]
    prompts, n = [], args.n
    for number, (messages, chosen, rejected) in enumerate(rows):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        texts = [chosen, rejected, *(pool[i] for i in draw.integers(len(pool), size=max(n - 2, 0)))][:n]
        responses = [[*tokenizer(t)["input_ids"][: MAX_RESPONSE - 1], tokenizer.eos_token_id] for t in texts]
        prompts.append(
            RankedPrompt(
                prompt_id=str(number),
                prompt=np.array(ids[-MAX_PROMPT:]),
                responses=[np.array(r) for r in responses],
                rewards=-np.arange(n, dtype=np.float64),
                pair_weights=np.triu(np.ones((n, n), dtype=np.float32), 1),
                sft_index=0,
                sft_lambda=1.0,
            )
        )
    return prompts


# -- the ways ----------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model.train(), AutoTokenizer.from_pretrained(args.model)


def work_of(args: argparse.Namespace, model: Any, prompts: list[Any]) -> dict[str, float]:
    """What a step has to compute, whichever way it goes: {"tokens", "positions" that predict something, "flops"}."""
    import torch

    from clha.training.batches import Layout
    from clha.training.flops import training_flops

    batches = Layout(True, torch.device("cpu")).micro_batches(prompts, args.budget)
    return {
        "tokens": sum(b.tokens for b in batches),
        "positions": sum(len(b.predict_at) for b in batches),
        "flops": sum(training_flops(model, b) for b in batches),
    }


def ours(args: argparse.Namespace) -> tuple[Callable[[], float], dict[str, float]]:
    """Our trainer's own step, with its checks and metrics."""
    import tempfile

    import torch

    from clha.training.arguments import ClhaConfig
    from clha.training.memory import keep_freed_memory
    from clha.training.trainer import ClhaTrainer

    keep_freed_memory()
    model, tokenizer = load(args)
    prompts = ranked_prompts(args, tokenizer)
    settings = ClhaConfig(
        output_dir=tempfile.mkdtemp(),
        tokens_per_micro_batch=args.budget,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = ClhaTrainer(model, settings, train_dataset=RankedPrompts(prompts, args.n), processing_class=tokenizer)
    work = work_of(args, model, prompts)

    def backward() -> float:
        (batch,), over = trainer.get_batch_samples(iter([prompts]), 1, torch.device("cpu"))
        return float(trainer.training_step(model, batch, over))

    return with_optimizer(model, backward), work


class RankedPrompts(list[Any]):
    """Ranked prompts as a dataset."""

    def __init__(self, prompts: list[Any], n: int) -> None:
        super().__init__(prompts)
        self.max_candidates = n


def reference(args: argparse.Namespace) -> tuple[Callable[[], float], dict[str, float]]:
    """n right-padded passes, a log-softmax over the vocabulary for every token, then the same loss."""
    import torch

    from clha.losses import clha_loss

    model, tokenizer = load(args)
    prompts = ranked_prompts(args, tokenizer)

    def step() -> float:
        sums, lengths = [], []
        for k in range(args.n):
            full = [torch.tensor([*p.prompt.tolist(), *p.responses[k].tolist()]) for p in prompts]
            width = max(map(len, full))
            ids = torch.full((len(full), width), tokenizer.eos_token_id)
            mask = torch.zeros(len(full), width, dtype=torch.long)
            answer = torch.zeros(len(full), width, dtype=torch.bool)
            for row, (tokens, prompt) in enumerate(zip(full, prompts, strict=True)):
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
                answer[row, len(prompt.prompt) : len(tokens)] = True
            logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
            taken = logps.gather(2, ids[:, 1:, None])[..., 0] * answer[:, 1:]
            sums.append(taken.sum(1))
            lengths.append(answer.sum(1))
        rewards = torch.stack([torch.tensor(p.rewards) for p in prompts])
        loss = clha_loss(
            torch.stack(sums, 1),
            torch.stack(lengths, 1),
            rewards,
            reward_gap=0.0,
            sft_lambda=torch.ones(len(prompts)),
        ).total
        loss.backward()
        return float(loss.detach())

    return with_optimizer(model, step), work_of(args, model, prompts)


def with_optimizer(model: Any, backward: Callable[[], float]) -> Callable[[], float]:
    """A whole step: forward and backward, clipping, AdamW."""
    import torch

    # Without weight decay and at this rate the weights stay where they are, so all rounds do the same work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=True)

    def step() -> float:
        loss = backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def trl(args: argparse.Namespace, kind: str) -> tuple[Callable[[], float], dict[str, float]]:
    """TRL's own trainer on the pairs, one step of all prompts at a time, gradient checkpointing off."""
    import tempfile

    from datasets import Dataset

    model, tokenizer = load(args)
    prompts = ranked_prompts(args, tokenizer)
    work = work_of(args, model, prompts)
    rows = [
        {
            "prompt": tokenizer.decode(p.prompt),
            "chosen": tokenizer.decode(p.responses[0][:-1]),
            "rejected": tokenizer.decode(p.responses[1][:-1]),
        }
        for p in prompts
    ]
    common = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": len(prompts),
        "learning_rate": 1e-12,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": MAX_PROMPT + MAX_RESPONSE + 8,
    }
    if kind == "dpo":
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model, args=DPOConfig(**common), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
    else:
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        settings = CPOConfig(loss_type="simpo", cpo_alpha=0.0, **common)
        trainer = CPOTrainer(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1  # what its train() sets

    def backward() -> float:
        return float(trainer.training_step(trainer.model, dict(batch)))

    return with_optimizer(trainer.model, backward), work


# -- measuring ---------------------------------------------------------------------------------------------------


def peak_of_own_shapes(args: argparse.Namespace, tokens: int, positions: int) -> float:
    """Operations per second of the model's own matrix products, best times, weighted by how much each is used.

    For each weight matrix: forward, gradient of the input, gradient of the weight, with `tokens` rows; for the output
    embedding with `positions` rows.
    """
    import torch

    config = json.loads((args.model / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    body = [(hidden, queries, 1), (queries, hidden, 1), (hidden, keys, 2), (hidden, inner, 2), (inner, hidden, 1)]
    shapes = [(tokens, inputs, outputs, layers * times) for inputs, outputs, times in body]
    shapes.append((positions, hidden, config["vocab_size"], 1))
    work = seconds = 0.0
    for rows, inputs, outputs, times in shapes:
        x, w, g = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
        y, dx, dw = torch.empty(rows, outputs), torch.empty(rows, inputs), torch.empty(outputs, inputs)
        for product in (
            lambda y=y, x=x, w=w: torch.mm(x, w.t(), out=y),
            lambda dx=dx, g=g, w=w: torch.mm(g, w, out=dx),
            lambda dw=dw, g=g, x=x: torch.mm(g.t(), x, out=dw),
        ):
            best = min(_seconds(product, args.cpu_time) for _ in range(4))
            work += times * 2.0 * rows * inputs * outputs
            seconds += times * best
    return work / seconds


def _seconds(work: Callable[[], Any], cpu_time: bool) -> float:
    clock = time.process_time if cpu_time else time.perf_counter
    start = clock()
    work()
    return clock() - start


def serve(args: argparse.Namespace) -> None:
    """A way in a process of its own: one step for each line on stdin, answered with a line of JSON.

    The way "peak" answers the work of a step with the peak of its shapes: beside the ways, whose memory is measured.
    """
    if args.way == "peak":
        import torch

        torch.set_num_threads(args.threads)
        print("{}", flush=True)
        for line in sys.stdin:
            work = json.loads(line)
            share = min(1.0, args.budget / work["tokens"])  # of a micro-batch in the step
            rows = (max(1, int(work[name] * share)) for name in ("tokens", "positions"))
            print(json.dumps({"peak": peak_of_own_shapes(args, *rows)}), flush=True)
        return
    made = {"ours": ours, "reference": reference}.get(args.way)
    step, work = made(args) if made else trl(args, args.way.removeprefix("trl-"))
    print(json.dumps(work), flush=True)
    for _ in sys.stdin:
        gc.collect()
        clock = time.process_time if args.cpu_time else time.perf_counter
        start = clock()
        loss = step()
        answer = {"seconds": clock() - start, "loss": loss}
        answer["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(answer), flush=True)


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

    def ask(self, command: str) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit("a process ended early; its error is above")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def arguments() -> argparse.ArgumentParser:
    """What both this script and growth.py take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="HH-RLHF pairs, JSON lines, .gz or plain")
    parser.add_argument("--n", type=int, default=4, help="candidates per prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1, help="take the prompts so many times in one step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=1024, help="tokens per micro-batch of ours")
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
    served, machine = {way: Served(way) for way in ways}, Served("peak")
    for way in served.values():
        way.ask("step")  # the first one allocates
    base = "ours" if "ours" in served else ways[0]
    answers: dict[str, list[dict[str, float]]] = {way: [] for way in served}
    peaks = []
    for _ in range(args.rounds):
        for name, way in served.items():
            answers[name].append(way.ask("step"))
        peaks.append(machine.ask(json.dumps(served[base].work))["peak"])
    for way in (*served.values(), machine):
        way.close()
    report(args, answers, peaks, served[base].work, base)


def report(args: argparse.Namespace, answers: dict[str, Any], peaks: list[float], work: Any, base: str) -> None:
    clock = "processor time" if args.cpu_time else "wall time"
    prompts = args.prompts * args.repeat
    print(f"{prompts} prompts, {args.n} candidates, {args.rounds} rounds, {args.threads} threads, {clock}")
    print(
        f"tokens that have to be computed: {work['tokens']:.0f}; {work['flops'] / 1e9:.0f} GFLOP; peak of the model's "
        f"own shapes {statistics.median(peaks) / 1e9:.0f} GFLOP/s ({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f})"
    )
    memory = {way: max(a["peak_gb"] for a in rows) for way, rows in answers.items()}
    for way, rows in answers.items():
        seconds = [a["seconds"] for a in rows]
        median = statistics.median(seconds)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rows, answers[base], strict=True))
        share = statistics.median(work["flops"] / s / peak for s, peak in zip(seconds, peaks, strict=True))
        print(
            f"{way:10} {median:7.2f} s ({min(seconds):.2f} to {max(seconds):.2f})  {work['tokens'] / median:6.0f} "
            f"useful tokens/s  {work['flops'] / median / 1e9:4.0f} useful GFLOP/s, {share:.2f} of the peak  "
            f"{memory[way]:5.2f} GB  {ratio:5.2f} x time, {memory[way] / memory[base]:4.2f} x memory of {base}  "
            f"loss {rows[-1]['loss']:.4f}"
        )


if __name__ == "__main__":
    main()
