"""Short training runs on labelled pairs with given weights, and the judgement of the trained policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clha.chat import Chat, Unusable
from clha.progress import Progress
from clha.settings import NoiseStudy
from clha.training.batches import Layout, RankedPrompt
from clha.training.logprobs import sum_by_response

Floats = NDArray[np.float64]


def ranked_pair(
    chat: Chat, messages: list[dict[str, str]], first: str, second: str, settings: NoiseStudy, weight: float = 1.0
) -> RankedPrompt | None:
    """A labelled pair as training reads it, `first` before `second`; None where it cannot become tokens.

    A pair of weight 0 has lambda 0 too: what is not trusted teaches nothing.
    """
    try:
        chat.check_markers([*(m["content"] for m in messages), first, second])
        prompt = chat.encode_prompt(messages, settings.max_prompt_tokens)
        responses = [chat.encode_response(text).token_ids[: settings.max_tokens] for text in (first, second)]
    except Unusable:
        return None
    return RankedPrompt(
        prompt_id="",
        prompt=np.array(prompt.token_ids, dtype=np.int32),
        responses=[np.array(r, dtype=np.int32) for r in responses],
        rewards=np.array([1.0, 0.0]),
        pair_weights=np.array([[0, weight], [0, 0]], dtype=np.float32),
        sft_index=0,
        sft_lambda=float(min(1.0, weight)),
    )


class _Pairs:
    """Ranked pairs as a dataset."""

    max_candidates = 2

    def __init__(self, pairs: list[RankedPrompt]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, i: int) -> RankedPrompt:
        return self._pairs[i]


def train_policy(
    model_folder: Path,
    chat: Chat,
    pairs: list[RankedPrompt],
    settings: NoiseStudy,
    seed: int,
    scratch: Path,
    progress: Progress,
) -> Any:
    """Train the policy on all pairs once with CLHA; `chat` made their tokens. Returns the model."""
    import transformers

    from clha.loading import load_policy
    from clha.training.arguments import ClhaConfig
    from clha.training.callbacks import ReportProgress
    from clha.training.trainer import ClhaTrainer

    transformers.utils.logging.set_verbosity_warning()
    model = load_policy(model_folder)
    arguments = ClhaConfig(
        output_dir=str(scratch),
        margin=settings.margin,
        sft_weight=settings.sft_weight,
        per_device_train_batch_size=settings.batch_prompts,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        seed=seed,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = ClhaTrainer(
        model,
        arguments,
        train_dataset=_Pairs(pairs),
        processing_class=chat.tokenizer,
        callbacks=[ReportProgress(progress)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return model


@torch.no_grad()
def preference_margins(model: Any, pairs: list[RankedPrompt], tokens_per_micro_batch: int = 4096) -> Floats:
    """Mean token log-probability of the first response minus that of the second, [N], in nats; in the order given."""
    from clha.training import policy

    model.eval()
    abilities = policy.attach(model)
    device = next(model.parameters()).device
    layout = Layout(abilities.shares_prompts, device, model.config.pad_token_id or 0)
    # Micro-batches part the pairs by size: each carries its place as its name.
    numbered = [replace(pair, prompt_id=str(i)) for i, pair in enumerate(pairs)]
    margins = np.full(len(pairs), np.nan)
    for batch in layout.micro_batches(numbered, tokens_per_micro_batch):
        logps = policy.response_logps(model, batch)
        means = sum_by_response(logps, batch.target_cell, *batch.candidate_mask.shape) / batch.response_lengths
        margins[[int(i) for i in batch.prompt_ids]] = (means[:, 0] - means[:, 1]).double().cpu().numpy()
    policy.detach(model)
    return margins
