"""Frozen features: the layer that was asked for, prompts shared without a trace, what reward models read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clha.errors import StageFailure, UserError
from clha.rewards.features import FrozenEncoder, prefix_packs
from clha.rewards.texts import (
    Encoded,
    RewardInput,
    RoleText,
    cut_left,
    leading_system_turns,
    text_encoder,
    without_oldest_turns,
)

USER, BOT, SYSTEM = ({"role": r, "content": r} for r in ("user", "assistant", "system"))
ASKED = [{"role": "user", "content": "What is tea?"}]


def encoder(model: Path, layer: int | None = 1, pooling: str = "response_mean", max_tokens: int = 200) -> FrozenEncoder:
    return FrozenEncoder(model, layer=layer, pooling=pooling, max_tokens=max_tokens)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bidirectional encoder without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "user", "assistant", "system", ":", "tea", "is", "what", "drink"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [1, 2])
def test_features_are_the_mean_hidden_states_of_the_response_at_that_layer(tiny_model: Path, layer: int) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModel.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=True, return_dict=False)
    response = tokenizer("A drink.", add_special_tokens=False)["input_ids"]
    seen: list[torch.Tensor] = []
    model.layers[layer - 1].register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        model.eval()(torch.tensor([prompt + response]))
    expected = seen[0][0, len(prompt) :].mean(dim=0).numpy()
    found = encoder(tiny_model, layer).features([RewardInput(ASKED, "A drink.")], tokens_per_batch=100)
    assert found.values[0] == pytest.approx(expected, abs=1e-5)


def test_layers_above_are_not_there(tiny_model: Path) -> None:
    assert len(encoder(tiny_model, 1)._model.layers) == 1


def test_without_a_layer_the_final_normalisation_is_included(tiny_model: Path) -> None:
    items = [RewardInput(ASKED, "A drink.")]
    whole, last = (encoder(tiny_model, k).features(items, tokens_per_batch=99).values for k in (None, 2))
    assert np.abs(whole - last).max() > 1e-3


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_does_not_exist_is_a_clear_error(tiny_model: Path, layer: int) -> None:
    with pytest.raises(UserError, match=f"layer is {layer}, but tiny-random has layers 1 to 2"):
        encoder(tiny_model, layer)


def test_a_shared_prompt_leaves_no_trace(tiny_model: Path) -> None:
    items = [RewardInput(ASKED, text) for text in ("A drink.", "No.", "Leaves in hot water, and patience.")]
    items += [RewardInput([{"role": "user", "content": "And now?"}], text) for text in ("Sleep.", "Wake up!")]
    shared, alone = encoder(tiny_model), encoder(tiny_model)
    assert shared.shares_prefixes
    alone.shares_prefixes = False
    a, b = (e.features(items, tokens_per_batch=1000) for e in (shared, alone))
    assert np.abs(a.values - b.values).max() < 1e-5
    assert shared.padding.tokens - shared.padding.padded < alone.padding.tokens - alone.padding.padded


def test_prompts_are_shared_only_where_that_saves_tokens(tiny_model: Path) -> None:
    """Two long answers to a short question would save a few tokens of many, two short ones to a long one most."""

    def tokens(question: str, answer: str, sharing: bool) -> int:
        reader = encoder(tiny_model, max_tokens=400)
        assert reader.shares_prefixes
        reader.shares_prefixes = sharing
        messages = [{"role": "user", "content": question}]
        reader.features([RewardInput(messages, answer + end) for end in "!?"], tokens_per_batch=4096)
        return reader.padding.tokens

    long = "whatever you say " * 8
    assert tokens("Tea?", long, True) == tokens("Tea?", long, False)
    assert tokens(long, "Tea", True) < 0.75 * tokens(long, "Tea", False)


def windowed(tiny_model: Path, folder: Path, kind: str) -> Path:
    """A random causal model whose layers see 16 tokens back, or only the second one does ("half")."""
    from transformers import AutoModel, AutoTokenizer, Gemma3TextConfig, MistralConfig, PretrainedConfig, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2}
    kinds: dict[str, Callable[[], PretrainedConfig]] = {
        "mistral": lambda: MistralConfig(**size, sliding_window=16),
        "gemma3": lambda: Gemma3TextConfig(**size, sliding_window=16),
        "half": lambda: Qwen2Config(**size, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "off": lambda: Qwen2Config(**size, use_sliding_window=False, sliding_window=16),
    }
    torch.manual_seed(0)
    AutoModel.from_config(kinds[kind]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "layer", "tokens", "shares"),
    [
        ("mistral", 2, 200, False),
        ("gemma3", 1, 200, False),
        ("half", 2, 200, False),
        ("half", 1, 200, True),  # the layer with a window is not there
        ("off", 2, 200, True),
        ("mistral", 2, 17, False),
        ("mistral", 2, 16, True),  # no text is longer than the window
    ],
)
def test_features_of_a_model_with_windows_are_those_of_each_text_alone(
    tiny_model: Path, tmp_path: Path, kind: str, layer: int, tokens: int, shares: bool
) -> None:
    """Alone and without any mask, as the model itself reads a text."""
    folder = windowed(tiny_model, tmp_path, kind)
    long = [{"role": "user", "content": "What is tea, and why do so many people like it?"}]
    items = [RewardInput(long, text) for text in ("A drink.", "No.", "Leaves in hot water, and patience.", "Why not?")]
    items += [RewardInput(ASKED, text) for text in ("A.", "Leaves, dried and put into water that has just boiled.")]
    reader = encoder(folder, layer, max_tokens=tokens)
    assert reader.shares_prefixes == shares
    found = reader.features(items, tokens_per_batch=1000).values
    for item, features in zip(items, found, strict=True):
        e = reader.texts.encode(item)
        with torch.inference_mode():
            reader._model(torch.tensor([e.ids]))
        assert reader._tap is not None
        assert features == pytest.approx(reader._tap.states[0, e.start : e.end].mean(dim=0).numpy(), abs=1e-5)


def out_of_memory_above(reader: FrozenEncoder, responses: int) -> list[list[int]]:
    """Lets `reader` run out of memory with a pack of more responses; returns what it is asked for."""
    pooled, asked = reader._pooled, []

    def limited(packs: list[list[Encoded]]) -> list[np.ndarray]:
        asked.append([len(p) for p in packs])
        if max(map(len, packs)) > responses:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pooled(packs)

    reader._pooled = limited  # type: ignore[method-assign]
    return asked


def test_a_pack_that_does_not_fit_into_memory_is_split(tiny_model: Path) -> None:
    items = [RewardInput(ASKED, text) for text in ("A drink.", "No.", "Leaves.", "A plant.", "It is hot.")]
    whole = encoder(tiny_model).features(items, tokens_per_batch=1000).values
    reader = encoder(tiny_model)
    asked = out_of_memory_above(reader, 2)
    found = reader.features(items, tokens_per_batch=1000).values
    assert asked == [[5], [2], [3], [1], [2]]
    assert np.abs(found - whole).max() < 1e-5


def test_a_response_of_a_pack_that_does_not_fit_alone_is_a_failure_with_its_own_length(tiny_model: Path) -> None:
    items = [RewardInput(ASKED, text) for text in ("A drink.", "No.", "Leaves.")]
    reader = encoder(tiny_model)
    out_of_memory_above(reader, 0)
    alone = len(reader.texts.encode(items[0]).ids)
    with pytest.raises(StageFailure, match=f"one sequence of {alone} tokens; lower max_tokens"):
        reader.features(items, tokens_per_batch=1000)


def test_prompts_are_shared_where_the_padding_token_is_the_last_one(tiny_model: Path) -> None:
    reader = encoder(tiny_model)
    reader.texts.pad_id = reader._model.config.vocab_size - 1
    assert reader._can_share()


def test_a_bidirectional_encoder_never_shares_prompts(bert: Path) -> None:
    assert not encoder(bert, 2, "mean", 40).shares_prefixes
    assert not encoder(bert, 2, "response_mean", 40).shares_prefixes


def test_packs_hold_each_row_once_and_stay_within_the_budget() -> None:
    rows = [Encoded([1, 2, 3, *range(10, 10 + n)], 3, 3 + n, False) for n in (5, 5, 5, 2)]
    rows.append(Encoded([7, 7, 9], 2, 3, False))
    packs = prefix_packs(rows, 13)
    assert sorted(i for p in packs for i in p) == [0, 1, 2, 3, 4]
    assert packs == [[0, 1], [2, 3], [4]]


def test_unreadable_rows_are_nan_and_say_why(tiny_model: Path) -> None:
    found = encoder(tiny_model).features(
        [RewardInput(ASKED, "fine"), RewardInput(ASKED, " "), RewardInput(ASKED, "\ud800")], tokens_per_batch=100
    )
    assert np.isnan(found.values).all(axis=1).tolist() == [False, True, True]
    assert found.problems[1].startswith("empty_response")
    assert found.problems[2].startswith("invalid_unicode")


# What is read.


def test_system_turns_stay_and_the_oldest_others_go() -> None:
    messages = [SYSTEM, USER, BOT, USER]
    assert leading_system_turns(messages) == 1
    assert without_oldest_turns(messages, 2) == [SYSTEM, USER]
    assert without_oldest_turns([SYSTEM, SYSTEM, USER], 0) == [SYSTEM, SYSTEM, USER]
    assert leading_system_turns([SYSTEM]) == 0  # the last message is a prompt, whatever its role


def test_cutting_on_the_left_keeps_the_end_and_moves_the_response() -> None:
    """Prompt of 4, response of 3, 1 after: at most 6 keeps the prompt's last 2."""
    found = cut_left([1, 2, 3, 4], [5, 6, 7], [8], 6, truncated=False)
    assert found == Encoded([3, 4, 5, 6, 7, 8], 2, 5, True)
    assert cut_left([1], [5, 6, 7], [8], 3, truncated=False) == Encoded([6, 7, 8], 0, 2, True)
    assert cut_left([1], [5], [], 3, truncated=False) == Encoded([1, 5], 1, 2, False)


