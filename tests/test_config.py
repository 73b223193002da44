"""Settings: every key checked, every mistake one line that names key, file and the nearest known key."""

import re
from pathlib import Path

import pytest
import yaml

from clha.config import Settings, load_settings, settings_from
from clha.errors import UserError

MINIMAL = """
profiles:
  p:
    policy: {model: m}
    prepare: {source: chat_jsonl, path: d.jsonl}
    rescore: {reward: {type: sequence_classification, model: "hub:a/b"}}
    evaluate: {reward: {type: sequence_classification, model: "hub:c/d"}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pipelines.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("profile", ["demo", "smoke", "hh-7b"])
def test_the_shipped_profiles_are_valid(root: Path, profile: str):
    name, settings = load_settings(root / "pipelines.yaml", profile)
    assert name == profile
    assert settings_from(settings.model_dump(mode="json"), (), where="again") == settings


def test_hh_7b_is_the_papers_setting(root: Path):
    _, s = load_settings(root / "pipelines.yaml", "hh-7b")
    assert (s.train.margin, s.rescore.noise.gap, s.train.sft_weight) == (3.0, 3.0, 0.05)
    assert (s.train.learning_rate, s.train.epochs, s.train.lr_schedule) == (5e-6, 2.0, "constant")
    assert s.train.batch_prompts == 8 * 2 * 8  # 8 GPUs, 2 a device, 8 accumulation steps
    assert (s.train.processes, s.train.sharding, s.train.bf16) == (8, "full_shard", True)
    assert s.train.keep_best and s.prepare.limits.dev == 280  # checkpoints are chosen on 280 prompts
    assert s.generate.max_prompt_tokens + s.generate.max_tokens == 512
    assert s.rescore.reward.model != s.evaluate.reward.model


def test_a_key_stands_under_a_comment_for_every_setting_of_the_default_profile(root: Path):
    text = (root / "pipelines.yaml").read_text()
    demo = yaml.safe_load(text)["profiles"]["demo"]
    known = Settings.model_fields
    assert set(demo) == set(known)
    missing = []

    def walk(model: type, tree: dict, path: str) -> None:
        for name, info in model.model_fields.items():
            if name not in tree:
                missing.append(f"{path}{name}")
            elif isinstance(tree[name], dict):
                options = (info.annotation, *getattr(info.annotation, "__args__", ()))
                inner = next((o for o in options if isinstance(o, type) and hasattr(o, "model_fields")), None)
                if inner is not None:
                    walk(inner, tree[name], f"{path}{name}.")

    walk(Settings, demo, "")
    # What only some sources and machines need has its default in clha/config.py and its place in the docs.
    assert set(missing) <= {"prepare.subset", "prepare.hub_split", "prepare.revision", "prepare.limits.reward_train",
                            "prepare.limits.reward_eval"}  # fmt: skip
    assert "#" in text


def test_paths_are_taken_from_where_they_are_written(file: Path, tmp_path: Path):
    _, settings = load_settings(file)
    assert settings.prepare.path == str(tmp_path / "d.jsonl")
    elsewhere = tmp_path / "elsewhere"
    _, settings = load_settings(file, overrides=["prepare.path=e.jsonl"], folder=elsewhere)
    assert settings.prepare.path == str(elsewhere / "e.jsonl")
    assert settings.rescore.reward.model == "hub:a/b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lerning_rate=1", "unknown key `train.lerning_rate`; did you mean `learning_rate`"),
        ("trian.margin=1", "did you mean `train`"),
        ("train.learning_rate=fast", "`train.learning_rate`: .*number"),
        ("train.batch_prompts=0", "`train.batch_prompts`: .*greater than 0"),
        ("generate.n=2.5", "`generate.n`"),
        ("prepare.splits.train=0.9", r"train \+ dev \+ test must be 1"),
        ("generate.engine.max_model_len=64", "max_model_len is 64"),
        ("generate.engine.mode=server", "url must be given"),
        ("generate.engine.args.model=x", "args.model is not yours"),
        ("rescore.reward.type=fitted", "model must be given for every type but `fitted`"),
        ("rescore.sft_threshold=fitted", "sft_threshold is fitted"),
        ("train.loss=simpo", "`train.loss`: .*clha"),
        ("train.keep_best=true", "`train`: keep_best needs eval_steps"),
        ("train.patience=2", "`train`: patience needs keep_best"),
        ("train.micro_batch_prompts=2", "micro_batch_prompts needs normalization: reference"),
        ("train={normalization: reference, micro_batch_prompts: 3}", "batch_prompts is 4: it must be a multiple of"),
        ("train.processes=3", r"batch_prompts is 4: .*\(1 x 3\)"),
        ("train.sharding=full_shard", "sharding full_shard needs processes above 1"),
        ("train.label_smoothing=0.1", "label_smoothing needs loss dpo_smoothed or dpo_robust, it is clha"),
        ("train.lora.rnak=4", "unknown key `train.lora.rnak`; did you mean `rank`"),
        ("policy=null", "`policy`"),
        ("nokey", "must be KEY=VALUE"),
        ("a..b=1", "must be KEY=VALUE"),
        ("train.margin=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(file: Path, override: str, expected: str):
    with pytest.raises(UserError) as caught:
        load_settings(file, overrides=[override])
    assert re.search(expected, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("profiles: [", "line 1: not valid YAML"),
        ("", "must hold a mapping"),
        ("default: x", "no `profiles`"),
        ("profiles: {p: 3}", "must be a mapping"),
        ("default: q\nprofiles: {p: {}}", "no profile `q`"),
        ("profiles: {a: {extends: b}, b: {extends: a}}\ndefault: a", "circle: a -> b -> a"),
        ("profiles: {p: {policy: {model: m}}}", "`prepare` is missing"),
        ("profiles: {p: {}}\nprofile: x", "unknown key `profile`"),
        ("profiles: {p: !!python/object/apply:os.system ['true']}", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(file: Path, text: str, expected: str):
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings(file)
    assert str(file) in str(caught.value) and expected in str(caught.value)


def test_a_missing_file_says_how_to_name_another(tmp_path: Path):
    with pytest.raises(UserError, match="--config"):
        load_settings(tmp_path / "none.yaml")


def test_execution_settings_stay_out_of_the_key(file: Path):
    _, a = load_settings(file)
    changed = ["train.tokens_per_micro_batch=1", "train.processes=2", "train.sharding=full_shard"]
    _, b = load_settings(file, overrides=[*changed, "rescore.reward.tokens_per_batch=9"])
    assert a.train.key_settings() == b.train.key_settings()
    assert a.rescore.key_settings() == b.rescore.key_settings()
    _, c = load_settings(file, overrides=["train.margin=1"])
    assert a.train.key_settings() != c.train.key_settings()


def test_numbers_in_exponent_form_are_numbers(file: Path):
    assert load_settings(file, overrides=["train.learning_rate=1e-5"])[1].train.learning_rate == 1e-5
