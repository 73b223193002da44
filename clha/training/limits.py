"""What a model can take: how many positions, which token ids; and rows cut to a length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clha.errors import UserError
from clha.training.batches import RankedPrompt

# Kinds of rotary positions that end where the configuration says; others are stretched beyond it on purpose.
_BOUNDED = ("default", "llama3", "longrope", "proportional")


@dataclass(frozen=True)
class Limits:
    """None where nothing is known."""

    positions: int | None = None
    vocabulary: int | None = None

    def check_length(self, max_length: int | None) -> None:
        """Raises UserError where rows would be cut to more than the model takes."""
        if max_length is not None and self.positions is not None and max_length > self.positions:
            raise UserError(f"max_length={max_length}: the model takes {self.positions} tokens; set no more than that")

    def check(self, item: RankedPrompt, where: str) -> RankedPrompt:
        """`item`. Raises UserError where the model cannot take it; the last token of a response is no input."""
        if self.positions is not None and item.longest > self.positions:
            raise UserError(
                f"dataset: {where}: has {item.longest + 1} tokens (prompt {len(item.prompt)}), and the model takes "
                f"{self.positions}; leave the row out, or set max_length={self.positions} of ClhaConfig, which cuts "
                "the start of prompts"
            )
        largest = max(int(ids.max()) for ids in (item.prompt, *item.responses))
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise UserError(
                f"dataset: {where}: has token id {largest}, and the model's vocabulary ends at {self.vocabulary - 1}; "
                "take the model's own tokenizer, or call model.resize_token_embeddings"
            )
        return item


def limits_of(causal: Any) -> Limits:
    """The limits of a causal language model."""
    config = causal.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if getattr(config, "alibi", False) or not kinds <= set(_BOUNDED):
        positions = None
    embedding = causal.get_input_embeddings()
    return Limits(positions, getattr(embedding, "num_embeddings", None))


def room_for_prompt(prompt: int, responses: Sequence[Sequence[int]], max_length: int | None) -> int:
    """How many of its tokens a prompt may keep: what the longest response leaves, half of the length at least."""
    longest = max(map(len, responses), default=0)
    if max_length is None or prompt + longest <= max_length:
        return prompt
    return max(max_length - longest, max_length // 2)


def fitted(
    prompt: list[int], responses: list[list[int]], max_length: int | None, keep: int = 0
) -> tuple[list[int], list[list[int]]]:
    """Prompt and responses within `max_length`: the prompt loses its beginning, behind the first `keep` tokens (BOS).

    A response that does not fit into the other half loses its end.
    """
    if max_length is None:
        return prompt, responses
    room = room_for_prompt(len(prompt), responses, max_length)
    if len(prompt) > room:
        prompt = prompt[:keep] + prompt[len(prompt) - room + keep :]
    return prompt, [response[: max_length - len(prompt)] for response in responses]
