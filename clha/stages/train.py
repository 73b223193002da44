"""Stage train: joined candidates, rewards and weights -> a trained model, its metrics and its model card.

Losses of the DPO family compare with the policy before training: `reference` holds its log-probabilities.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clha.errors import StageFailure, TransientFailure, UserError
from clha.process import Ended, python_module, run_together
from clha.progress import Event, failure_of
from clha.stages.train_process import RENDEZVOUS, Job, outcome_path, train_policy

if TYPE_CHECKING:
    from clha.stages.work import Work
    from clha.store import Artifact

CODE_VERSION = {"train": 6, "reference": 3}


def build(work: "Work") -> "Artifact":
    """Build `reference` or `train`."""
    return reference(work) if work.node.rsplit("/", 1)[-1] == "reference" else train(work)


def reference(work: "Work") -> "Artifact":
    """The log-probability of every candidate under the policy; shards that are there already are kept."""
    import numpy as np
    import torch

    from clha.loading import load_policy
    from clha.store import read_parquet
    from clha.training import policy
    from clha.training.batches import Layout
    from clha.training.reference import reference_logps, reference_table, unranked_prompts

    settings, writer = work.settings.train, work.writer
    shards = work.inputs["generate"].shards("candidates")
    total = sum(f["rows"] for f in work.inputs["generate"].manifest["files"] if f["name"].startswith("candidates-"))
    model: Any = None
    done = 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for index, path in enumerate(shards):
        table = read_parquet(path)
        if not writer.has_shard("reference", index):
            if model is None:
                model = load_policy(work.models["policy"])
                model.to(device).requires_grad_(False)  # of weights that want gradients autocast keeps copies
                abilities = policy.attach(model, settings.share_prompts)
                layout = Layout(abilities.shares_prompts, device)
            prompts, numbers = unranked_prompts(table)
            logps: list[Any] = []
            for own in reference_logps(model, prompts, layout, settings.tokens_per_micro_batch, bf16=settings.bf16):
                if not np.isfinite(own).all():
                    raise StageFailure(
                        f"{work.node}: the policy gives prompt {prompts[len(logps)].prompt_id} a log-probability that "
                        "is not finite; look at its weights, or compute in float32 (train.bf16: false)"
                    )
                logps.append(own)
                work.progress.update(done + sum(map(len, logps)), total, "candidates")
            writer.write_shard("reference", index, reference_table(prompts, numbers, logps))
        done += len(table)
        work.progress.update(done, total, "candidates")
    return work.finish(rows_in=total, rows_out=done, seed=None, device=str(device))


def train(work: "Work") -> "Artifact":
    """Train the policy on split train (split dev is evaluated on) and write `model/`, `metrics` and events.

    Goes on from the last complete checkpoint in the scratch folder. Raises UserError where there is nothing to train
    on or the candidates are another policy's, StageFailure for NaN and infinite losses.
    """
    from clha.training.checkpoints import last_checkpoint
    from clha.training.preferences import join_preferences

    settings, scratch = work.settings.train, work.writer.scratch
    tables = {"candidates": "generate", "rewards": "score", "weights": "weigh", "prompts": "prepare"}
    if settings.needs_reference:
        tables["reference"] = "reference"
    joined = scratch / "preferences"
    counts = join_preferences(
        joined,
        **{table: work.inputs[node].shards(table) for table, node in tables.items()},  # type: ignore[arg-type]
    )
    if not counts["train"]:
        raise UserError("train: no prompt of split train has weights; look at the quarantine of prepare and generate")
    # Sharded checkpoints are of another form.
    checkpoints = scratch / ("checkpoints" if settings.sharding == "none" else "checkpoints-sharded")
    resume = last_checkpoint(checkpoints, work.progress.log)
    job = Job(
        run=work.run,
        settings=work.settings.model_dump(mode="json"),
        policy=str(work.models["policy"]),
        joined=str(joined),
        counts=counts,
        checkpoints=str(checkpoints),
        resume=str(resume) if resume else None,
        folder=str(work.writer.folder),
    )
    facts = train_policy(job, work.progress) if settings.processes == 1 else _in_processes(work, job)
    total = sum(counts.values())
    return work.finish(rows_in=total, rows_out=total, seed=settings.seed, **facts)


def _in_processes(work: "Work", job: Job) -> dict[str, Any]:
    """`train_policy` in several processes; one that ends badly ends all, and the error says which and why."""
    import torch

    count, gpus = work.settings.train.processes, torch.cuda.device_count()
    if gpus and count > gpus:
        raise UserError(f"train.processes is {count}, but this machine has {gpus} GPUs; set it to {gpus} or less")
    path, rendezvous = work.writer.scratch / "job.json", work.writer.scratch / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    outcome_path(path).unlink(missing_ok=True)
    job.write(path)
    errors: list[Event] = []

    def hear(event: Event) -> None:
        if event["event"] == "error":
            errors.append(event)
        else:
            work.progress.forward(event)

    ended = run_together(
        [python_module("clha.stages.train_process", str(path))] * count,
        environments=[_environment(rank, count, rendezvous) for rank in range(count)],
        log=None,
        on_event=hear,
        on_line=lambda line: print(line, flush=True),  # noqa: T201 (the stage's log)
    )
    if any(process.returncode for process in ended):
        raise _failure(work.node, ended, errors)
    facts: dict[str, Any] = json.loads(outcome_path(path).read_text(encoding="utf-8"))
    return facts


def _environment(rank: int, count: int, rendezvous: Path) -> dict[str, str]:
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": str(max(1, threads // count)),
        RENDEZVOUS: str(rendezvous),
    }


def _failure(node: str, ended: list[Ended], errors: list[Event]) -> UserError | StageFailure:
    """Whose end it was that ended all: a signal comes before an error, our own errors before those that follow."""
    for rank, process in enumerate(ended):
        if process.returncode < 0 and not process.stopped:
            return TransientFailure(
                f"{node}: process {rank + 1} of {len(ended)} was killed by signal {-process.returncode}, "
                "the others were ended; training goes on from the last checkpoint when it is run again"
            )
    if errors:
        event = next((e for e in errors if e["foreseen"]), errors[0])
        return failure_of(event, event["message"])
    rank, process = next((i, p) for i, p in enumerate(ended) if p.returncode and not p.stopped)
    return StageFailure(
        f"{node}: process {rank + 1} of {len(ended)} ended with {process.returncode}: {process.last_line}"
    )
