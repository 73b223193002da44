"""A causal language model that returns log-probabilities of response tokens, by the fastest way it supports.

Two things depend on the architecture: whether the responses of a prompt may share it in one packed row, and whether
the logits are what the output embedding gives (scaled or soft-capped at most). Both are tried on made-up tokens
against the model's own forward; where they do not hold, the plain way is taken and one line says so.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from clha.errors import UserError
from clha.training import attention, compiling, layers
from clha.training.batches import MicroBatch, RankedPrompt, pack, pad
from clha.training.logprobs import LOGITS_BYTES, token_logprobs
from clha.windows import layer_windows

# Largest difference of a response's summed log-probability from the model's own, where both are computed in float32 or
# float64, and where that cannot be, as with quantised weights.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOW_PRECISION_TOLERANCE = 0.1
_CANNOT = (NotImplementedError, TypeError, RuntimeError, ValueError, IndexError, AttributeError)  # of a way tried out
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Abilities:
    """What was found out about an architecture."""

    shares_prompts: bool
    plain_head: bool  # logits are scale * hidden W^T + b, perhaps soft-capped
    reason: str = ""  # why not, one line


def attach(
    model: PreTrainedModel,
    share_prompts: bool = True,
    logits_bytes: int = LOGITS_BYTES,
    accumulate: bool = False,
    compiled: bool = False,
) -> Abilities:
    """Teach `model` (or the model inside a peft wrapper) to answer `response_logps` calls, see `response_logps`.

    Its forward for everybody else stays as it was, to rounding. Undo with `detach`. Raises UserError where the model is
    not a causal language model.

    Args:
        model: on the device where it is trained.
        share_prompts: False to lay every response out with its prompt.
        logits_bytes: see `clha.training.logprobs`.
        accumulate: see `clha.training.layers.fuse`.
        compiled: see `clha.training.compiling.compile_blocks`; in place of this project's own layers.
    """
    causal = causal_model(model)
    detach(model)
    own_attention = causal.config._attn_implementation
    reference_attention = "eager" if _softcaps(causal) else own_attention
    try:
        abilities = _find_out(causal, share_prompts, reference_attention, accumulate)
    except BaseException:
        layers.unfuse(causal)
        raise
    causal._clha_original = (causal.forward, own_attention)
    causal.set_attn_implementation(attention.NAME if abilities.shares_prompts else reference_attention)
    causal.forward = types.MethodType(_forward(abilities, own_attention, logits_bytes), causal)
    if compiled:
        layers.unfuse(causal)  # what was replaced would be in the compiler's way
        try:
            compiling.compile_blocks(causal)
        except UserError:
            detach(model)
            raise
    return abilities


def detach(model: PreTrainedModel) -> None:
    """Give the model its own forward and attention back."""
    causal = causal_model(model)
    original = causal.__dict__.pop("_clha_original", None)
    if original is not None:
        del causal.__dict__["forward"]
        layers.unfuse(causal)
        causal.set_attn_implementation(original[1])


def causal_model(model: Any) -> Any:
    """The causal language model itself, out of peft and data-parallel wrappers."""
    while True:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module"):
            model = model.module
        else:
            return model


def response_logps(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of each response token of `batch`, [N] float32, in nats. `attach` the model first."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        segments=batch.segments,
        predict_at=batch.predict_at,
        target_row=batch.target_row,
        targets=batch.targets,
    )


def _forward(abilities: Abilities, own_attention: str, logits_bytes: int) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        original, _ = self._clha_original  # of a copy of the model: its own
        if targets is None:
            training_attention = self.config._attn_implementation
            self.set_attn_implementation(own_attention)
            try:
                return original(*args, **kwargs)
            finally:
                self.set_attn_implementation(training_attention)
        kwargs.pop("labels", None)
        return _token_logps(self, original, abilities.plain_head, targets, logits_bytes, **kwargs)

    return forward


def _token_logps(
    causal: Any,
    original: Callable[..., Any],
    plain_head: bool,
    targets: Tensor,
    logits_bytes: int,
    *,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    segments: Any,
    predict_at: Tensor,
    target_row: Tensor,
    **_: Any,
) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    if segments is not None:
        inputs["segments"] = segments
    else:
        inputs["attention_mask"] = attention_mask
    if not plain_head:
        logits = original(**inputs).logits.flatten(0, 1).index_select(0, predict_at).float()
        return logits.log_softmax(-1)[target_row, targets]
    hidden = causal.base_model(**inputs)[0]
    head = causal.get_output_embeddings()
    scale, softcap = _head_settings(causal.config)
    return token_logprobs(
        hidden.flatten(0, 1).index_select(0, predict_at),
        head.weight,
        target_row,
        targets,
        bias=getattr(head, "bias", None),
        scale=scale,
        softcap=softcap,
        logits_bytes=logits_bytes,
    )


def _head_settings(config: Any) -> tuple[float, float | None]:
    """(factor, soft cap) on the logits, under the names that architectures have for them."""
    config = config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def _softcaps(causal: Any) -> bool:
    """Whether attention scores are soft-capped, which SDPA leaves out without a word."""
    return getattr(causal.config.get_text_config(), "attn_logit_softcapping", None) is not None


@torch.no_grad()
def _find_out(causal: Any, share_prompts: bool, reference_attention: str, accumulate: bool) -> Abilities:
    """Try the ways against the model as it came; its layers are taken over on the way."""
    was_training, own_attention = causal.training, causal.config._attn_implementation
    kinds = {p.dtype if p.dtype not in _HALF else torch.float32 for p in causal.parameters()}
    tolerance = max(_TOLERANCE.get(kind, _LOW_PRECISION_TOLERANCE) for kind in kinds)
    prompts = _made_up_prompts(causal.config.get_text_config().vocab_size)
    device = next(causal.parameters()).device
    causal.eval()
    raised = _in_float32(causal)
    try:
        causal.set_attn_implementation(reference_attention)
        padded = pad(prompts, device)
        _refuse_other_kinds(causal, padded)
        try:
            want = _trial(causal, padded, False)
        except RuntimeError:
            if not raised:
                raise
            _remove(raised)  # it reads weights of a block from outside
            tolerance = _LOW_PRECISION_TOLERANCE
            want = _trial(causal, padded, False)
        layers.fuse(causal, accumulate)  # after the model's own result, which it is held against too
        plain_head = _has_plain_head(causal, padded, want, tolerance)
        name, stretched = type(causal).__name__, _stretched_positions(causal)
        if not share_prompts:
            return Abilities(False, plain_head, f"{name}: {stretched}" if stretched else "")
        reason = stretched or _cannot_share(causal)
        if not reason:
            attention.register()
            causal.set_attn_implementation(attention.NAME)
            packed = pack(prompts, multiple_of=128 if device.type == "cuda" else 1).to(device)
            try:
                got = _trial(causal, packed, plain_head)
                reason = _difference(causal, packed, got, want, tolerance)
            except _CANNOT as error:
                reason = str(error).splitlines()[0]
        line = f"{name}: prompts are not shared among responses ({reason}); padded rows instead" if reason else ""
        return Abilities(not reason, plain_head, line)
    finally:
        _remove(raised)
        causal.set_attn_implementation(own_attention)
        causal.train(was_training)


def _refuse_other_kinds(causal: Any, batch: MicroBatch) -> None:
    """Raises UserError where the model has no logits of tokens: a classifier, or what is below a language model."""
    if causal.get_output_embeddings() is not None:
        return
    logits = getattr(causal(input_ids=batch.input_ids[:1]), "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[-1] < causal.config.get_text_config().vocab_size:
        raise UserError(f"model: {type(causal).__name__} is not a causal language model")


def _has_plain_head(causal: Any, batch: MicroBatch, want: Tensor, tolerance: float) -> bool:
    """Whether the output embedding alone makes the logits; some architectures do not name what is before it."""
    if type(causal.get_output_embeddings()) is not torch.nn.Linear or causal.base_model is causal:
        return False
    try:
        return _near(_trial(causal, batch, True), want, tolerance)
    except _CANNOT:
        return False


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _in_float32(causal: Any) -> list[Any]:
    """Let blocks compute in float32 whose weights have 16 bits, until the handles that it returns are removed.

    In 16 bits a right layout differs from the model's own by as much as some wrong ones. The weights of one block at
    a time are copied.
    """

    def before(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept[block] = [(p, p.data) for p in block.parameters() if p.dtype in _HALF]
        for parameter, data in kept[block]:
            parameter.data = data.float()
        return tuple(x.float() if isinstance(x, Tensor) and x.dtype in _HALF else x for x in inputs)

    def after(block: Any, *_: Any) -> None:
        for parameter, data in kept.pop(block, ()):
            parameter.data = data

    kept: dict[Any, list[tuple[Any, Tensor]]] = {}
    handles = []
    for block in _blocks(causal):
        if any(p.dtype in _HALF for p in block.parameters()):
            handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after, always_call=True)]
    return handles


def _blocks(module: Any, repeated: bool = False) -> Iterator[Any]:
    """The parts that hold all weights: layers of a list, and what has weights of its own outside of them."""
    if repeated or next(module.parameters(recurse=False), None) is not None:
        yield module
    else:
        for child in module.children():
            yield from _blocks(child, isinstance(module, torch.nn.ModuleList))


def _trial(causal: Any, batch: MicroBatch, plain_head: bool) -> Tensor:
    """Log-probability sums of the made-up responses, [B, n]."""
    logps = _token_logps(
        causal,
        causal.forward,
        plain_head,
        batch.targets,
        LOGITS_BYTES,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        segments=batch.segments,
        predict_at=batch.predict_at,
        target_row=batch.target_row,
    )
    return logps.new_zeros(batch.candidate_mask.numel()).index_add_(0, batch.target_cell, logps)


def _near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool(((got - want).abs() <= tolerance).all())


def _cannot_share(causal: Any) -> str:
    """Why the architecture cannot be right although it may look so on short prompts, or ""."""
    config = causal.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if not getattr(causal, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    return ""


def _stretched_positions(causal: Any) -> str:
    """Why a response's numbers may depend on what is computed beside it, packed or padded, or ""."""
    config = causal.config.get_text_config()
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    longest = getattr(config, "max_position_embeddings", None)
    for part in (given, *given.values()):  # one for all layers, or one for each kind of layer
        kind = str(part.get("rope_type", part.get("type"))) if isinstance(part, dict) else ""
        if "dynamic" in kind or kind == "longrope":
            longest = part.get("original_max_position_embeddings") or longest
            return (
                f"its {kind} rotary positions are scaled by the longest row: beyond {longest} tokens, "
                "log-probabilities depend on what else is in the batch, in padded rows too"
            )
    return ""


def _difference(causal: Any, batch: MicroBatch, got: Tensor, want: Tensor, tolerance: float) -> str:
    assert batch.segments is not None
    windows = batch.segments.cache.get("windows")
    if not windows:
        return "its layers do not pass on where responses lie"
    if windows == {None} and set(layer_windows(causal.config.get_text_config())) != {None}:
        return "its attention does not say how wide its window is"
    if not _near(got, want, tolerance):
        return f"log-probabilities differ by {float((got - want).abs().max()):.2g}"
    return ""


def _made_up_prompts(vocabulary: int) -> list[RankedPrompt]:
    """Two prompts of different lengths with three and two responses, the last of a single token."""
    draw = np.random.default_rng(0)
    prompts = []
    for length, responses in ((11, (5, 3, 7)), (6, (4, 1))):
        n = len(responses)
        prompts.append(
            RankedPrompt(
                prompt_id=f"made-up-{length}",
                prompt=draw.integers(0, vocabulary, length),
                responses=[draw.integers(0, vocabulary, r) for r in responses],
                rewards=-np.arange(n, dtype=np.float64),
                pair_weights=np.triu(np.ones((n, n), dtype=np.float32), 1),
                sft_index=0,
                sft_lambda=1.0,
            )
        )
    return prompts
