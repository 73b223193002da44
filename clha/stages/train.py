"""Stage train: joined candidates, rewards and weights -> a trained model, its metrics and its model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clha.stages.work import Work
    from clha.store import Artifact

CODE_VERSION = {"train": 1}


def build(work: "Work") -> "Artifact":
    """Train the policy on split train (split dev is evaluated on) and write `model/`, `metrics` and events.

    Goes on from the last complete checkpoint in the scratch folder. Raises UserError where there is nothing to train
    on or the candidates are another policy's, StageFailure for NaN and infinite losses.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from clha.chat import load_chat
    from clha.errors import UserError
    from clha.training.callbacks import ReportProgress
    from clha.training.checkpoints import last_checkpoint
    from clha.training.export import metrics_table, save_model, write_events
    from clha.training.memory import keep_freed_memory
    from clha.training.metrics import metric_rows
    from clha.training.model_card import model_card
    from clha.training.preferences import Preferences, join_preferences
    from clha.training.trainer import ClhaTrainer

    transformers.utils.logging.set_verbosity_warning()
    keep_freed_memory()
    settings, scratch, say = work.settings.train, work.writer.scratch, work.progress.log
    tables = {"candidates": "generate", "rewards": "score", "weights": "weigh", "prompts": "prepare"}
    joined = scratch / "preferences"
    counts = join_preferences(
        joined,
        **{table: work.inputs[node].shards(table) for table, node in tables.items()},  # type: ignore[arg-type]
    )
    if not counts["train"]:
        raise UserError("train: no prompt of split train has weights; look at the quarantine of prepare and generate")
    train_set, dev_set = Preferences(joined, "train"), Preferences(joined, "dev")
    tokenizer = load_chat(work.models["policy"], work.settings.policy.chat_template).tokenizer
    model = AutoModelForCausalLM.from_pretrained(work.models["policy"], dtype=torch.float32)
    checkpoints = scratch / "checkpoints"
    resume = last_checkpoint(checkpoints, say)
    trainer = ClhaTrainer(
        model,
        _arguments(work, checkpoints, evaluates=bool(settings.eval_steps and len(dev_set)), resumes=resume is not None),
        train_dataset=train_set,
        eval_dataset=dev_set,
        processing_class=tokenizer,
        callbacks=[ReportProgress(work.progress)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    for note in trainer.notes:
        say(note)
    told = len(trainer.notes)
    say(f"training on {len(train_set)} prompts" + (f" from {resume.name}" if resume else ""))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    for note in trainer.notes[told:]:
        say(note)
    rows = metric_rows(trainer.state.log_history)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    card = model_card(
        name=f"{work.settings.policy.model.rpartition('/')[2]}, trained by run {work.run}",
        base_model=work.settings.policy.model.rpartition("/")[2],
        loss=trainer.args.loss,
        data=_data_facts(work, counts),
        settings=settings.model_dump(mode="json"),
        rows=rows,
        versions=versions,
    )
    save_model(model, tokenizer, work.writer.folder / "model", dtype=settings.save_dtype, card=card)
    write_events(rows, work.writer.folder / "tensorboard")
    work.writer.write_shard("metrics", 0, metrics_table(rows))
    total = sum(counts.values())
    return work.finish(
        rows_in=total,
        rows_out=total,
        seed=settings.seed,
        device=_device_name(),
        notes=trainer.notes,
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        tokens_per_second=_median(rows, "perf/tokens_per_second"),
    )


def _arguments(work: "Work", checkpoints: Path, *, evaluates: bool, resumes: bool) -> Any:
    import torch

    from clha.training.arguments import ClhaConfig

    s = work.settings.train
    return ClhaConfig(
        output_dir=str(checkpoints),
        margin=s.margin,
        sft_weight=s.sft_weight,
        tokens_per_micro_batch=s.tokens_per_micro_batch,
        logprob_tolerance=s.logprob_tolerance,
        per_device_train_batch_size=s.batch_prompts,
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
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=s.logging_steps,
        logging_first_step=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=s.eval_steps if evaluates else None,
        eval_on_start=evaluates and not resumes,
        save_strategy="steps",
        save_steps=s.checkpoint_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )


def _data_facts(work: "Work", counts: dict[str, int]) -> dict[str, Any]:
    prepare, generate = work.settings.prepare, work.settings.generate
    paths = prepare.path if isinstance(prepare.path, list) else [prepare.path]
    return {
        "source": f"{prepare.source}: {', '.join(p.rpartition('/')[2] for p in paths)}",
        "prompts trained on": counts["train"],
        "prompts held out (dev)": counts["dev"],
        "responses per prompt": f"{generate.n} sampled at temperature {generate.temperature:g}"
        + (f", and the dataset's {' and '.join(generate.include)}" if generate.include else ""),
        "rewards": f"{work.settings.rescore.reward.type} reward model, ranked by {work.settings.rescore.rank_by}",
        "noise rule": f"{work.settings.rescore.noise.method}",
    }


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def _median(rows: list[dict[str, float]], name: str) -> float | None:
    values = sorted(row[name] for row in rows if name in row)
    return values[len(values) // 2] if values else None
