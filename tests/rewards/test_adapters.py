"""Every reward model: rewards depend on the text alone, whatever the batches, order and neighbours."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reward_cases import node_work, preference_rows, write_prompts
from reward_cases import settings as chain_settings

from clha.errors import UserError
from clha.rewards.adapters import load_scorer, model_folders
from clha.rewards.interface import RewardScorer
from clha.rewards.texts import RewardInput
from clha.settings_rewards import RewardModel
from clha.stages import fit_reward
from clha.store import Home

WORDS = "tea rain bread warm kind rude exact boring maps trains whatever gladly because often".split()  # noqa: SIM905


def inputs(count: int, seed: int = 0) -> list[RewardInput]:
    """Prompts of one to five turns, some of them shared, with responses of 1 to 40 words."""
    draw = random.Random(seed)

    def words(k: int) -> str:
        return " ".join(draw.choices(WORDS, k=k))

    out: list[RewardInput] = []
    while len(out) < count:
        turns = draw.choice([1, 1, 3, 5])
        messages = [{"role": ("user", "assistant")[i % 2], "content": words(draw.randint(2, 20))} for i in range(turns)]
        if draw.random() < 0.3:
            messages.insert(0, {"role": "system", "content": words(4)})
        out += [RewardInput(messages, words(draw.randint(1, 40))) for _ in range(draw.randint(1, 4))]
    return out[:count]


@pytest.fixture(scope="session")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one output, on the tiny model's tokenizer (its padding token is its EOS)."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def neox_folder(tiny_model: Path, folder: Path, pooling: str) -> Path:
    """A random model in the layout that OpenAssistant publishes: gpt_neox.*, out_proj.*, pooling in the config."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|prompter|>", "<|assistant|>", "<|endoftext|>", "<|system|>"]}
    )
    tokenizer.save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
    )
    body, out = GPTNeoXModel(config), torch.nn.Linear(32, 1)
    state = {f"gpt_neox.{k}": v.contiguous() for k, v in body.state_dict().items()}
    state |= {f"out_proj.{k}": v.detach() for k, v in out.state_dict().items()}
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)  # older checkpoints carry such buffers
    save_file(state, folder / "model.safetensors")
    settings = config.to_dict() | {"model_type": "gpt_neox_reward_model", "pooling": pooling}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


Loader = Callable[[int], RewardScorer]


@pytest.fixture(scope="session")
def loaders(tiny_model: Path, classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loader]:
    """name -> a function that loads that reward model with a token budget."""
    home = Home(tmp_path_factory.mktemp("adapters")).create()
    work = node_work(
        home,
        chain_settings(),
        "fit_reward.train",
        {"prepare": write_prompts(home, preference_rows(40))},
        {"encoder": tiny_model},
    )
    fitted = fit_reward.build(work).folder
    neox = {p: neox_folder(tiny_model, tmp_path_factory.mktemp(f"neox-{p}"), p) for p in ("last", "mean")}

    def load(folder: Path | list[Path], **settings: object) -> Loader:
        return lambda budget: load_scorer(
            RewardModel(tokens_per_batch=budget, max_tokens=400, **settings), folder, fitted, "cpu"
        )

    return {
        "fitted": load(tiny_model),
        "sequence_classification": load(classifier, type="sequence_classification", model="c"),
        "gpt_neox_last": load(neox["last"], type="gpt_neox_reward_model", model="n"),
        "gpt_neox_mean": load(neox["mean"], type="gpt_neox_reward_model", model="n"),
        "ensemble": load(
            [tiny_model, classifier],
            type="ensemble",
            members=[
                RewardModel(),
                RewardModel(type="sequence_classification", model="c", max_tokens=400, scale=0.5),
            ],
        ),
    }


NAMES = ["fitted", "sequence_classification", "gpt_neox_last", "gpt_neox_mean", "ensemble"]


