"""A whole encoder trained as a reward model: a low-rank adapter (LoRA, Hu et al. 2021) and a head with one output.

Bradley-Terry loss (Bradley and Terry 1952) on pairs. One fold of the dialogues is held out: the model never sees it,
and accuracy, calibration and SFT threshold are those of the very model that is kept.
"""

import json
import math
import shutil
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save

from clha.digests import canonical_json, seed_of
from clha.errors import StageFailure, UserError
from clha.loading import load_whole
from clha.progress import Progress
from clha.rewards.adapters import classifier_logits, classifier_rewards
from clha.rewards.calibration import fit_temperature
from clha.rewards.fitting import CurvePoint, assign_folds, curve_part, curve_places, wilson_interval
from clha.rewards.head import OWN_CONFIG
from clha.rewards.precision import head_in_float32
from clha.rewards.report import cross_calibrated, judgement
from clha.rewards.scoring import is_out_of_memory, length_batches, report_to
from clha.rewards.texts import Encoded
from clha.settings_rewards import RewardFit, RewardLora
from clha.store import write_atomic

Floats = NDArray[np.float64]

_CHECKPOINT = "adapter.safetensors"
_POINT = "point.json"  # of the learning curve
_MAX_GRAD_NORM = 1.0
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


@dataclass(frozen=True)
class LabelledTexts:
    """What a model is trained on.

    Args:
        encoded: [R], the responses with their prompts.
        pairs: [N, 2], rows of `encoded`: chosen, rejected.
        weights: [N], weights of the pairs.
        groups: [N], pairs of one group (first user turn) are all held out, or none of them.
        lengths: [R], characters of the responses.
    """

    encoded: list[Encoded]
    pairs: NDArray[np.int64]
    weights: Floats
    groups: Sequence[Hashable]
    lengths: NDArray[np.int64]


