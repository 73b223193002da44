"""Tokenizers and chat templates as other model families have them, made on the spot."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

# A template that trims, names its roles in the text, and puts a space before the assistant's words.
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Letters with a space sign put before the first word, as SentencePiece does, and [INST] as non-special tokens."""
    alphabet = ["▁", *(chr(c) for c in range(33, 127))]
    specials = ["<unk>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + alphabet)}, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.Replace("\n", " ")
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_tokens([AddedToken("[INST]", special=False), AddedToken("[/INST]", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=INST
    )


# Words and pairs of letters become tokens of their own, so that text has borders inside and between words.
_CORPUS = ["The sky is blue and green. Say good, good or bad. Name a river: the Rhine, the Nile. Q: abc bc A: No."] * 9
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _trained(specials: list[str], splits: pre_tokenizers.PreTokenizer, alphabet: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in specials else None))
    core.pre_tokenizer = splits
    core.train_from_iterator(
        _CORPUS, BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    return core


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and words; the post-processor puts BOS before every text, and nothing else says that it does."""
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    specials = [begin, end, "<|start_header_id|>", "<|end_header_id|>"]
    core = _trained(
        specials, pre_tokenizers.ByteLevel(add_prefix_space=False), sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=begin, eos_token=end, pad_token=end, chat_template=_LLAMA3
    )


def llama2_tokenizer(prepend: str = "first") -> PreTrainedTokenizerFast:
    """Words behind a space sign, one put before the first (or before each piece of text), and BOS before every text."""
    core = _trained(
        ["<unk>", "<s>", "</s>"],
        pre_tokenizers.Metaspace(prepend_scheme=prepend),
        ["▁", "\n", *(chr(c) for c in range(33, 127))],
    )
    core.decoder = decoders.Metaspace(prepend_scheme=prepend)
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=INST,
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Its template ends a turn with <end_of_turn>; EOS is another token, which the template never writes."""
    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    core = _trained(
        specials, pre_tokenizers.ByteLevel(add_prefix_space=False), sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))])
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=_GEMMA
    )
