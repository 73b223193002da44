"""What a trainer writes and uploads: what is finite, checkpoints that are whole, no pickle but their own states."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from clha.errors import UserError
from clha.training import checks
from clha.training.checkpoints import last_checkpoint, mark_complete, why_not_resumable
from clha.training.export import stop_at_turn_end
from clha.training.processes import ProcessesTrainer

_LOG = logging.getLogger(__name__)
# What only resuming needs: optimizer, scheduler and random states are pickled, the rest says nothing about the model.
_FOR_RESUMING = (
    "*.pt",
    "*.pth",
    "*.bin",
    "trainer_state.json",
    "*complete.json",
    "*_fsdp_*",
    "optimizer_*",
    "README.md",
)


class SavingTrainer(ProcessesTrainer):
    """A Trainer that saves nothing that is not finite, marks whole checkpoints, resumes from those only, and leaves no
    pickled arguments."""

    _prompt_ids: Sequence[str] = ()  # of the step, in all processes
    _tokenizer: Any = None

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As any Trainer's; with `resume_from_checkpoint=True` half-written ones are passed over, each in a line.

        Raises UserError where a checkpoint that is given by its path cannot be gone on from.
        """
        path: str | None = None
        if resume_from_checkpoint is True:
            with self.args.main_process_first(local=False, desc="looking for checkpoints"):
                found = last_checkpoint(Path(self.args.output_dir or "."), _LOG.warning)
            if found is None:
                raise ValueError(
                    f"no complete checkpoint in {self.args.output_dir}; train without resume_from_checkpoint, "
                    "or give it the path of another trainer's checkpoint"
                )
            path = str(found)
        elif resume_from_checkpoint:
            path = os.fspath(resume_from_checkpoint)
            with self.args.main_process_first(local=False, desc="looking at the checkpoint"):
                problem = why_not_resumable(Path(path))
            if problem:
                raise UserError(
                    f"resume_from_checkpoint: {path}: {problem}; resume_from_checkpoint=True takes the newest whole "
                    "checkpoint of output_dir"
                )
        if path:
            self.args.eval_on_start = False  # done when the run began; once more would count towards an early stop
        return super().train(path, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Whether training is over is asked after steps only: a run that was killed after its last step, or after an
        # early stop, would train one step too many when it is resumed.
        if kwargs["resume_from_checkpoint"] is not None and self._is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _is_over(self) -> bool:
        early = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in early
        )

    def _check_finite(self, value: Tensor, what: str, step: int) -> None:
        folder = Path(self.args.output_dir or ".")
        checks.check_finite(float(value.detach()), what, step, self._prompt_ids, folder)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = torch.as_tensor(0.0 if norm is None else norm)
        self._check_finite(value, "the gradient norm", self.state.global_step + 1)
        return norm

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As any Trainer's; where messages were trained on, generation stops at the end of a turn too.

        Raises StageFailure, before anything is overwritten, where a weight is not finite.
        """
        model: Any = self.model
        largest = checks.largest_weights(model)
        # Copies are alike, and a script may let one process alone save them; shards are saved by all.
        largest = self._summed(largest) if self.is_fsdp_enabled else largest
        self._check_finite(largest, "a weight", self.state.global_step)
        if getattr(self.train_dataset, "conversational", False):
            stop_at_turn_end(model, self._tokenizer)
        # Shards are written later, and transformers takes a new best for one that it did not save without its folder.
        Path(output_dir or self.args.output_dir or ".").mkdir(parents=True, exist_ok=True)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir or ".", TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # A checkpoint holds no half of a log interval: what a run measured does not depend on where it was resumed.
        # With save_strategy "best" an evaluation may make one.
        may_save = self.args.save_strategy == SaveStrategy.BEST and self.control.should_evaluate
        self.control.should_log |= self.control.should_save or may_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Older ones go when the new one is complete: what is left besides may be half-written.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = self._get_output_dir(trial)
            mark_complete(Path(folder) / f"checkpoint-{self.state.global_step}")
            best = self.state.best_model_checkpoint
            rotate_checkpoints(folder, limit, best_model_checkpoint=best, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's model, as `hub_strategy` says; transformers' own would add pickled arguments.

        `hub_strategy` "checkpoint" and "all_checkpoints" ask for the states as well, in a folder of their own.
        """
        args, checkpoint = self.args, Path(checkpoint_folder)
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running: Any = self.push_in_progress
        if running is not None and not running.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # From a copy: the checkpoint itself may be removed while it is uploaded.
        folder = Path(args.output_dir or ".")
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_FOR_RESUMING), dirs_exist_ok=True)
        message = f"Training in progress, step {self.state.global_step}"
        common: dict[str, Any] = {
            "repo_id": self.hub_model_id,
            "token": args.hub_token,
            "revision": args.hub_revision,
            "run_as_future": True,
        }
        upload: Any = HfApi().upload_folder
        skipped = ["_*", "checkpoint-*", TRAINING_ARGS_NAME]
        jobs: Any = [upload(folder_path=folder, commit_message=message, ignore_patterns=skipped, **common)]
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        if args.hub_strategy in names:
            into = {"path_in_repo": names[HubStrategy(args.hub_strategy)], "commit_message": f"{message}, checkpoint"}
            jobs.append(upload(folder_path=checkpoint, **into, **common))
        if running is not None and not running.is_done():
            running.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)  # type: ignore[assignment]
