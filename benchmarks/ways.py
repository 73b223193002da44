"""One optimizer step by each way on the same weights and data, as functions that take it.

On the CPU in float32, on a GPU in bfloat16 (autocast) over float32 weights, all ways alike. A model folder without
weights gives random ones, which take as long.
"""

import argparse
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_PROMPT, MAX_RESPONSE = 384, 128
_SCRATCH = tempfile.TemporaryDirectory()  # where trainers would write; gone with the process


# -- data and model ----------------------------------------------------------------------------------------------


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


def has_weights(model: Path) -> bool:
    """Whether the folder holds weights, not a configuration alone."""
    return any(model.glob("*.safetensors"))


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model on its device, ready for training, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    # Weights that are not trained need no more digits than the products read.
    dtype = torch.bfloat16 if args.lora and args.device == "cuda" else torch.float32
    if has_weights(args.model):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    else:
        torch.manual_seed(args.seed)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=dtype)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=args.lora, target_modules="all-linear"))
    return model.train(), AutoTokenizer.from_pretrained(args.model)


def work_of(args: argparse.Namespace, model: Any, prompts: list[Any]) -> dict[str, float]:
    """What a step has to compute, whichever way it goes.

    {"tokens", "positions" that predict something, "flops", "attention" (its part of the flops)}
    """
    import torch

    from clha.training.batches import Layout
    from clha.training.flops import attention_flops, training_flops
    from clha.training.policy import causal_model

    batches = Layout(True, torch.device("cpu")).micro_batches(prompts, args.budget)
    return {
        "tokens": sum(b.tokens for b in batches),
        "positions": sum(len(b.predict_at) for b in batches),
        "flops": sum(training_flops(causal_model(model), b) for b in batches),
        "attention": sum(attention_flops(causal_model(model), b) for b in batches),
    }


# -- the ways ----------------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace) -> tuple[Callable[[], float], dict[str, float]]:
    """Our trainer's own step, with its checks and metrics."""
    import torch

    from clha.training.arguments import ClhaConfig
    from clha.training.memory import keep_freed_memory
    from clha.training.trainer import ClhaTrainer

    keep_freed_memory()
    model, tokenizer = load(args)
    prompts = ranked_prompts(args, tokenizer)
    settings = ClhaConfig(
        output_dir=_SCRATCH.name,
        tokens_per_micro_batch=args.budget,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda",
        torch_compile=args.compile,
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


class RankedPrompts:
    """Ranked prompts as a dataset."""

    def __init__(self, prompts: list[Any], n: int) -> None:
        self._prompts = prompts
        self.max_candidates = n

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Any:
        return self._prompts[index]


def reference(args: argparse.Namespace) -> tuple[Callable[[], float], dict[str, float]]:
    """n right-padded passes, a log-softmax over the whole vocabulary for every token, then the same loss."""
    import torch

    from clha.losses import clha_loss

    model, tokenizer = load(args)
    prompts = ranked_prompts(args, tokenizer)

    def summed(part: list[Any], k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and length of each prompt's response k, [B]."""
        full = [torch.tensor([*p.prompt.tolist(), *p.responses[k].tolist()]) for p in part]
        width = max(map(len, full))
        ids = torch.full((len(full), width), tokenizer.eos_token_id)
        mask = torch.zeros(len(full), width, dtype=torch.long)
        answer = torch.zeros(len(full), width, dtype=torch.bool)
        for row, (tokens, prompt) in enumerate(zip(full, part, strict=True)):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            answer[row, len(prompt.prompt) : len(tokens)] = True
        ids, mask, answer = ids.to(args.device), mask.to(args.device), answer.to(args.device)
        logps = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
        taken = logps.gather(2, ids[:, 1:, None])[..., 0] * answer[:, 1:]
        return taken.sum(1), answer.sum(1)

    def backward(part: list[Any]) -> float:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            sums, lengths = zip(*(summed(part, k) for k in range(args.n)), strict=True)
        loss = clha_loss(
            torch.stack(sums, 1),
            torch.stack(lengths, 1),
            torch.stack([torch.tensor(p.rewards) for p in part]).to(args.device),
            reward_gap=0.0,
            sft_lambda=torch.ones(len(part), device=args.device),
        ).total
        loss = loss * (len(part) / len(prompts))  # its terms are means over prompts, or over pairs, as many of each
        loss.backward()
        return float(loss.detach())

    def step() -> float:
        size = args.at_once or len(prompts)
        return sum(backward(prompts[i : i + size]) for i in range(0, len(prompts), size))

    return with_optimizer(model, step), work_of(args, model, prompts)


def with_optimizer(model: Any, backward: Callable[[], float]) -> Callable[[], float]:
    """A whole step: forward and backward, clipping, AdamW."""
    import torch

    # Without weight decay and at this rate the weights stay where they are, so all rounds do the same work.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-12, weight_decay=0.0, fused=True)

    def step() -> float:
        loss = backward()
        with torch.profiler.record_function("clipping"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def trl(args: argparse.Namespace, kind: str) -> tuple[Callable[[], float], dict[str, float]]:
    """TRL's own trainer on the pairs, one step of all prompts at a time."""
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
        "output_dir": _SCRATCH.name,
        "per_device_train_batch_size": len(prompts),
        "learning_rate": 1e-12,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": args.device == "cpu",
        "bf16": args.device == "cuda",
        "disable_tqdm": True,
        "gradient_checkpointing": False,  # where it is wanted, the model does it already
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
