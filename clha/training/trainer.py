"""A transformers Trainer that trains on ranked responses: it prepares batches and calls pure losses."""

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer
from transformers.trainer_utils import EvalLoopOutput

from clha.training import checks, policy
from clha.training.arguments import ClhaConfig
from clha.training.batches import Layout, MicroBatch, RankedPrompt
from clha.training.checkpoints import mark_complete
from clha.training.datasets import as_ranked_prompts
from clha.training.flops import peak_flops, training_flops
from clha.training.loader import PromptSampler, prompt_loader
from clha.training.logprobs import sum_by_response
from clha.training.metrics import Sums
from clha.training.objectives import Denominators, count, objective


class ClhaTrainer(Trainer):
    """Trains a causal language model with CLHA or one of its baselines.

    Args:
        model: the model, or a name or folder to load it from (in float32).
        args: a `ClhaConfig`.
        train_dataset, eval_dataset: `clha.training.preferences.Preferences`, or a `datasets.Dataset` in the
            preferences form or one of TRL's pair formats, see `clha.training.datasets`.
        processing_class: the tokenizer; needed for text.
        peft_config: of an adapter to train instead of all weights.
        others: as for any Trainer (callbacks, optimizers, ...).
    """

    args: ClhaConfig
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        args: ClhaConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            train_dataset=as_ranked_prompts(train_dataset, processing_class),
            eval_dataset=as_ranked_prompts(eval_dataset, processing_class),
            processing_class=processing_class,
            **others,
        )
        self.abilities = policy.attach(model, args.share_prompts, args.logits_megabytes << 20)
        self.notes = [self.abilities.reason] if self.abilities.reason else []  # lines that a person should read
        sets = [d for d in (self.train_dataset, self.eval_dataset) if d is not None]
        self._candidates = max((d.max_candidates for d in sets), default=2)
        self._pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        self._sums, self._steps, self._since = Sums(), 0, 0.0  # since the last log
        self._peak: float | None = None

    def get_train_dataloader(self) -> Any:
        args = self.args
        if self.train_dataset is None or len(self.train_dataset) == 0:
            raise ValueError("training needs a train_dataset with at least one prompt")
        seed, batch = args.seed if args.data_seed is None else args.data_seed, args.per_device_train_batch_size
        sampler = PromptSampler(len(self.train_dataset), batch, seed, args.process_index, args.world_size)
        return prompt_loader(self.train_dataset, sampler, args.dataloader_num_workers)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The prompts of one optimizer step, and its denominators over all of them and all processes."""
        self._since = self._since or time.perf_counter()
        self._steps += 1
        samples = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counted = count([prompt for batch in samples for prompt in batch], self._candidates)
        return samples, Denominators.from_tensor(self._summed(counted.tensor()))

    def _summed(self, values: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _micro_batches(self, prompts: list[RankedPrompt]) -> list[tuple[MicroBatch, float]]:
        """Prompts laid out for the model within the token budget, each layout with its weight in the loss.

        All processes get equally many, so that all take part in every collective: who has less to do repeats
        something at weight 0.
        """
        layout = Layout(self.abilities.shares_prompts, self.args.device, self._pad_token_id)
        batches = [(batch, 1.0) for batch in layout.micro_batches(prompts, self.args.tokens_per_micro_batch)]
        if self.args.world_size > 1:
            most = int(self.accelerator.gather(torch.tensor([len(batches)], device=self.args.device)).max())
            idle = layout.batch((prompts or [self.train_dataset[0]])[:1])
            batches = [(idle, 0.0)] * (most - len(batches)) + batches
        return batches

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over `inputs`, a list of prompts. Returns the loss as it enters the log."""
        over, scale = num_items_in_batch, float(self.args.world_size)  # data parallelism averages gradients
        if self.args.normalization == "reference":
            over, scale = count(inputs, self._candidates), 1.0 / self.current_gradient_accumulation_steps
        self._prompt_ids = [prompt.prompt_id for prompt in inputs]
        batches = self._micro_batches(inputs)
        if self.state.global_step == 0:
            self._check_generator(model, batches[0][0])
        model.train()
        total = torch.zeros((), device=self.args.device)
        for i, (batch, weight) in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else self.accelerator.no_sync(model):
                parts, sums = self._objective(model, batch, over)
                loss = parts["total"] * (scale * weight)
                self._check_finite(loss, "the loss")
                self.accelerator.backward(loss)
            if weight:
                self._sums.add_batch(sums, batch, parts)
                self._sums.add(flops=training_flops(policy.causal_model(self.model), batch))
            total += loss.detach()
        return total

    def _objective(self, model: Any, batch: MicroBatch, over: Denominators) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss, and the summed log-probabilities [B, n]."""
        with self.compute_loss_context_manager():
            logps = policy.response_logps(model, batch)
        sums = sum_by_response(logps, batch.target_cell, *batch.candidate_mask.shape)
        return objective(sums, batch, over, **self.args.objective_settings()), sums

    @torch.no_grad()
    def _check_generator(self, model: Any, batch: MicroBatch) -> None:
        if batch.generator_logps is not None:
            model.eval()
            logps = policy.response_logps(model, batch)
            known = batch.generator_logps.cpu()
            self.notes.append(checks.check_generator_logps(logps, known, self.args.logprob_tolerance))

    def _check_finite(self, value: Tensor, what: str) -> None:
        folder = Path(self.args.output_dir or ".")
        checks.check_finite(float(value.detach()), what, self.state.global_step + 1, self._prompt_ids, folder)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._check_finite(torch.as_tensor(0.0 if norm is None else norm), "the gradient norm")
        return norm

    @torch.no_grad()
    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **kwargs: Any) -> EvalLoopOutput:
        """Loss and metrics over a whole dataset; its prompts are dealt to the processes."""
        prefix, dataset, args = kwargs.get("metric_key_prefix", "eval"), dataloader.dataset, self.args
        model, was_training, began = self.model_wrapped, self.model_wrapped.training, time.perf_counter()
        model.eval()
        sums, over = Sums(), count((dataset[i] for i in range(len(dataset))), self._candidates)
        step = args.per_device_eval_batch_size * args.world_size
        for start in range(0, len(dataset), step):
            mine = range(start, min(start + step, len(dataset)))[args.process_index :: args.world_size]
            for batch, weight in self._micro_batches([dataset[i] for i in mine]):
                parts, logps = self._objective(model, batch, over)
                if weight:
                    sums.add_batch(logps, batch, parts)
        model.train(was_training)
        self._since += (time.perf_counter() - began) if self._since else 0.0
        sums.values = self._summed(sums.values)
        metrics = {f"{prefix}_{name}": value for name, value in ({"loss": sums["total"]} | sums.metrics(1)).items()}
        return EvalLoopOutput(np.empty(0), None, metrics, len(dataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log to a training log."""
        if "loss" in logs and "learning_rate" in logs:
            self._sums.values = self._summed(self._sums.values)
            self.state.num_input_tokens_seen += int(self._sums["tokens"])
            seconds = time.perf_counter() - self._since
            if self._peak is None:
                dtype = torch.bfloat16 if self.args.bf16 else torch.float32
                self._peak = peak_flops(self.args.device, dtype) * self.args.world_size
            logs |= self._sums.metrics(self._steps)
            logs["num_tokens"] = self.state.num_input_tokens_seen
            logs["perf/tokens_per_second"] = self._sums["tokens"] / seconds
            logs["perf/mfu"] = self._sums["flops"] / seconds / self._peak
            self._sums, self._steps, self._since = Sums(), 0, 0.0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")
        self._since += (time.perf_counter() - start) if self._since else 0.0
