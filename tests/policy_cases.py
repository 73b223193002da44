"""Small random models of the families of architectures, and what they are held against."""

import copy
from typing import Any

import torch
from training_cases import VOCABULARY, Prompts
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from clha.training import policy
from clha.training.batches import MicroBatch, RankedPrompt, pack, pad
from clha.training.logprobs import sum_by_response

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}

SHARING = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 with windows": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=4),
    "gemma": GemmaConfig(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=4, query_pre_attn_scalar=16),
    "gpt-neox": GPTNeoXConfig(**NEOX),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0),
}
PADDED = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "llama4": Llama4TextConfig(
        **SMALL, head_dim=16, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=96
    ),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2),
}


def make(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # The usual small initial weights would hide a wrong mask behind near-uniform attention.
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def separate_passes(model: Any, prompts: list[RankedPrompt], n: int) -> torch.Tensor:
    """[B, n] summed log-probabilities by one unpadded pass per response through the model's own forward."""
    rows = []
    for prompt in prompts:
        sums = []
        for response in prompt.responses:
            ids = torch.tensor([[*prompt.prompt.tolist(), *response.tolist()]])
            logps = model(input_ids=ids).logits[0, len(prompt.prompt) - 1 : -1].float().log_softmax(-1)
            sums.append(logps.gather(1, ids[0, len(prompt.prompt) :, None]).sum())
        rows.append(torch.stack([*sums, *[torch.zeros(())] * (n - len(sums))]))
    return torch.stack(rows)


def sums_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    return sum_by_response(policy.response_logps(model, batch), batch.target_cell, *batch.candidate_mask.shape)


def gradients(model: Any, sums: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (sums * upstream).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def check_against_separate_passes(model: Any, packed: bool, checkpointing: bool = False) -> None:
    prompts = Prompts(5).items
    batch = pack(prompts, multiple_of=16) if packed else pad(prompts)
    upstream = torch.randn(batch.candidate_mask.shape, generator=torch.Generator().manual_seed(3))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    got = sums_of(model, batch)
    ours = gradients(model, got, upstream)
    policy.detach(model)
    if checkpointing:
        model.gradient_checkpointing_disable()
        model.eval()
    model.set_attn_implementation("eager")
    want = separate_passes(model, prompts, batch.candidate_mask.shape[1])
    theirs = gradients(model, want, upstream)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def changed_copy(model: Any) -> Any:
    """A copy whose weights are half of the model's."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    return other
