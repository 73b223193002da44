"""One process of a training run: the stage's own, or one of several, `python -m clha.stages.train_process JOB`.

Of several, the first alone writes model and metrics and reports progress; of sharded checkpoints each writes its part.
"""

import json
import logging
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clha.errors import UserError
from clha.process import child_main
from clha.progress import Progress
from clha.settings import Lora, Settings, Train

RENDEZVOUS = "CLHA_RENDEZVOUS"  # the file through which the processes of a run find each other
_OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Job:
    """What a training process needs to know; JSON on its way to another process."""

    run: str
    settings: dict[str, Any]
    policy: str  # its folder
    joined: str  # the folder of the joined preferences
    counts: dict[str, int]  # prompts of each split
    checkpoints: str
    resume: str | None  # the checkpoint to go on from
    folder: str  # of the artifact that is being written

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Job":
        return Job(**json.loads(path.read_text(encoding="utf-8")))


def main(path: Path, progress: Progress) -> None:
    """The life of one of several processes; the first leaves the outcome beside the job."""
    import torch
    from torch import distributed

    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "cuda:nccl,cpu:gloo" if gpu else "gloo",
        init_method=f"file://{os.environ[RENDEZVOUS]}",
        rank=rank,
        world_size=processes,
    )
    facts = train_policy(Job.read(path), progress if rank == 0 else Progress())
    if rank == 0:
        outcome_path(path).write_text(json.dumps(facts), encoding="utf-8")
    distributed.destroy_process_group()


def outcome_path(job: Path) -> Path:
    """Where the first process leaves what `train_policy` returned."""
    return job.with_name(_OUTCOME)


