"""The typed tree of settings: what each group of `pipelines.yaml` holds, its defaults and its limits.

Fields marked `execution(...)` say how the work is done, not what comes out: they are not part of any key. Nor are
those marked `place(...)`, files and folders: their content enters the key by its digest.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from clha.settings_group import DType, Group, Positive, Share, execution, place
from clha.settings_rewards import FitReward, RewardModel


class Policy(Group):
    """The language model that is aligned."""

    model: str = place(...)
    chat_template: Literal["model", "hh"] = "model"


class Splits(Group):
    """Shares of the splits. `reward_*` take preference pairs only; the rest is divided among train, dev and test."""

    train: Share = 0.6
    dev: Share = 0.1
    test: Share = 0.3
    reward_train: Share = 0.3
    reward_eval: Share = 0.3

    @model_validator(mode="after")
    def _sums(self) -> "Splits":
        if abs(self.train + self.dev + self.test - 1) > 1e-9:
            raise ValueError("train + dev + test must be 1")
        if self.reward_train + self.reward_eval >= 1:
            raise ValueError("reward_train + reward_eval must be below 1: they are taken off before the others")
        return self


class Limits(Group):
    """At most so many prompts of each split, chosen by the digest of their id; null: all."""

    train: Positive | None = None
    dev: Positive | None = None
    test: Positive | None = None
    reward_train: Positive | None = None
    reward_eval: Positive | None = None


class Prepare(Group):
    """Where prompts and preference pairs come from."""

    source: Literal["hh_rlhf", "chat_jsonl", "trl", "datasets"]
    path: str | Annotated[list[str], Field(min_length=1)] = place(...)
    subset: str | None = None  # the configuration of a Hub dataset, or the subset name of rows without one
    hub_split: str = "train"
    revision: str | None = None
    splits: Splits = Splits()
    split_seed: int = 0
    limits: Limits = Limits()
    shard_size: Positive = 50_000  # prompts in one file of the output
    max_quarantined: Share = execution(0.1)


class Engine(Group):
    """vLLM: in the stage's own process, or a server that speaks the OpenAI protocol."""

    mode: Literal["in_process", "server"] = "in_process"
    url: str | None = execution(None)  # of the server, e.g. http://127.0.0.1:8000/v1; the key from VLLM_API_KEY
    dtype: DType = "float32"
    max_model_len: Positive = 1024
    # Passed to vLLM by name: tensor_parallel_size, gpu_memory_utilization, ...
    args: dict[str, Any] = Field(default_factory=dict)
    max_concurrency: Positive = execution(32)  # requests under way at a server

    @model_validator(mode="after")
    def _url(self) -> "Engine":
        if self.mode == "server" and not self.url:
            raise ValueError("url must be given when mode is server")
        for name in ("model", "tokenizer", "dtype", "max_model_len", "trust_remote_code"):
            if name in self.args:
                raise ValueError(f"args.{name} is not yours to set here")
        return self


class Generate(Group):
    """Candidates for every prompt of train and dev."""

    n: Positive = 4
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 128
    max_prompt_tokens: Positive = 384
    stop: list[str] = []
    seed: int = 0
    include: list[Literal["chosen", "rejected"]] = []
    shard_size: Positive = 64
    engine: Engine = Engine()
    max_quarantined: Share = execution(0.1)

    @model_validator(mode="after")
    def _greedy(self) -> "Generate":
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when temperature is 0 (greedy sampling has one answer), it is {self.n}")
        return self


class Noise(Group):
    """How rewards become pair weights."""

    method: Literal["reference", "quantile", "calibrated", "soft_label", "from_column", "none"] = "reference"
    gap: Annotated[float, Field(ge=0)] = 3.0  # reference: pairs within it are noise
    quantile: Share = 0.25  # quantile: the gap is this quantile of the observed ones
    # What turns reward differences into log-odds. reward_model: they are log-odds (Bradley-Terry models, fitted
    # ones above all); labels: a factor fitted on the dataset pairs among the candidates; or the factor itself.
    calibration: Literal["reward_model", "labels"] | Annotated[float, Field(gt=0)] = "reward_model"
    # Share of dataset labels taken for flipped; fit: estimated from the dataset pairs among the candidates.
    flip_rate: Literal["fit"] | Annotated[float, Field(gt=0, lt=0.5)] = "fit"
    # A dataset pair with p(label right) = p. weight: 2p - 1, nothing below one half; drop: 1, nothing below one
    # half; flip: |2p - 1|, turned round below one half.
    labels: Literal["weight", "drop", "flip"] = "weight"
    # from_column: Parquet file with prompt_id, better, worse (candidate ids) and this column.
    file: str | None = place(None)
    column: str = "weight"

    @model_validator(mode="after")
    def _file(self) -> "Noise":
        if (self.method == "from_column") != (self.file is not None):
            raise ValueError("file must be given when method is from_column, and only then")
        return self


