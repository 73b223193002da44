"""The settings of reward models: how they are fitted, and which ones are used."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clha.settings_group import DType, Group, Positive, Share, execution, place


class RewardLora(Group):
    """How a whole encoder is trained as a reward model: a low-rank adapter and a head with one output."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Names of the weight matrices that get an adapter; null: what peft takes for the architecture.
    target_modules: list[str] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4  # falls to zero in a straight line
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    epochs: Positive = 1
    batch_pairs: Positive = 32  # pairs of an optimizer step
    tokens_per_micro_batch: Positive = 8192  # in the key: it decides what dropout draws
    gradient_checkpointing: bool = execution(False)
    # Shares of the training pairs that the learning curve is measured at beside all of them; each costs a fit.
    curve: list[Annotated[float, Field(gt=0, lt=1)]] = []

    @model_validator(mode="after")
    def _ascending(self) -> "RewardLora":
        if self.curve != sorted(set(self.curve)):
            given = ", ".join(f"{share:g}" for share in self.curve)
            raise ValueError(f"curve is {given}: each share must be larger than the one before")
        return self


class RewardFit(Group):
    """A Bradley-Terry model of the pairs of one split: a head on the frozen features of an encoder, or all of it."""

    encoder: str = place(...)
    # head: a linear head on frozen features; lora: the encoder trained by an adapter, merged (needs a GPU for most).
    method: Literal["head", "lora"] = "head"
    lora: RewardLora = RewardLora()
    layer: int | None = None  # hidden layer whose states are pooled; null: the last
    pooling: Literal["response_mean", "mean"] = "response_mean"
    max_tokens: Positive = 512
    l2: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    folds: Annotated[int, Field(ge=2)] = 5
    sft_quantile: Share = 0.25
    # Heads fitted on bootstrap samples of the dialogues, whose disagreement rescoring can use; 1: one head on all.
    members: Positive = 1
    seed: int = 0
    shard_size: Positive = execution(128)  # responses in one file of their features
    max_quarantined: Share = execution(0.1)
    tokens_per_batch: Positive = execution(4096)

    @model_validator(mode="after")
    def _one_member(self) -> "RewardFit":
        if self.method == "lora" and self.members > 1:
            raise ValueError(f"members is {self.members}, but method lora makes one model; set it to 1")
        return self


class FitReward(Group):
    """The reward model that rescoring uses and the one that only evaluation ever sees."""

    train: RewardFit
    eval: RewardFit


class RewardModel(Group):
    """A reward model: `fitted` is what fit_reward makes in this run, `encoder_head` a head that it made in another one,
    `ensemble` is several, `server` a vLLM pooling server.
    """

    type: Literal[
        "fitted", "encoder_head", "sequence_classification", "gpt_neox_reward_model", "server", "ensemble"
    ] = "fitted"
    model: str | None = place(None)
    encoder: str | None = place(None)  # of an encoder_head: the model that it was fitted on
    url: str | None = execution(None)  # of the server, which has `model`; the key comes from VLLM_API_KEY
    members: list["RewardModel"] = []  # of the ensemble
    scale: Annotated[float, Field(gt=0)] = 1.0  # what a member's rewards are multiplied by
    max_tokens: Positive = 1024
    dtype: DType = "float32"
    tokens_per_batch: Positive = execution(4096)

    @model_validator(mode="after")
    def _model(self) -> "RewardModel":
        if (self.type in ("fitted", "ensemble")) != (self.model is None):
            raise ValueError("model must be given for every type but `fitted` and `ensemble`, and only there")
        if (self.type == "encoder_head") != (self.encoder is not None):
            raise ValueError("encoder must be given for type `encoder_head`, and only there")
        if (self.type == "server") != (self.url is not None):
            raise ValueError("url must be given for type `server`, and only there")
        if (self.type == "ensemble") != bool(self.members):
            raise ValueError("members must be given for type `ensemble`, and only there")
        if any(m.type == "ensemble" for m in self.members):
            raise ValueError("an ensemble cannot be a member of an ensemble: list its members")
        return self

    def parts(self, role: str) -> dict[str, "RewardModel"]:
        """The reward models that it is made of: {role: itself}, or {role.0: first member, ...}."""
        return {f"{role}.{i}": m for i, m in enumerate(self.members)} or {role: self}

    @property
    def uses_fitted(self) -> bool:
        """Whether it is, or has a member, that fit_reward makes."""
        return self.type == "fitted" or any(m.type == "fitted" for m in self.members)