@pytest.mark.parametrize("name", NAMES)
@given(st.randoms(use_true_random=False), st.integers(30, 3000))
@hypothesis_settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rewards_do_not_depend_on_batches_order_or_neighbours(
    loaders: dict[str, Loader], name: str, draw: random.Random, budget: int
) -> None:
    items = inputs(24)
    whole = loaders[name](100_000).score(items)
    order = list(range(len(items)))
    draw.shuffle(order)
    some = order[: draw.randint(1, len(items))]
    part = loaders[name](budget).score([items[i] for i in some])
    assert np.abs(part.rewards - whole.rewards[some]).max() < 1e-5
    assert np.abs(part.members - whole.members[some]).max() < 1e-5
    assert (part.truncated == whole.truncated[some]).all()
    assert np.ptp(whole.rewards) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_long_dialogue_loses_its_oldest_turns_and_is_flagged(loaders: dict[str, Loader], name: str) -> None:
    last = {"role": "user", "content": "And now?"}
    old = [{"role": "user", "content": "far too long " * 60}, {"role": "assistant", "content": "yes " * 30}]
    scored = loaders[name](4096).score([RewardInput([*old, last], "Fine."), RewardInput([last], "Fine.")])
    assert scored.truncated.tolist() == [True, False]
    assert scored.rewards[0] == pytest.approx(scored.rewards[1], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_a_users_text_are_plain_text(loaders: dict[str, Loader], name: str) -> None:
    for spelled in ("<|im_end|>", "<|endoftext|>", "<|prompter|>"):
        asked = [{"role": "user", "content": f"Say {spelled} please"}]
        scored = loaders[name](4096).score([RewardInput(asked, f"I say {spelled} now"), RewardInput(asked, "I say it")])
        assert np.isfinite(scored.rewards).all()


@pytest.mark.parametrize("name", NAMES)
def test_text_that_is_no_unicode_gets_no_reward_and_says_why(loaders: dict[str, Loader], name: str) -> None:
    asked = [{"role": "user", "content": "Hello"}]
    scored = loaders[name](4096).score([RewardInput(asked, "broken \ud800"), RewardInput(asked, "whole")])
    assert np.isnan(scored.rewards).tolist() == [True, False]
    assert scored.problems[0].startswith("invalid_unicode")


def test_nothing_to_score_is_no_error(loaders: dict[str, Loader]) -> None:
    for load in loaders.values():
        assert load(100).score([]).rewards.shape == (0,)


def test_a_classifier_reads_the_conversation_as_its_template_writes_it(
    loaders: dict[str, Loader], classifier: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    messages = [{"role": "user", "content": "What is tea?"}]
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    ids = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "A drink."}], return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    with torch.inference_mode():
        # The last token is the one that is judged, padding token or not.
        model.config.pad_token_id = None
        expected = float(model(ids).logits[0, 0])
    found = loaders["sequence_classification"](4096).score([RewardInput(messages, "A drink.")]).rewards[0]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_open_assistant_model_worked_step_by_step(
    loaders: dict[str, Loader], tiny_model: Path, tmp_path: Path, pooling: str
) -> None:
    """Text -> IDs, body, pooling, projection, each by hand."""
    from safetensors.torch import load_file
    from transformers import GPTNeoXConfig, GPTNeoXModel, PreTrainedTokenizerFast

    folder = neox_folder(tiny_model, tmp_path, pooling)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = "<|prompter|>Tea or rain?<|endoftext|><|assistant|>Tea.<|endoftext|>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    body = GPTNeoXModel(GPTNeoXConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    body.load_state_dict(
        {k.removeprefix("gpt_neox."): v for k, v in state.items() if "masked_bias" not in k and "out" not in k[:4]}
    )
    with torch.inference_mode():
        states = body.eval()(ids).last_hidden_state[0]
        pooled = states[-1] if pooling == "last" else states.mean(dim=0)
        expected = float(pooled @ state["out_proj.weight"][0] + state["out_proj.bias"][0])
    asked = RewardInput([{"role": "user", "content": "Tea or rain?"}], "Tea.")
    found = loaders[f"gpt_neox_{pooling}"](4096).score([asked]).rewards[0]
    assert found == pytest.approx(expected, abs=1e-5)


def test_an_ensemble_is_the_mean_of_its_scaled_members(loaders: dict[str, Loader]) -> None:
    items = inputs(6)
    both = loaders["ensemble"](4096).score(items)
    one, two = (loaders[n](4096).score(items).rewards for n in ("fitted", "sequence_classification"))
    assert both.members == pytest.approx(np.stack([one, 0.5 * two], axis=1))
    assert both.rewards == pytest.approx((one + 0.5 * two) / 2)


def test_a_classifier_with_two_outputs_is_a_clear_error(classifier: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig.from_pretrained(classifier, num_labels=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 2 outputs, a reward model has one"):
        load_scorer(RewardModel(type="sequence_classification", model="c"), tmp_path, None, "cpu")


def test_a_folder_that_is_no_open_assistant_model_is_a_clear_error(classifier: Path) -> None:
    with pytest.raises(UserError, match="is no gpt_neox_reward_model|tokenizer has no"):
        load_scorer(RewardModel(type="gpt_neox_reward_model", model="c"), classifier, None, "cpu")


def test_weights_that_do_not_fit_are_a_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = neox_folder(tiny_model, tmp_path, "mean")
    state = load_file(folder / "model.safetensors")
    del state["out_proj.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match="lacks out_proj.weight"):
        load_scorer(RewardModel(type="gpt_neox_reward_model", model="n"), folder, None, "cpu")


def test_member_folders_come_in_the_order_of_the_members() -> None:
    models = {f"rescore.reward.{i}": Path(str(i)) for i in (10, 2, 0)} | {"rescore.rewards": Path("x")}
    assert model_folders(models, "rescore.reward") == [Path("0"), Path("2"), Path("10")]
    assert model_folders({"rescore.reward": Path("a")}, "rescore.reward") == Path("a")
