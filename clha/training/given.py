"""What a trainer is given, made ready: a model, perhaps with a new adapter."""

from typing import Any

from transformers import PreTrainedModel, set_seed

from clha.errors import UserError
from clha.training import policy


def with_adapter(model: Any, peft_config: Any, seed: int) -> Any:
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