class Rescore(Group):
    """Rewards of all candidates, and the weights that follow from them."""

    reward: RewardModel = RewardModel()
    shard_size: Positive = 1024
    rank_by: Literal["reward", "label"] = "reward"
    noise: Noise = Noise()
    sft_threshold: float | Literal["fitted"] = 0.0
    max_quarantined: Share = execution(0.1)
    # Processes that score at the same time, each on the next GPU or with its part of the threads.
    processes: Positive = execution(1)


class Lora(Group):
    """Train a low-rank adapter instead of all weights."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Share = 0.0
    # Names of the weight matrices that get an adapter; null: what peft takes for the architecture.
    target_modules: list[str] | None = None
    # The adapter is merged into the saved model, which vLLM then loads as any other; false saves the adapter alone.
    merge: bool = True


class Train(Group):
    """Training on ranked responses, by CLHA or one of its baselines."""

    loss: Literal["clha", "sft", "dpo", "dpo_smoothed", "dpo_robust", "rrhf", "pro"] = "clha"
    margin: Annotated[float, Field(ge=0)] = 3.0
    sft_weight: Annotated[float, Field(ge=0)] = 0.05
    sft_by: Literal["sum", "mean"] = "sum"  # clha: summed (the paper's) or mean log-probability in the SFT part
    beta: Annotated[float, Field(gt=0)] = 0.1  # dpo*: strength of the tie to the policy before training
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0  # dpo_smoothed, dpo_robust: share of flipped labels
    # Denominators of the whole optimizer batch, or of each micro-batch as in the paper's code.
    normalization: Literal["batch", "reference"] = "batch"
    # reference: prompts of a micro-batch; must divide batch_prompts. null: all of them.
    micro_batch_prompts: Positive | None = None
    lora: Lora | None = None
    batch_prompts: Positive = 4
    tokens_per_micro_batch: Positive = execution(4096)
    # Processes on this machine, one for each GPU, and whether they share the weights among them (FSDP).
    processes: Positive = execution(1)
    sharding: Literal["none", "full_shard"] = execution("none")
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 42
    bf16: bool = False
    gradient_checkpointing: bool = execution(False)
    torch_compile: bool = execution(False)  # compile the model's blocks: the same to rounding
    save_dtype: DType = "float32"
    logging_steps: Positive = 1
    eval_steps: Positive | None = None
    # Keep the weights of the evaluation with the best accuracy on dev, not the last ones; needs eval_steps.
    keep_best: bool = False
    # End training after so many evaluations without a better one; needs keep_best. null: never.
    patience: Positive | None = None
    share_prompts: bool = execution(True)  # each prompt is computed once for all its responses
    checkpoint_steps: Positive = execution(25)
    logprob_tolerance: Annotated[float, Field(gt=0)] = 0.05

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if self.micro_batch_prompts and self.normalization != "reference":
            raise ValueError("micro_batch_prompts needs normalization: reference; memory is tokens_per_micro_batch")
        micro = self.micro_batch_prompts or 1
        if self.batch_prompts % (micro * self.processes):
            raise ValueError(
                f"batch_prompts is {self.batch_prompts}: it must be a multiple of micro_batch_prompts x processes "
                f"({micro} x {self.processes})"
            )
        if self.sharding != "none" and self.processes == 1:
            raise ValueError(f"sharding {self.sharding} needs processes above 1")
        if self.label_smoothing and self.loss not in ("dpo_smoothed", "dpo_robust"):
            raise ValueError(f"label_smoothing needs loss dpo_smoothed or dpo_robust, it is {self.loss}")
        if self.keep_best and self.eval_steps is None:
            raise ValueError("keep_best needs eval_steps: the best weights are those of an evaluation")
        if self.patience and not self.keep_best:
            raise ValueError("patience needs keep_best (and eval_steps)")
        return self

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with the log-probabilities of the policy before training."""
        return self.loss in ("dpo", "dpo_smoothed", "dpo_robust")


class Evaluate(Group):
    """Answers of both policies to the test prompts, judged by a reward model that training never saw."""

    split: Literal["test", "dev"] = "test"  # dev: to choose settings by; test: once, at the end
    max_tokens: Positive = 128
    stop: list[str] = []
    reward: RewardModel = RewardModel()
    resamples: Positive = 10_000
    tie: Annotated[float, Field(ge=0)] = 0.0
    seed: int = 0
    shard_size: Positive = 64
    max_quarantined: Share = execution(0.1)