def bradley_terry_loss(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i * -log sigmoid(r_i,chosen - r_i,rejected), a scalar; `rewards` [B, 2], `weights` [B]."""
    return (weights * torch.nn.functional.softplus(rewards[:, 1] - rewards[:, 0])).sum()


def tune(
    encoder: Path, texts: LabelledTexts, pad_id: int, fit: RewardFit, device: str, scratch: Path, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """Train an adapter on all folds but the first, merge it, and judge the first fold by the result.

    With `lora.curve` other models are trained before, in the same way, on parts of these pairs, and judge the same
    fold. `scratch` keeps the adapter after each epoch and what each of these models judged, so that a killed fit goes
    on with the next epoch and ends with the same model and report. At least two groups for each fold. Returns the
    merged sequence classifier, its rewards in log-odds, and the report (fit.json). Raises UserError when the model
    cannot be a classifier or the adapter does not fit it, StageFailure when a batch does not fit into memory or
    training diverges.
    """
    held: NDArray[np.bool_] = np.asarray(assign_folds(texts.groups, fit.folds, fit.seed) == 0)
    task = _Task(encoder, texts, held, pad_id, fit, device, progress)
    rest = np.flatnonzero(~held)
    places = curve_places(texts.groups, fit.seed)
    parts = [curve_part(places, rest, share) for share in fit.lora.curve]
    by_size = {len(rows): rows for rows in parts if len(rows)}  # one contains the other: of one size they are the same
    done, total = 0, sum(task.steps(rows) for rows in (*by_size.values(), rest))
    curve = []
    for size, rows in by_size.items():  # before the model that is kept: there are never two in memory
        stepped = report_to(progress, total, "steps", done)
        curve.append(_curve_point(task, rows, scratch / f"curve-{size}", stepped))
        done += task.steps(rows)
    merged, losses = _trained(task, rest, scratch, report_to(progress, total, "steps", done))
    rewards = _held_out_rewards(task, merged)
    groups, pairs, weights = task.held_groups, texts.pairs[held], texts.weights[held]
    judged = rewards[pairs]
    margins = judged[:, 0] - judged[:, 1]
    factor = fit_temperature(margins, weights)
    _scale_head(merged, factor)
    calibrated = cross_calibrated(margins, weights, groups, 2, fit.seed)
    report = judgement(judged, judged * factor, calibrated, factor, weights, groups, texts.lengths[pairs])
    if fit.lora.curve:
        report["learning_curve"] = [*curve, _curve_row(task, rewards, len(rest))]
    chosen = np.unique(pairs[:, 0])
    return merged, report | {
        "groups": len(set(groups)),
        "pairs_trained_on": len(rest),
        "held_out": f"1 of {fit.folds} folds",
        "losses": losses,
        "members": {"count": 1},
        "sft_threshold": float(np.quantile(rewards[chosen] * factor, fit.sft_quantile)),
    }


@dataclass(frozen=True)
class _Task:
    """What the model that is kept and those of the learning curve have in common: all but the pairs trained on."""

    encoder: Path
    texts: LabelledTexts
    held: NDArray[np.bool_]  # [N], the pairs that are judged
    pad_id: int
    fit: RewardFit
    device: str
    progress: Progress

    @property
    def held_groups(self) -> list[Hashable]:
        return [g for g, h in zip(self.texts.groups, self.held, strict=True) if h]

    def steps(self, rows: NDArray[np.int64]) -> int:
        """Optimizer steps of training on the pairs `rows`, all epochs together."""
        return -(-len(rows) // self.fit.lora.batch_pairs) * self.fit.lora.epochs


def _curve_point(task: _Task, rows: NDArray[np.int64], scratch: Path, stepped: Callable[[int], None]) -> dict[str, Any]:
    """A row of the learning curve: a model is trained on the pairs `rows`, judges, and is dropped.

    The row is kept in `scratch`, where an earlier attempt may have left it.
    """
    kept = scratch / _POINT
    if kept.is_file():
        row: dict[str, Any] = json.loads(kept.read_bytes())
        task.progress.log(f"learning curve: {len(rows)} pairs were finished by an earlier attempt")
        stepped(task.steps(rows))
        return row
    task.progress.log(f"learning curve: training on {len(rows)} pairs")
    model, _ = _trained(task, rows, scratch, stepped)
    row = _curve_row(task, _held_out_rewards(task, model), len(rows))
    write_atomic(kept, canonical_json(row).encode())
    (scratch / _CHECKPOINT).unlink()
    return row


def _curve_row(task: _Task, rewards: Floats, trained_on: int) -> dict[str, Any]:
    """Accuracy of the held-out `rewards` [R] of a model that was trained on so many pairs."""
    judged = rewards[task.texts.pairs[task.held]]
    accuracy = float(np.average(judged[:, 0] > judged[:, 1], weights=task.texts.weights[task.held]))
    return asdict(CurvePoint(trained_on, accuracy, wilson_interval(accuracy, len(set(task.held_groups)))))


def _trained(
    task: _Task, rows: NDArray[np.int64], scratch: Path, stepped: Callable[[int], None]
) -> tuple[Any, list[float]]:
    """A classifier trained on the pairs `rows`, its adapter merged, and the mean loss of each epoch."""
    model = _with_adapter(task.encoder, task.fit)
    model.to(torch.device(task.device))
    losses = _train(model, task, rows, scratch, stepped)
    merged: Any = model.merge_and_unload()
    return merged.eval(), losses


def _held_out_rewards(task: _Task, model: Any) -> Floats:
    """[R], rewards of the responses of held-out pairs, NaN for the others.

    Raises StageFailure where one of them is not finite.
    """
    task.progress.log(f"judging {int(task.held.sum())} held-out pairs")
    encoded, rows = task.texts.encoded, np.unique(task.texts.pairs[task.held])
    rewards = np.full(len(encoded), np.nan)
    rewards[rows] = classifier_rewards(
        model, [encoded[r] for r in rows], task.pad_id, tokens_per_batch=task.fit.tokens_per_batch
    )
    if not np.isfinite(rewards[rows]).all():
        raise StageFailure("the trained reward model gives rewards that are not finite; lower its lora.learning_rate")
    return rewards


def _with_adapter(encoder: Path, fit: RewardFit) -> Any:
    """The encoder as a sequence classifier with one output, and a new adapter on it; both drawn from the seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    lora = fit.lora
    torch.manual_seed(seed_of("reward adapter", fit.seed))
    try:
        model = load_whole(
            AutoModelForSequenceClassification,
            encoder,
            "fit_reward: encoder",
            "take another encoder or method: head",
            new_head=True,
            num_labels=1,
            dtype=torch.float32,
        )
    except (ValueError, RuntimeError) as error:  # no such architecture
        raise UserError(
            f"fit_reward: {encoder.name} cannot become a classifier with one output ({_first_line(error)}); "
            "take another encoder or method: head"
        ) from None
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        named = "null" if lora.target_modules is None else ", ".join(lora.target_modules) or "empty"
        raise UserError(
            f"fit_reward: lora.target_modules is {named}, which does not fit {encoder.name} ({_first_line(error)}); "
            "give names of its linear layers, such as q_proj"
        ) from None
    head_in_float32(adapted)
    if lora.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return adapted


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")


def _train(
    model: Any, task: _Task, rows: NDArray[np.int64], scratch: Path, stepped: Callable[[int], None]
) -> list[float]:
    """Train the adapter on the pairs `rows`; returns the mean loss of each epoch.

    `stepped` hears how many optimizer steps are done.
    """
    texts, fit, lora, progress = task.texts, task.fit, task.fit.lora, task.progress
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lora.learning_rate, weight_decay=lora.weight_decay)
    total = task.steps(rows)
    steps = total // lora.epochs
    losses = _restore(scratch / _CHECKPOINT, parameters, optimizer)
    if losses:
        progress.log(f"goes on after epoch {len(losses)} of {lora.epochs}")
    model.train()
    for epoch in range(len(losses), lora.epochs):
        torch.manual_seed(seed_of("reward epoch", fit.seed, epoch))  # dropout: the same whether resumed or not
        order = np.random.default_rng(seed_of("reward order", fit.seed, epoch)).permutation(rows)
        summed = 0.0
        for step in range(steps):
            done = epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = lora.learning_rate * (1 - done / total)
            batch = order[step * lora.batch_pairs : (step + 1) * lora.batch_pairs]
            summed += _backward(model, texts, batch, task.pad_id, lora)
            if not math.isfinite(summed):
                raise StageFailure(
                    f"the loss is not finite at step {done + 1} of {total}; lower fit_reward's lora.learning_rate"
                )
            torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            stepped(done + 1)
        losses.append(summed / float(texts.weights[rows].sum()))
        _keep(scratch / _CHECKPOINT, parameters, optimizer, losses)
        progress.log(f"epoch {epoch + 1} of {lora.epochs}: loss {losses[-1]:.4f}")
    return losses