def test_role_text_worked_by_hand(bert: Path) -> None:
    """[CLS] user : what is tea assistant : a drink [SEP]"""
    texts = text_encoder(bert, 100, closed=False)
    assert isinstance(texts, RoleText)
    found = texts.encode(RewardInput([{"role": "user", "content": "what is tea"}], "a drink"))
    assert found.ids == [2, 5, 8, 11, 10, 9, 6, 8, 4, 12, 3]
    assert (found.start, found.end, found.truncated) == (8, 10, False)


def test_role_text_that_is_cut_still_begins_as_the_encoder_knows_it(bert: Path) -> None:
    texts = text_encoder(bert, 100, closed=False)
    long = [{"role": "user", "content": "tea " * 60}]
    found = texts.encode(RewardInput(long, "a drink"))
    assert len(found.ids) == 40  # the positions that the encoder has
    assert found.ids[0] == 2
    assert found.ids[found.start : found.end] == [4, 12]
    assert found.truncated


def xlm_roberta(bert: Path, folder: Path, **tokenizer_settings: Any) -> Path:
    """A random XLM-R with 24 positions, of which 22 can be used: tokens begin at the one after the padding token's."""
    from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=13, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, pad_token_id=1, num_labels=1,
    )  # fmt: skip
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert, **tokenizer_settings).save_pretrained(folder)
    return folder