def train_policy(job: Job, progress: Progress) -> dict[str, Any]:
    """Train, and write `model/`, `metrics` and events into the job's folder; returns the facts for the manifest.

    Raises UserError where the candidates are another policy's or an adapter does not fit the model, StageFailure for
    NaN and infinite losses.
    """
    import torch
    import transformers

    from clha.chat import load_chat
    from clha.loading import load_policy
    from clha.stages.work import peak_memory_bytes
    from clha.store import write_parquet_atomic
    from clha.training.callbacks import ReportProgress
    from clha.training.export import metrics_table, save_model, write_events
    from clha.training.memory import keep_freed_memory
    from clha.training.metrics import metric_rows
    from clha.training.model_card import model_card
    from clha.training.preferences import Preferences
    from clha.training.processes import held_share
    from clha.training.trainer import ClhaTrainer

    transformers.utils.logging.set_verbosity_warning()
    logging.getLogger("clha.training").setLevel(logging.ERROR)  # the trainer's notes are told as progress
    if not torch.cuda.is_available():  # where weights go to a GPU, their memory here would stay taken
        keep_freed_memory()
    settings = Settings.model_validate(job.settings)
    own, folder = settings.train, Path(job.folder)
    train_set, dev_set = Preferences(Path(job.joined), "train"), Preferences(Path(job.joined), "dev")
    tokenizer = load_chat(Path(job.policy), settings.policy.chat_template).tokenizer
    evaluates = bool(own.eval_steps and len(dev_set))  # on the way, not only at the end
    if own.keep_best and not evaluates:
        raise UserError("train: keep_best needs prompts of split dev, there are none; see prepare.splits and limits")
    transformers.set_seed(own.seed)  # a new adapter begins at random
    trainer = ClhaTrainer(
        with_adapter(load_policy(job.policy, bf16=_frozen_in_bf16(own)), own.lora),
        _arguments(settings, job, evaluates=evaluates),
        train_dataset=train_set,
        eval_dataset=dev_set if len(dev_set) else None,
        processing_class=tokenizer,
        callbacks=[ReportProgress(progress)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if own.patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(own.patience))
    for note in trainer.notes:
        progress.log(note)
    told = len(trainer.notes)
    gpus = torch.cuda.device_count()
    if own.processes < gpus:
        progress.log(f"training on {own.processes} of {gpus} GPUs (train.processes)")
    resumed = f" from {Path(job.resume).name}" if job.resume else ""
    progress.log(f"training on {len(train_set)} prompts{resumed}")
    trainer.train(resume_from_checkpoint=job.resume)
    if len(dev_set) and not evaluates:
        trainer.evaluate()
    for note in trainer.notes[told:]:
        progress.log(note)
    model = _whole_model(trainer, job, own)
    if trainer.is_fsdp_enabled:
        held = held_share(trainer.model_wrapped)
        progress.log(f"the weights were sharded over {own.processes} processes: this one held {held:.0%} of them")
    if trainer.args.process_index != 0:
        return {}
    if own.keep_best:
        best = trainer.state.best_model_checkpoint
        trainer.notes.append(f"kept the weights of {Path(best).name}" if best else "no evaluation was the best")
        progress.log(trainer.notes[-1])
    rows = metric_rows(trainer.state.log_history)
    base = settings.policy.model.rpartition("/")[2]
    card = model_card(
        name=f"{base}, trained by run {job.run}",
        base_model=base,
        loss=own.loss,
        data=_data_facts(settings, job.counts),
        settings=own.model_dump(mode="json"),
        rows=rows,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    merge = own.lora is not None and own.lora.merge
    save_model(model, tokenizer, folder / "model", dtype=own.save_dtype, card=card, merge_adapter=merge)
    write_events(rows, folder / "tensorboard")
    write_parquet_atomic(folder / "metrics-00000.parquet", metrics_table(rows))
    return {
        "device": _device_name(own.processes),
        "notes": trainer.notes,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "tokens_per_second": _median(rows, "perf/tokens_per_second"),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _arguments(settings: Settings, job: Job, *, evaluates: bool) -> Any:
    import torch

    from clha.training.arguments import ClhaConfig

    s = settings.train
    micro = s.micro_batch_prompts or s.batch_prompts // s.processes
    # A checkpoint between two rows of metrics adds one, and no execution setting may change the table.
    checkpoint_steps = -(-s.checkpoint_steps // s.logging_steps) * s.logging_steps
    more: dict[str, Any] = {}
    if s.processes > 1:
        more["ddp_backend"] = "nccl" if torch.cuda.is_available() else "gloo"
    if s.sharding == "full_shard":
        # Each process writes its own shards: gathered in the first, a checkpoint is a third larger and its memory full.
        more |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    # One micro-batch of all prompts has the denominators of the whole batch, in however many processes it is computed.
    whole = s.micro_batch_prompts in (None, s.batch_prompts)
    return ClhaConfig(
        output_dir=job.checkpoints,
        loss=s.loss,
        margin=s.margin,
        sft_weight=s.sft_weight,
        sft_by=s.sft_by,
        beta=s.beta,
        label_smoothing=s.label_smoothing,
        normalization="batch" if whole else s.normalization,
        share_prompts=s.share_prompts,
        tokens_per_micro_batch=s.tokens_per_micro_batch,
        logprob_tolerance=s.logprob_tolerance,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=s.batch_prompts // (micro * s.processes),
        num_train_epochs=s.epochs,
        max_steps=s.max_steps or -1,
        learning_rate=s.learning_rate,
        lr_scheduler_type=s.lr_schedule,
        warmup_steps=s.warmup_steps,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        seed=s.seed,
        bf16=s.bf16,
        gradient_checkpointing=s.gradient_checkpointing,
        torch_compile=s.torch_compile,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=s.logging_steps,
        logging_first_step=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=s.eval_steps if evaluates else None,
        eval_on_start=evaluates and job.resume is None,
        save_strategy="steps",
        # The best weights can only be those of a checkpoint: with keep_best each evaluation makes one.
        save_steps=(s.keep_best and s.eval_steps) or checkpoint_steps,
        load_best_model_at_end=s.keep_best,
        metric_for_best_model="rewards/accuracies" if s.keep_best else None,
        greater_is_better=True if s.keep_best else None,
        restore_callback_states_from_checkpoint=bool(s.patience),
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        **more,
    )


def with_adapter(model: Any, lora: Lora | None) -> Any:
    """`model`, with a new adapter where one is asked for. Raises UserError where it does not fit the model."""
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        names = {name.rpartition(".")[2] for name, part in model.named_modules() if hasattr(part, "in_features")}
        raise UserError(
            f"train.lora.target_modules: {str(error).splitlines()[0].rstrip('.')}; "
            f"the model has {', '.join(sorted(names))}"
        ) from None


def _frozen_in_bf16(settings: Train) -> bool:
    """Whether the weights under an adapter are held as they are computed with, in half the memory.

    Not where they are sharded: FSDP wants one dtype for what it gathers together.
    """
    return settings.lora is not None and settings.bf16 and settings.sharding == "none"


def _whole_model(trainer: Any, job: Job, settings: Train) -> Any:
    """The trained model in one piece and in float32, in the first process.

    Where it is sharded, all processes take part.
    """
    sharded, rounded = trainer.is_fsdp_enabled, _frozen_in_bf16(settings)
    if not sharded and not rounded:
        return trainer.model
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else trainer.model.state_dict()
    if trainer.args.process_index != 0:
        return None
    from clha.loading import load_policy

    model = with_adapter(load_policy(job.policy), settings.lora)
    if rounded:  # an adapter is merged into the weights as they were
        state = {name: value for name, value in state.items() if "lora_" in name}
    model.load_state_dict(state, strict=not rounded)
    return model


def _data_facts(settings: Settings, counts: dict[str, int]) -> dict[str, Any]:
    prepare, generate, rescore = settings.prepare, settings.generate, settings.rescore
    paths = prepare.path if isinstance(prepare.path, list) else [prepare.path]
    return {
        "source": f"{prepare.source}: {', '.join(p.rpartition('/')[2] for p in paths)}",
        "prompts trained on": counts["train"],
        "prompts held out (dev)": counts["dev"],
        "responses per prompt": f"{generate.n} sampled at temperature {generate.temperature:g}"
        + (f", and the dataset's {' and '.join(generate.include)}" if generate.include else ""),
        "rewards": f"{rescore.reward.type} reward model, ranked by {rescore.rank_by}",
        "noise rule": f"{rescore.noise.method}",
    }


def _device_name(processes: int) -> str:
    import torch

    times = f"{processes} x " if processes > 1 else ""
    if torch.cuda.is_available():
        return times + torch.cuda.get_device_name()
    return f"{times}cpu, {torch.get_num_threads()} threads"


def _median(rows: list[dict[str, float]], name: str) -> float | None:
    values = sorted(row[name] for row in rows if name in row)
    return values[len(values) // 2] if values else None


if __name__ == "__main__":
    child_main(lambda progress: main(Path(sys.argv[1]), progress))
