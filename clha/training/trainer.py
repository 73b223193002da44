"""A transformers Trainer that trains on ranked responses: it prepares batches and calls pure losses."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from clha.errors import UserError
from clha.training import checks, compiling, layers, policy
from clha.training.arguments import ClhaConfig, refuse_unused
from clha.training.batches import Layout, MicroBatch, RankedPrompt
from clha.training.datasets import check_given
from clha.training.flops import peak_flops, training_flops
from clha.training.inputs import checked_settings, load_given, tokenizer_of, with_new_adapter
from clha.training.limits import limits_of
from clha.training.logprobs import sum_by_response
from clha.training.metrics import Pace, Sums
from clha.training.objectives import Denominators, count, objective
from clha.training.prompted import PromptedTrainer


class ClhaTrainer(PromptedTrainer):
    """Trains a causal language model with CLHA or one of its baselines.

    Args:
        model: the model, or a name or folder to load it from (in float32).
        args: a `ClhaConfig`; without, its defaults.
        train_dataset, eval_dataset: `clha.training.preferences.Preferences`, or a `datasets.Dataset` in the
            preferences form or one of TRL's pair formats, see `clha.training.datasets`. To evaluate on: a dict too.
        processing_class: the tokenizer, or a processor that has one; needed for text. A model that is given by its name
            brings its own.
        peft_config: of an adapter to train instead of all weights.
        others: as for any Trainer (callbacks, optimizers, ...).

    Raises:
        UserError: something is given that would not be used, as compute_metrics, or that cannot be trained.
    """

    def __init__(
        self,
        model: Any,
        args: ClhaConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        refuse_unused(others)
        check_given(train_dataset, eval_dataset)
        args, (model, processing_class) = checked_settings(args), load_given(model, processing_class)
        self._tokenizer = tokenizer_of(processing_class)
        model = with_new_adapter(model, peft_config, args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        self._alone = args.world_size == 1
        if args.torch_compile:
            compiling.check_compiler(args.device)
        self.abilities = policy.attach(
            model, args.share_prompts, args.logits_megabytes << 20, self._alone, args.torch_compile
        )
        self.notes = []
        for line in (self.abilities.reason, checks.rounding_note(model)):
            self._note(line)
        pad_token_id = getattr(self._tokenizer, "pad_token_id", None) or 0
        self._layout = Layout(self.abilities.shares_prompts, args.device, pad_token_id)
        self._limits = limits_of(policy.causal_model(model))
        self._limits.check_length(args.max_length)
        self.train_dataset, self.eval_dataset = self._prompts(train_dataset), self._prompts(eval_dataset)
        self._candidates = getattr(self.train_dataset, "max_candidates", 2)
        self._pace, self._checked = Pace(args.loss), False
        self._peak: float | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The prompts of one optimizer step, and its denominators over all of them and all processes."""
        self._pace.step()
        samples = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._parts = float(self._summed(torch.tensor([float(sum(map(bool, samples)))])))
        prompts = [prompt for batch in samples for prompt in batch]
        # Here, where all processes meet anyway: once something is not finite, not all of them may come.
        self._prompt_ids = self._from_all([prompt.prompt_id for prompt in prompts])
        counted = count(prompts, self._candidates)
        return samples, Denominators.from_tensor(self._summed(counted.tensor()))

    def _micro_batches(self, prompts: list[RankedPrompt], dataset: Any) -> list[tuple[MicroBatch, float]]:
        """Prompts of `dataset` laid out for the model within the token budget, each layout with its weight in the loss.

        All processes get equally many, so that all take part in every collective: who has less to do repeats
        something at weight 0.
        """
        batches = [(batch, 1.0) for batch in self._layout.micro_batches(prompts, self.args.tokens_per_micro_batch)]
        missing = self._largest(len(batches)) - len(batches)
        if missing:
            batches = [(self._layout.batch((prompts or [dataset[0]])[:1]), 0.0)] * missing + batches
        return batches

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over `inputs`, a list of prompts. Returns the loss as it enters the log."""
        over, share = num_items_in_batch, 1.0
        if self.args.normalization == "reference":
            over, share = count(inputs, self._candidates), 1.0 / self._parts  # the mean over all that are not empty
        batches = self._micro_batches(inputs, self.train_dataset)
        if self.state.global_step == 0 and not self._checked:
            with self._pace.paused():
                self._check_generator(model, batches[0][0])
        model.train()
        total = torch.zeros((), device=self.args.device)
        for i, (batch, weight) in enumerate(batches):
            with self._summing(model, last=i == len(batches) - 1):
                parts, sums = self._objective(model, batch, over)
                parts = {name: value * share for name, value in parts.items()}
                loss = parts["total"] * (weight * self.args.world_size)  # data parallelism averages gradients
                self._check_finite(loss, "the loss", self.state.global_step + 1)
                with layers.adding_in_place() if self._alone else contextlib.nullcontext():
                    self.accelerator.backward(loss)
            if weight:
                self._pace.sums.add_batch(sums, batch, parts)
                self._pace.sums.add(flops=training_flops(policy.causal_model(self.model), batch))
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
        self._checked, known = True, batch.generator_logps
        if known is not None or self.args.world_size > 1:  # where weights are sharded, all processes take part
            model.eval()
            with self.compute_loss_context_manager():
                logps = policy.response_logps(model, batch).cpu()
            known = torch.full_like(logps, torch.nan) if known is None else known.cpu()
            self.notes.append(checks.check_generator_logps(logps, known, self.args.logprob_tolerance))

    @torch.no_grad()
    def evaluation_loop(self, dataloader: Any, description: str, *_: Any, **kwargs: Any) -> EvalLoopOutput:
        """Loss and metrics over a whole dataset; its prompts are dealt to the processes."""
        prefix, dataset, args = kwargs.get("metric_key_prefix", "eval"), dataloader.dataset, self.args
        model = self._model_to_evaluate()
        was_training = model.training
        model.eval()
        sums, size = Sums(args.loss), args.per_device_eval_batch_size
        with self._pace.paused():
            # Read once: text is tokenised when it is read.
            mine = [dataset[i] for i in range(args.process_index, len(dataset), args.world_size)]
            over = Denominators.from_tensor(self._summed(count(mine, dataset.max_candidates).tensor()))
            for start in range(0, -(-len(dataset) // args.world_size), size):
                for batch, weight in self._micro_batches(mine[start : start + size], dataset):
                    parts, logps = self._objective(model, batch, over)
                    if weight:
                        sums.add_batch(logps, batch, parts)
        model.train(was_training)
        sums.values = self._summed(sums.values)
        metrics = {f"{prefix}_{name}": value for name, value in ({"loss": sums["total"]} | sums.metrics(1)).items()}
        return EvalLoopOutput(np.empty(0), None, metrics, len(dataset))

    def predict(self, *_: Any, **__: Any) -> Any:
        raise UserError("ClhaTrainer.predict: there are no predictions, only metrics; use evaluate(dataset)")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the steps since the last log to a training log."""
        if "loss" in logs and "learning_rate" in logs:
            self._count_tokens()
            if self._peak is None:
                dtype = torch.bfloat16 if self.args.bf16 else torch.float32
                with self._pace.paused():
                    self._peak = peak_flops(self.args.device, dtype) * self.args.world_size
            logs |= self._pace.metrics(self._peak) | {"num_tokens": self.state.num_input_tokens_seen}
            self._pace = Pace(self.args.loss)
        elif "train_runtime" in logs:  # training is over; steps since the last row of metrics count too
            self._count_tokens()
            self._pace = Pace(self.args.loss)
        super().log(logs, start_time)

    def _count_tokens(self) -> None:
        self._pace.sums.values = self._summed(self._pace.sums.values)
        self.state.num_input_tokens_seen += int(self._pace.sums["tokens"])

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Nothing: `log` counts the tokens that were computed; transformers looks for token ids in the batch."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._pace.paused():
            super()._save_checkpoint(model, trial)