LONG = [RewardInput([{"role": "user", "content": "tea " * k}], "a drink") for k in (30, 10, 3)]


def test_positions_that_no_token_gets_are_not_counted(bert: Path, tmp_path: Path) -> None:
    folder = xlm_roberta(bert, tmp_path)
    texts = text_encoder(folder, 100, closed=False)
    assert [(len(e.ids), e.truncated) for e in map(texts.encode, LONG)] == [(22, True), (18, False), (11, False)]
    assert text_encoder(folder, 20, closed=False).max_tokens == 20
    assert np.isfinite(encoder(folder, 2, "mean").features(LONG, tokens_per_batch=100).values).all()


def test_the_limit_of_a_tokenizer_counts_where_it_has_one(bert: Path, tmp_path: Path) -> None:
    folder = xlm_roberta(bert, tmp_path, model_max_length=15)
    assert text_encoder(folder, 100, closed=False).max_tokens == 15
    assert text_encoder(folder, 12, closed=False).max_tokens == 12


def test_a_model_without_a_limit_reads_all_that_the_settings_allow(bert: Path, tmp_path: Path) -> None:
    """XLNet, whose configuration says -1."""
    from transformers import AutoTokenizer, XLNetConfig

    XLNetConfig(vocab_size=13, d_model=32, n_layer=1, n_head=2, d_inner=64).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    texts = text_encoder(tmp_path, 30, closed=False)
    assert [(len(e.ids), e.truncated) for e in map(texts.encode, LONG)] == [(30, True), (18, False), (11, False)]


def test_role_text_loses_whole_turns_and_begins_with_the_user(bert: Path) -> None:
    """18 tokens in all, 14 without the first turn, 11 without the first two: 15 allow the last turn alone."""
    old = [{"role": "user", "content": "tea tea"}, {"role": "assistant", "content": "a"}]
    last = [{"role": "user", "content": "what is tea"}]
    texts = text_encoder(bert, 15, closed=False)
    whole = text_encoder(bert, 18, closed=False).encode(RewardInput([*old, *last], "a drink"))
    assert (len(whole.ids), whole.truncated) == (18, False)
    found = texts.encode(RewardInput([*old, *last], "a drink"))
    assert found.ids == texts.encode(RewardInput(last, "a drink")).ids
    assert len(found.ids) == 11 and found.truncated


def test_the_dropped_turns_are_those_that_the_policys_prompt_loses(tiny_model: Path) -> None:
    from clha.chat import load_chat

    messages = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * 4} for i in range(5)]
    response = "fine"
    texts = text_encoder(tiny_model, 150, closed=False)
    found = texts.encode(RewardInput(messages, response))
    chat = load_chat(tiny_model)
    room = 150 - (found.end - found.start)
    prompt = chat.encode_prompt(messages, room)
    assert prompt.truncated_turns > 0
    assert found.ids[: found.start] == prompt.token_ids