def _backward(model: Any, texts: LabelledTexts, batch: NDArray[np.int64], pad_id: int, lora: RewardLora) -> float:
    """Add the gradient of the mean loss of the pairs `batch`, in micro-batches; returns the sum of their losses.

    A micro-batch holds both responses of its pairs. Products are in bfloat16 on a GPU that has it.
    """
    device = next(model.parameters()).device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    pairs = [[texts.encoded[i].ids for i in texts.pairs[row]] for row in batch]
    lengths = [2 * max(map(len, pair)) for pair in pairs]
    whole, summed = float(texts.weights[batch].sum()), 0.0
    try:
        for micro in length_batches(lengths, lora.tokens_per_micro_batch):
            ids = [side for k in micro for side in pairs[k]]
            weights = torch.tensor(texts.weights[batch[micro]], dtype=torch.float32, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = classifier_logits(model, ids, pad_id)
            loss = bradley_terry_loss(logits.reshape(-1, 2), weights)
            (loss / whole).backward()
            summed += float(loss.detach())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise StageFailure(
            "out of memory; lower fit_reward's lora.tokens_per_micro_batch or max_tokens, or set "
            "lora.gradient_checkpointing"
        ) from error
    return summed


def _keep(path: Path, parameters: list[Any], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Write what is trained and the optimizer's moments, as safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    for i, p in enumerate(parameters):
        moments = optimizer.state.get(p, {})  # none of a matrix that the outputs do not depend on
        tensors |= {f"{i}.value": p.detach(), **{f"{i}.{name}": t for name, t in moments.items()}}
    cpu = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, save(cpu, {"losses": json.dumps(losses)}))


def _restore(path: Path, parameters: list[Any], optimizer: torch.optim.Optimizer) -> list[float]:
    """Take up what `_keep` wrote; the losses of the epochs that are done, none where there is no checkpoint."""
    if not path.is_file():
        return []
    with safe_open(path, "pt") as stored, torch.no_grad():
        names = set(stored.keys())
        for i, p in enumerate(parameters):
            p.copy_(stored.get_tensor(f"{i}.value"))
            moments = {n: stored.get_tensor(f"{i}.{n}") for n in _MOMENTS if f"{i}.{n}" in names}
            if moments:
                optimizer.state[p] = {n: t if n == "step" else t.to(p.device) for n, t in moments.items()}
        losses: list[float] = json.loads(stored.metadata()["losses"])
        return losses


def _scale_head(model: Any, factor: float) -> None:
    """Multiply the one output by `factor`, in its last layer: rewards become log-odds."""
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1][-1]
    with torch.no_grad():
        head.weight.mul_(factor)
        if head.bias is not None:
            head.bias.mul_(factor)


def save_classifier(model: Any, encoder: Path, pad_id: int, folder: Path, config: dict[str, Any]) -> None:
    """Write a plain Hugging Face folder: float32 safetensors, config (with `config` in it), the encoder's tokenizer."""
    from transformers import AutoTokenizer

    shutil.rmtree(folder, ignore_errors=True)
    model.config.pad_token_id = pad_id
    model.config._name_or_path = ""  # a path of this machine would be written
    setattr(model.config, OWN_CONFIG, config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
