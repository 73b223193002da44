"""A random tiny causal language model and its tokenizer, made on the spot: for tests and the `smoke` profile."""

import string
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer():  # type: ignore[no-untyped-def]
    """A byte-level tokenizer: 256 bytes and the two ChatML control tokens; EOS and PAD are <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate(specials + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[1],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """Write a two-layer Llama (hidden 64, 258 tokens, 1,024 positions) with its tokenizer to `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # It speaks in letters: a response of blanks alone would be an empty one, and judged by nobody.
        letters = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
        model.model.embed_tokens.weight.data[letters] *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
