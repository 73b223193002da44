"""Settings of a training run, as transformers' TrainingArguments with what CLHA adds."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from clha.errors import UserError
from clha.training.objectives import LOSSES, REFERENCE_LOSSES

_log = logging.getLogger(__name__)

# What the numbers may be, in words and as a test, which NaN never passes.
_Rule = tuple[str, Callable[[float], bool]]
_NOT_NEGATIVE: _Rule = ("at least 0", lambda value: 0 <= value < math.inf)
_POSITIVE: _Rule = ("above 0", lambda value: 0 < value < math.inf)
_ONE_OR_MORE: _Rule = ("at least 1", lambda value: 1 <= value < math.inf)
_RULES: dict[str, _Rule] = {
    "margin": _NOT_NEGATIVE,
    "reward_gap": _NOT_NEGATIVE,
    "sft_threshold": ("a number", lambda value: not math.isnan(value)),  # infinite: always, never
    "sft_weight": _NOT_NEGATIVE,
    "beta": _POSITIVE,
    "label_smoothing": ("at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    "tokens_per_micro_batch": _ONE_OR_MORE,
    "logits_megabytes": _NOT_NEGATIVE,
    "logprob_tolerance": _POSITIVE,
    "per_device_train_batch_size": _ONE_OR_MORE,
    "per_device_eval_batch_size": _ONE_OR_MORE,
    "gradient_accumulation_steps": _ONE_OR_MORE,
}
# What a Trainer takes and this one would leave aside without a word, and why there is no use for it.
_UNSUPPORTED = {
    "label_smoothing_factor": "it smooths a cross-entropy; label_smoothing is that of dpo_smoothed and dpo_robust",
    "dataloader_drop_last": "the last step of an epoch takes the prompts that are left, with denominators of its own",
    "eval_accumulation_steps": "evaluate() keeps sums, no predictions",
    "batch_eval_metrics": "evaluate() keeps sums, no predictions",
    "include_for_metrics": "there is no compute_metrics",
    "torch_empty_cache_steps": "tokens_per_micro_batch and logits_megabytes bound the memory",
}
_SMOOTHED = ("dpo_smoothed", "dpo_robust")


@dataclass
class ClhaConfig(TrainingArguments):
    """`TrainingArguments` with the settings of the losses.

    `per_device_train_batch_size` counts prompts, each with all its responses. A step is the same however it is cut
    into accumulation steps, micro-batches and processes (`normalization="batch"`). `torch_compile` compiles the
    model's blocks, which takes up to a minute when training starts.

    `reward_gap` and `sft_threshold` give a `datasets.Dataset` with rewards the weights that it does not bring: a pair
    counts where its rewards are more than `reward_gap` apart, the SFT part where the reward of its response is above
    `sft_threshold`. Both are in units of the reward; the defaults are the paper's, for its reward models.
    """

    loss: str = field(default="clha", metadata={"help": f"One of {', '.join(LOSSES)}."})
    margin: float = field(default=3.0, metadata={"help": "Margin of the hinge per rank, in nats per token."})
    reward_gap: float = field(
        default=3.0, metadata={"help": "Without pair_weights: pairs whose rewards are up to this apart are noise."}
    )
    sft_threshold: float = field(
        default=0.0, metadata={"help": "Without sft_lambda: the SFT part counts where its reward is above this."}
    )
    sft_weight: float = field(default=0.05, metadata={"help": "Weight of the SFT part (clha, pro)."})
    sft_by: str = field(default="sum", metadata={"help": "SFT part by token `sum` (the paper's) or `mean` (clha)."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the tie to the reference (dpo*)."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of flipped labels that dpo_smoothed and dpo_robust reckon with."}
    )
    normalization: str = field(
        default="batch",
        metadata={"help": "Denominators of the whole optimizer `batch`, or per micro-batch as the `reference` code."},
    )
    tokens_per_micro_batch: int = field(
        default=4096, metadata={"help": "Input tokens of one forward and backward pass; sets memory, not the result."}
    )
    share_prompts: bool = field(default=True, metadata={"help": "Compute each prompt once for all its responses."})
    logits_megabytes: int = field(default=256, metadata={"help": "Memory for logits; more are computed in chunks."})
    logprob_tolerance: float = field(
        default=0.05,
        metadata={"help": "Mean difference from the generator's log-probabilities, first batch, nats per token."},
    )

    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of a prompt with a response; longer rows lose the beginning of the prompt."},
    )
    control_tokens_in_text: bool = field(
        default=False,
        metadata={"help": "Plain text may spell control tokens: a chat template was applied to it, it is trusted."},
    )

    # What TrainingArguments sets otherwise.
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Prompts per device and accumulation step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Prompts looked at together in evaluation."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two rows of metrics."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "A resumed run knows how long there was no better evaluation (early stop)."}
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False
        self.logging_nan_inf_filter = False
        # Two complete checkpoints: a half-written one must have a predecessor.
        if self.save_total_limit is not None:
            self.save_total_limit = max(2, self.save_total_limit)
        if self.fp16 or self.fp16_full_eval or self.bf16_full_eval:
            raise ValueError(
                "fp16, fp16_full_eval and bf16_full_eval are not supported: the loss scaling of float16 overflows on "
                "purpose, and evaluation computes as training does; use bf16=True"
            )
        for name, why in _UNSUPPORTED.items():
            if getattr(self, name):
                raise ValueError(f"{name} is not supported: {why}")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be random or sequential, not {self.train_sampling_strategy!r}: prompts "
                "are packed up to tokens_per_micro_batch, whatever their lengths"
            )
        if not self.dataloader_in_order:
            raise ValueError("dataloader_in_order=False is not supported: a run that is resumed needs the order")
        if self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError("torch_compile_backend and torch_compile_mode are not supported: torch_compile=True is")
        # Blocks are compiled when the trainer is made; accelerate would compile all of the model, layout and attention.
        compiled, self.torch_compile = self.torch_compile, False
        super().__post_init__()
        self.torch_compile = compiled
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not {self.loss!r}")
        if self.normalization not in ("batch", "reference"):
            raise ValueError(f"normalization must be batch or reference, not {self.normalization!r}")
        if self.sft_by not in ("sum", "mean"):
            raise ValueError(f"sft_by must be sum or mean, not {self.sft_by!r}")
        for name, (wanted, allows) in _RULES.items():
            if not allows(getattr(self, name)):
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise ValueError(f"label_smoothing needs loss {' or '.join(_SMOOTHED)}, it is {self.loss}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        if self.fsdp and int(self.fsdp_config.get("version", 2)) != 2:  # type: ignore[union-attr, arg-type]
            raise ValueError("fsdp_config version 1 is not supported: use 2")
        if self.n_gpu > 1:
            _log.warning(
                "one process trains on one of the %d GPUs; for all of them start as many processes with torchrun",
                self.n_gpu,
            )
            self._n_gpu = 1  # or the Trainer would wrap the model for torch's old DataParallel

    def objective_settings(self) -> dict[str, Any]:
        """The settings that `clha.training.objectives.objective` reads."""
        names = ("loss", "margin", "sft_weight", "sft_by", "beta", "label_smoothing")
        return {name: getattr(self, name) for name in names}

    def data_settings(self) -> dict[str, Any]:
        """The settings that `clha.training.datasets.as_ranked_prompts` reads."""
        names = ("reward_gap", "sft_threshold", "max_length", "control_tokens_in_text")
        needs_pairs = self.loss == "clha" or self.loss in REFERENCE_LOSSES  # others do not read the weights of pairs
        return {name: getattr(self, name) for name in names} | {"needs_pairs": needs_pairs}


# What `Trainer` takes and this one has no use for, and what to do instead.
_UNUSED = {
    "model_init": "give the model itself; a search over hyperparameters makes a trainer for each trial",
    "data_collator": "prompts are laid out by tokens_per_micro_batch",
    "compute_loss_func": "the loss is args.loss; override ClhaTrainer.training_step for another one",
    "compute_metrics": "there are no predictions to compute them from; evaluate() returns rewards/* and the loss",
    "preprocess_logits_for_metrics": "there are no logits; evaluate() returns rewards/* and the loss",
}


def refuse_unused(given: Mapping[str, Any]) -> None:
    """Raises UserError where a trainer is given what it would silently leave aside."""
    for name, instead in _UNUSED.items():
        if given.get(name) is not None:
            raise UserError(f"ClhaTrainer takes no {name}: {instead}")
