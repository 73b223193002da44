"""What a trainer trains and evaluates on: datasets as ranked prompts, and lines that a person should read of them."""

import logging
from typing import Any

from torch.utils.data import DataLoader

from clha.errors import UserError
from clha.training.arguments import ClhaConfig
from clha.training.batches import Layout
from clha.training.datasets import as_ranked_prompts, check_rows
from clha.training.limits import Limits
from clha.training.loader import PromptSampler, prompt_loader
from clha.training.objectives import REFERENCE_LOSSES
from clha.training.reference import with_reference
from clha.training.saving import SavingTrainer

_LOG = logging.getLogger(__name__)


class PromptedTrainer(SavingTrainer):
    """A Trainer whose datasets are ranked prompts, with the reference's log-probabilities where the loss needs them."""

    args: ClhaConfig
    train_dataset: Any
    eval_dataset: Any
    notes: list[str]  # lines that a person should read
    _layout: Layout
    _limits: Limits

    def _note(self, line: str) -> None:
        if line and line not in self.notes:
            self.notes.append(line)
            _LOG.warning(line)

    def _prompts(self, dataset: Any) -> Any:
        """A dataset, or each of a dict of them, as ranked prompts; for DPO with the reference's log-probabilities."""
        if isinstance(dataset, dict):
            return {name: self._prompts(part) for name, part in dataset.items()}
        args, tokenizer = self.args, self._tokenizer
        prompts = as_ranked_prompts(dataset, tokenizer, limits=self._limits, **args.data_settings())
        for note in getattr(prompts, "notes", ()):
            self._note(note)
        if args.loss not in REFERENCE_LOSSES:
            return prompts
        trained = self.state.global_step > 0
        return with_reference(prompts, self.model, self._layout, args.tokens_per_micro_batch, args.bf16, trained)

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None or len(self.train_dataset) == 0:
            raise ValueError("training needs a train_dataset with at least one prompt")
        return prompt_loader(self.train_dataset, PromptSampler.of(self.args, len(self.train_dataset)), self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All prompts of a dataset, or of the one of that name, in batches; `evaluation_loop` deals them itself."""
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if given not in named:
                raise UserError(f"evaluate: there is no eval_dataset {given!r}; there are {', '.join(named) or 'none'}")
            given = named[given]
        if given is None:
            raise ValueError("evaluation needs an eval_dataset")
        check_rows(given, "eval_dataset")
        return DataLoader(self._prompts(given), self.args.per_device_eval_batch_size, collate_fn=list)
