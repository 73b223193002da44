"""Every reward model: rewards depend on the text alone, whatever the batches, order and neighbours."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_cases import Loader, classifier_of, inputs, neox_folder
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reward_cases import node_work, preference_rows, write_bert, write_candidates, write_prompts
from reward_cases import settings as chain_settings

from clha.errors import UserError
from clha.models import resolve_model
from clha.rewards.adapters import Folders, HeadFolders, load_scorer, model_folders
from clha.rewards.texts import RewardInput
from clha.runs import Run
from clha.settings_rewards import RewardModel
from clha.stages import fit_reward
from clha.stages.chain import Planned, nodes, plan_node
from clha.store import Home


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


@pytest.fixture(scope="session")
def loaders(tiny_model: Path, classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loader]:
    """name -> what loads that reward model."""
    from transformers import BertConfig, BertForSequenceClassification, MistralConfig, XLMRobertaConfig, XLNetConfig

    size = {"vocab_size": BertConfig.from_pretrained(write_bert(tmp_path_factory.mktemp("size"))).vocab_size}
    size |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
    bert = write_bert(tmp_path_factory.mktemp("bert"), layers=2)
    judge = tmp_path_factory.mktemp("bert-classifier")
    shutil.copytree(bert, judge, dirs_exist_ok=True)
    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig.from_pretrained(bert, num_labels=1)).save_pretrained(judge)

    def fit(encoder: Path, **changes: Any) -> Path:
        home = Home(tmp_path_factory.mktemp("adapters")).create()
        own = {"encoder": "bundled:tiny-random", "layer": 1, "max_tokens": 256, "folds": 3} | changes
        chain = chain_settings(fit_reward={"train": own, "eval": own})
        prompts = write_prompts(home, preference_rows(80))
        work = node_work(home, chain, "fit_reward.train", {"prepare": prompts}, {"encoder": encoder})
        return fit_reward.build(work).folder

    tuned = {"method": "lora", "lora": {"rank": 8, "learning_rate": 3e-2, "batch_pairs": 8, "epochs": 6}}
    fitted = fit(tiny_model)
    windows = MistralConfig(
        **size, intermediate_size=64, num_key_value_heads=1, sliding_window=16, initializer_range=0.2, pad_token_id=1
    )
    windowed = classifier_of(windows, tiny_model, tmp_path_factory.mktemp("windowed"))
    positions = XLMRobertaConfig(
        **size, intermediate_size=64, max_position_embeddings=80, pad_token_id=1, initializer_range=0.2
    )
    xlm_roberta = classifier_of(positions, bert, tmp_path_factory.mktemp("xlm-roberta"))
    xlnet = classifier_of(
        XLNetConfig(vocab_size=size["vocab_size"], d_model=32, n_layer=2, n_head=2, d_inner=64, num_labels=1),
        bert,
        tmp_path_factory.mktemp("xlnet"),
    )
    neox = {p: neox_folder(tiny_model, tmp_path_factory.mktemp(f"neox-{p}"), p) for p in ("last", "mean")}

    def load(folder: Folders | list[Folders], fitted: Path | None = None, **settings: Any) -> Loader:
        return Loader(folder, fitted, tmp_path_factory.mktemp("sides"), **settings)

    return {
        "fitted": load(tiny_model, fitted),
        "fitted_members": load(tiny_model, fit(tiny_model, members=3)),
        "fitted_mean_pooling": load(tiny_model, fit(tiny_model, pooling="mean", layer=2)),
        "fitted_lora": load(tiny_model, fit(tiny_model, **tuned)),
        "fitted_lora_bert": load(bert, fit(bert, **tuned)),
        "fitted_role_text": load(bert, fit(bert)),
        "encoder_head": load(
            HeadFolders(fitted / "reward_model", tiny_model), type="encoder_head", model="h", encoder="e"
        ),
        "sequence_classification": load(classifier, type="sequence_classification", model="c"),
        "bert_classification": load(judge, type="sequence_classification", model="c"),
        "fitted_windowed": load(windowed, fit(windowed, layer=2)),
        "windowed_classification": load(windowed, type="sequence_classification", model="c"),
        "xlm_roberta_classification": load(xlm_roberta, type="sequence_classification", model="c"),
        "xlnet_classification": load(xlnet, type="sequence_classification", model="c"),
        "gpt_neox_last": load(neox["last"], type="gpt_neox_reward_model", model="n"),
        "gpt_neox_mean": load(neox["mean"], type="gpt_neox_reward_model", model="n"),
        "ensemble": load(
            [tiny_model, classifier, HeadFolders(fitted / "reward_model", tiny_model)],
            fitted,
            type="ensemble",
            members=[
                RewardModel(),
                RewardModel(type="sequence_classification", model="c", max_tokens=400, scale=0.5),
                RewardModel(type="encoder_head", model="h", encoder="e", scale=2.0),
            ],
        ),
    }


NAMES = [
    "fitted", "fitted_members", "fitted_mean_pooling", "fitted_lora", "fitted_lora_bert", "fitted_role_text",
    "encoder_head", "sequence_classification", "bert_classification", "fitted_windowed", "windowed_classification",
    "xlm_roberta_classification", "xlnet_classification", "gpt_neox_last", "gpt_neox_mean", "ensemble",
]  # fmt: skip


def test_no_adapter_is_left_out(loaders: dict[str, Loader]) -> None:
    """`server` is tested against a real one, in test_server.py."""
    assert set(NAMES) == set(loaders)
    types = {load(100).__class__.__name__ for load in loaders.values()}
    assert types == {"EncoderHead", "SequenceClassification", "GptNeoxReward", "Ensemble"}


@pytest.mark.parametrize("name", NAMES)
@given(st.randoms(use_true_random=False), st.integers(30, 3000), st.sampled_from(["left", "right"]))
@hypothesis_settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rewards_do_not_depend_on_batches_order_neighbours_or_padding_side(
    loaders: dict[str, Loader], name: str, draw: random.Random, budget: int, side: str
) -> None:
    items = inputs(24)
    whole = loaders[name](100_000).score(items)
    order = list(range(len(items)))
    draw.shuffle(order)
    some = order[: draw.randint(1, len(items))]
    part = loaders[name](budget, side).score([items[i] for i in some])
    assert np.abs(part.rewards - whole.rewards[some]).max() < 1e-5
    assert np.abs(part.members - whole.members[some]).max() < 1e-5
    assert (part.truncated == whole.truncated[some]).all()
    assert np.ptp(whole.rewards) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_rewards_on_cuda_are_those_of_the_cpu(loaders: dict[str, Loader], name: str) -> None:
    items = inputs(24)
    cpu, cuda = (loaders[name](2000, device=device).score(items) for device in ("cpu", "cuda"))
    assert np.abs(cuda.members - cpu.members).max() < 1e-3
    assert (cuda.truncated == cpu.truncated).all()


def test_the_other_padding_side_is_what_the_tokenizers_say(classifier: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for side in ("left", "right"):
        folder = Loader(classifier, None, tmp_path)._copy(classifier, side)
        assert AutoTokenizer.from_pretrained(folder).padding_side == side


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
def test_what_cannot_be_read_gets_no_reward_and_says_why(loaders: dict[str, Loader], name: str) -> None:
    asked = [{"role": "user", "content": "Hello"}]
    scored = loaders[name](4096).score([RewardInput(asked, text) for text in ("broken \ud800", "whole", " \n")])
    assert np.isnan(scored.rewards).tolist() == [True, False, True]
    assert scored.problems[0].startswith("invalid_unicode") and scored.problems[2].startswith("empty_response")


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
    assert both.members == pytest.approx(np.stack([one, 0.5 * two, 2 * one], axis=1))
    assert both.rewards == pytest.approx((3 * one + 0.5 * two) / 3)


def test_a_head_of_another_run_gives_the_rewards_that_it_gives_there(loaders: dict[str, Loader]) -> None:
    items = inputs(6)
    there, here = (loaders[n](4096).score(items) for n in ("fitted", "encoder_head"))
    assert here.rewards.tolist() == there.rewards.tolist()


def test_a_head_on_an_encoder_of_another_width_is_a_clear_error(loaders: dict[str, Loader], tmp_path: Path) -> None:
    head = loaders["encoder_head"]._folder
    assert isinstance(head, HeadFolders)
    settings = RewardModel(type="encoder_head", model="h", encoder="e")
    with pytest.raises(UserError, match="reads 64 features, other has 32"):
        load_scorer(settings, HeadFolders(head.head, write_bert(tmp_path / "other")), None, "cpu")


def test_the_key_of_a_node_holds_head_and_encoder_and_a_wrong_encoder_is_said_before_any_work(
    home: Home, tiny_model: Path, loaders: dict[str, Loader], tmp_path: Path
) -> None:
    head = loaders["encoder_head"]._folder
    assert isinstance(head, HeadFolders)
    digest = resolve_model(str(tiny_model), home).digest
    folder = tmp_path / "reward_model"
    shutil.copytree(head.head, folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"encoder": digest})
    )

    def plan(model: Path, encoder: Path) -> Planned:
        reward = {"type": "encoder_head", "model": str(model), "encoder": str(encoder)}
        chain = chain_settings(rescore={"reward": reward, "sft_threshold": 0.0})
        node = next(n for n in nodes(chain) if n.name == "score")
        inputs = {"prepare": write_prompts(home, []), "generate": write_candidates(home, [])}
        return plan_node(home, Run("r", "p", {}), chain, node, inputs)

    parts = plan(folder, tiny_model).parts
    assert parts["models"] == {
        "rescore.reward": resolve_model(str(folder), home).digest,
        "rescore.reward.encoder": digest,
    }
    with pytest.raises(UserError, match="rescore.reward.encoder is another model than the one .*tiny-random"):
        plan(folder, write_bert(tmp_path / "other"))
    with pytest.raises(UserError, match="has no head.safetensors; give the folder reward_model"):
        plan(tiny_model, tiny_model)


def test_an_encoder_is_for_heads_alone() -> None:
    for wrong in ({"type": "encoder_head", "model": "h"}, {"encoder": "e"}):
        with pytest.raises(ValueError, match="encoder must be given for type `encoder_head`, and only there"):
            RewardModel(**wrong)


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
    with_head = {"rescore.reward.1": Path("b"), "rescore.reward.0": Path("h"), "rescore.reward.0.encoder": Path("e")}
    assert model_folders(with_head, "rescore.reward") == [HeadFolders(Path("h"), Path("e")), Path("b")]
    single = {"rescore.reward": Path("h"), "rescore.reward.encoder": Path("e")}
    assert model_folders(single, "rescore.reward") == HeadFolders(Path("h"), Path("e"))