class Execution(Group):
    """How the chain is run."""

    timeout_minutes: Annotated[float, Field(gt=0)] = execution(720)
    retries: Annotated[int, Field(ge=0)] = execution(1)
    retry_delay_seconds: Annotated[float, Field(ge=0)] = execution(10)
    min_free_disk_gb: Annotated[float, Field(ge=0)] = execution(5)
    threads: Positive | None = execution(None)  # CPU threads; null: OMP_NUM_THREADS, else all cores


class NoiseStudy(Group):
    """Labels flipped on purpose, found by reward models, and short runs with and without weights."""

    # Shares of flipped labels.
    rates: Annotated[list[Annotated[float, Field(ge=0, lt=0.5)]], Field(min_length=1)] = [0.4]
    seeds: Annotated[list[int], Field(min_length=1)] = [0, 1, 2]
    # Whose own pairs are clean, or flipped as often.
    arms: Annotated[list[Literal["clean", "flipped"]], Field(min_length=1)] = ["clean", "flipped"]
    # Ways to weight the training pairs; empty: detection only.
    weights: list[Literal["none", "calibrated", "shuffled", "length", "oracle"]] = [
        "none",
        "calibrated",
        "shuffled",
        "length",
        "oracle",
    ]
    train_rates: list[Annotated[float, Field(ge=0, lt=0.5)]] | None = None  # those of `rates` trained on; null: all
    train_arm: Literal["clean", "flipped"] = "clean"  # the reward model whose weights are trained with
    reward_pairs: Positive = 500  # of split reward_train
    train_pairs: Positive = 96  # of split train
    test_pairs: Positive = 96  # of split test
    max_prompt_tokens: Positive = 192
    max_tokens: Positive = 64
    margin: Annotated[float, Field(ge=0)] = 0.3
    sft_weight: Annotated[float, Field(ge=0)] = 0.01
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    batch_prompts: Positive = 8

    @property
    def trained_rates(self) -> list[float]:
        """The rates at which policies are trained."""
        return [r for r in self.rates if self.weights and (self.train_rates is None or r in self.train_rates)]

    @property
    def compares(self) -> bool:
        """Whether the gains of some ways to weight over training without weights are asked for."""
        return bool(self.trained_rates) and "none" in self.weights and len(self.weights) > 1

    @field_validator("rates", "seeds", "arms", "weights", "train_rates")
    @classmethod
    def _no_doubles(cls, values: list[Any] | None) -> list[Any] | None:
        """The same cell counted twice would pass for independent evidence."""
        doubles = [v for i, v in enumerate(values or ()) if v in (values or ())[:i]]
        if doubles:
            raise ValueError(f"names {doubles[0]} more than once")
        return values

    @model_validator(mode="after")
    def _train_rates(self) -> "NoiseStudy":
        strange = sorted(set(self.train_rates or ()) - set(self.rates))
        if strange:
            raise ValueError(f"train_rates has {strange[0]:g}, which rates has not")
        return self


class Schedule(Group):
    """When `clha deploy` starts the chain, and what is new each time."""

    cron: str = execution("0 3 * * *")
    timezone: str = execution("UTC")
    fresh: list[Literal["data", "seed"]] = execution(["data"])


class Settings(Group):
    """Everything that a run does; one profile of pipelines.yaml with `--set` applied."""

    policy: Policy
    prepare: Prepare
    fit_reward: FitReward | None = None
    generate: Generate = Generate()
    rescore: Rescore = Rescore()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    noise_study: NoiseStudy = NoiseStudy()
    execution: Execution = Execution()
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _fitted(self) -> "Settings":
        fitted = [n for n in ("rescore", "evaluate") if getattr(self, n).reward.uses_fitted]
        if fitted and self.fit_reward is None:
            raise ValueError(f"{fitted[0]}.reward.type is fitted, but there is no fit_reward")
        if self.rescore.sft_threshold == "fitted" and self.rescore.reward.type != "fitted":
            raise ValueError("rescore.sft_threshold is fitted, but rescore.reward.type is not: give a number")
        if self.train.loss == "pro" and self.rescore.rank_by != "reward":
            raise ValueError("train.loss pro needs rescore.rank_by: reward, it is label; or take another loss")
        longest = self.generate.max_prompt_tokens + max(self.generate.max_tokens, self.evaluate.max_tokens)
        if longest > self.generate.engine.max_model_len:
            raise ValueError(
                f"generate.engine.max_model_len is {self.generate.engine.max_model_len}, but prompt and response "
                f"tokens come to {longest}"
            )
        return self
