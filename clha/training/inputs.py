"""What a trainer is given, made ready: settings, a tokenizer, a model, perhaps with a new adapter."""

import logging
import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from clha.errors import UserError
from clha.loading import load_policy
from clha.training import policy
from clha.training.arguments import ClhaConfig

_LOG = logging.getLogger(__name__)


def checked_settings(args: Any) -> ClhaConfig:
    """`args`, or the defaults where there are none. Raises UserError for those of another trainer."""
    if args is None:
        return ClhaConfig()
    if not isinstance(args, ClhaConfig):
        raise UserError(
            f"args: {type(args).__name__} has no settings of the losses; give a clha.ClhaConfig, which takes the same "
            "arguments and these"
        )
    return args


def load_given(model: Any, processing_class: Any) -> tuple[Any, Any]:
    """The model, and its tokenizer where none is given: loaded, in float32, where `model` is a name or a folder."""
    if not isinstance(model, str | os.PathLike):
        return model, processing_class
    name = os.fspath(model)
    if processing_class is None:
        try:
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            # Token ids need none, and text says that it does.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _LOG.warning("%s: has no tokenizer that can be read (%s)", name, reason)
    return load_policy(name), processing_class


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer: `processing_class` itself, or that of a processor. Raises UserError where it is neither."""
    tokenizer = processing_class
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = getattr(processing_class, "tokenizer", None)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"processing_class: {type(processing_class).__name__} is no tokenizer and has none")
    return tokenizer


def with_new_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    """The model, with a new adapter where there is a `peft_config`; it begins at random, by `seed`.

    Raises UserError where the model is no causal language model, or the adapter is of a kind that cannot be trained.
    """
    causal = policy.causal_model(model)
    config = getattr(causal, "config", None)
    if not isinstance(causal, PreTrainedModel) or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model: {type(causal).__name__} is not a causal language model of transformers")
    _refuse_prompt_tokens(getattr(model, "peft_config", {}).values())
    if peft_config is None:
        return model
    if hasattr(model, "peft_config"):
        raise UserError(
            "peft_config: the model has an adapter already; leave peft_config out to train that one, or merge it "
            "first with model.merge_and_unload()"
        )
    _refuse_prompt_tokens([peft_config])
    from peft import get_peft_model

    set_seed(seed)
    return get_peft_model(model, peft_config)


def _refuse_prompt_tokens(configs: Any) -> None:
    for config in configs:
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"{type(config).__name__}: adapters that add tokens to the prompt are not supported: use LoRA"
            )
