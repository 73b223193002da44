"""The plan: a change rebuilds exactly what it touches, and says why. Artifacts here are written by hand, in place."""

import json
import shutil
from pathlib import Path

import pytest

from clha.config import load_settings
from clha.digests import digest_of
from clha.errors import UserError
from clha.runs import Run
from clha.schema import SPLITS
from clha.settings import Settings
from clha.stages import chain
from clha.store import ArtifactWriter, Home

ALL = [
    "prepare", "fit_reward.train", "fit_reward.eval", "generate", "score", "weigh", "train",
    "answers.base", "answers.trained", "evaluate",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"messages": []}\n')
    return path


def settings(root: Path, data: Path, *overrides: str) -> Settings:
    return load_settings(root / "pipelines.yaml", "smoke", [f"prepare.path={data}", *overrides])[1]


def build_all(home: Home, run: Run, s: Settings, content: str = "") -> None:
    """Put an artifact with some content where each planned node's would be."""
    for _ in ALL:
        for planned in chain.plan(home, run, s):
            if planned.state == "stale":
                writer = ArtifactWriter(home, planned.node.kind, planned.key)
                writer.write_bytes("data.json", f"{planned.node.name} {planned.parts} {content}".encode())
                facts = {"key_parts": planned.parts, "settings": {}, "inputs": {}, "code_version": 1, "versions": {}}
                if planned.node.name == "prepare":
                    facts["split_contents"] = split_contents(s, content)
                writer.finish(rows_in=0, rows_out=0, facts=facts)
            if planned.key:
                run.nodes[planned.node.name] = planned.key


def split_contents(s: Settings, content: str = "") -> dict[str, str]:
    """As true ones are: they change with the seed of the splits, and each with its own limit."""
    p = s.prepare
    return {split: digest_of([p.split_seed, getattr(p.limits, split), content]) for split in SPLITS}


def states(home: Home, run: Run, s: Settings) -> dict[str, str]:
    return {p.node.name: p.state for p in chain.plan(home, run, s)}


@pytest.fixture
def built(home: Home, root: Path, data: Path) -> Run:
    run = Run("r", "smoke", {})
    build_all(home, run, settings(root, data))
    return run


def not_fresh(home: Home, run: Run, s: Settings) -> set[str]:
    return {name for name, state in states(home, run, s).items() if state != "fresh"}


def test_the_chain_has_the_nodes_of_the_contract_in_an_order_in_which_they_can_be_built(root: Path, data: Path):
    nodes = chain.nodes(settings(root, data))
    assert [n.name for n in nodes] == ALL
    for i, node in enumerate(nodes):
        assert set(node.inputs) <= {n.name for n in nodes[:i]}


def test_nothing_is_built_twice(home: Home, root: Path, data: Path, built: Run):
    assert not_fresh(home, built, settings(root, data)) == set()


@pytest.mark.parametrize(
    ("override", "touched"),
    [
        ("train.margin=0.9", {"train", "answers.trained", "evaluate"}),
        ("rescore.noise.quantile=0.4", {"weigh", "train", "answers.trained", "evaluate"}),
        ("generate.temperature=0.5", {"generate", "score", "weigh", "train", "answers.trained", "evaluate"}),
        ("evaluate.resamples=77", {"evaluate"}),
        ("evaluate.max_tokens=7", {"answers.base", "answers.trained", "evaluate"}),
        ("fit_reward.eval.l2=0.5", {"fit_reward.eval", "evaluate"}),
        ("fit_reward.eval.method=lora", {"fit_reward.eval", "evaluate"}),
        ("fit_reward.eval.lora.rank=3", set()),  # of another method
        ("fit_reward.eval.shard_size=3", set()),
        ("prepare.split_seed=5", set(ALL)),
        ("train.tokens_per_micro_batch=17", set()),
        ("train.processes=2", set()),
        ("train={processes: 2, sharding: full_shard}", set()),
        ("execution.timeout_minutes=5", set()),
        ("train.checkpoint_steps=3", set()),
        ("schedule.cron=1 1 * * *", set()),
    ],
)
def test_a_change_touches_exactly_what_depends_on_it(
    home: Home, root: Path, data: Path, built: Run, override: str, touched: set[str]
):
    assert not_fresh(home, built, settings(root, data, override)) == touched


def test_losses_of_the_dpo_family_have_a_reference_and_no_others(root: Path, data: Path):
    for loss in ("clha", "sft", "rrhf", "pro"):
        assert [n.name for n in chain.nodes(settings(root, data, f"train.loss={loss}"))] == ALL
    for loss in ("dpo", "dpo_smoothed", "dpo_robust"):
        nodes = {n.name: n for n in chain.nodes(settings(root, data, f"train.loss={loss}"))}
        assert list(nodes) == [*ALL[:6], "reference", *ALL[6:]]
        assert nodes["reference"].inputs == ("generate",) and "reference" in nodes["train"].inputs
        assert nodes["reference"].stage == "train" and nodes["reference"].kind == "reference"


@pytest.mark.parametrize(
    ("override", "touched"),
    [
        ("train.beta=0.5", {"train", "answers.trained", "evaluate"}),
        ("train.learning_rate=0.5", {"train", "answers.trained", "evaluate"}),
        ("train.loss=dpo_robust", {"train", "answers.trained", "evaluate"}),
        ("rescore.noise.quantile=0.4", {"weigh", "train", "answers.trained", "evaluate"}),
        ("train.share_prompts=false", set()),
        ("train.bf16=true", {"reference", "train", "answers.trained", "evaluate"}),
        (
            "generate.temperature=0.5",
            {"generate", "score", "weigh", "reference", "train", "answers.trained", "evaluate"},
        ),
    ],
)
def test_the_reference_is_computed_again_only_for_other_candidates_or_another_policy(
    home: Home, root: Path, data: Path, override: str, touched: set[str]
):
    run = Run("r", "smoke", {})
    build_all(home, run, settings(root, data, "train.loss=dpo"))
    assert not_fresh(home, run, settings(root, data, "train.loss=dpo", override)) == touched


def test_going_back_from_dpo_finds_what_was_built_before(home: Home, root: Path, data: Path, built: Run):
    build_all(home, built, settings(root, data, "train.loss=dpo"))
    assert "reference" in built.nodes
    assert not_fresh(home, built, settings(root, data)) == set()


def test_the_place_of_the_data_does_not_matter_its_bytes_do(home: Home, root: Path, data: Path, built: Run):
    moved = data.parent / "moved" / data.name
    moved.parent.mkdir()
    shutil.copy(data, moved)
    assert not_fresh(home, built, settings(root, moved)) == set()
    moved.write_text('{"messages": [1]}\n')
    assert states(home, built, settings(root, moved))["prepare"] == "stale"


def test_changed_code_rebuilds(home: Home, root: Path, data: Path, built: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(chain.CODE_VERSION, "weigh", 999)
    assert "weigh" in not_fresh(home, built, settings(root, data))
    assert "score" not in not_fresh(home, built, settings(root, data))


def test_the_same_content_under_another_key_saves_what_follows(home: Home, root: Path, data: Path, built: Run):
    """An artifact that comes out the same although its settings differ leaves everything after it fresh."""
    s = settings(root, data, "prepare.shard_size=9")
    planned = chain.plan(home, built, s)[0]
    assert planned.state == "stale"
    old = home.find("prepare", built.nodes["prepare"])
    writer = ArtifactWriter(home, "prepare", planned.key)
    writer.write_bytes("data.json", (old.folder / "data.json").read_bytes())
    facts = {"key_parts": planned.parts, "split_contents": old.manifest["split_contents"]}
    writer.finish(rows_in=0, rows_out=0, facts=facts)
    assert not_fresh(home, built, s) == set()


@pytest.mark.parametrize(
    ("limits", "touched"),
    [
        ("train: 3", {"generate", "score", "weigh", "train", "answers.trained", "evaluate"}),
        ("dev: 3", {"generate", "score", "weigh", "train", "answers.trained", "evaluate"}),
        ("test: 3", {"answers.base", "answers.trained", "evaluate"}),
        ("reward_train: 3", {"fit_reward.train", "score", "weigh", "train", "answers.trained", "evaluate"}),
        ("reward_eval: 3", {"fit_reward.eval", "evaluate"}),
    ],
)
def test_other_prompts_in_a_split_touch_those_that_read_it(
    home: Home, root: Path, data: Path, built: Run, limits: str, touched: set[str]
):
    s = settings(root, data, f"prepare.limits={{{limits}}}")
    (planned,) = [p for p in chain.plan(home, built, s) if p.state == "stale"]
    assert planned.node.name == "prepare"
    writer = ArtifactWriter(home, "prepare", planned.key)
    writer.write_bytes("data.json", b"other")
    writer.finish(rows_in=0, rows_out=0, facts={"split_contents": split_contents(s)})
    assert not_fresh(home, built, s) == touched
    split = limits.split(":")[0]
    stale = [p for p in chain.plan(home, built, s) if p.state == "stale"]
    whys = [line for p in stale for line in chain.why(built, home, p)]
    assert whys and all(f"inputs.prepare.{split}: " in line for line in whys)


def test_a_new_attempt_is_a_new_key_and_does_not_disturb_other_runs(home: Home, root: Path, data: Path, built: Run):
    s = settings(root, data)
    other = Run("other", "smoke", {}, dict(built.nodes))
    built.attempts["train"] = 1
    assert "train" in not_fresh(home, built, s)
    assert not_fresh(home, other, s) == set()


def test_a_damaged_artifact_is_built_again(home: Home, root: Path, data: Path, built: Run):
    (home.artifact_folder("score", built.nodes["score"]) / "data.json").unlink()
    assert states(home, built, settings(root, data))["score"] == "stale"


def test_a_taken_node_is_used_as_the_run_recorded_it(home: Home, root: Path, data: Path, built: Run):
    changed = settings(root, data, "generate.temperature=0.5")
    node = next(n for n in chain.nodes(changed) if n.name == "generate")
    taken = chain.taken_node(home, built, node)
    assert taken.key == built.nodes["generate"] and taken.state == "fresh"
    with pytest.raises(UserError, match="has no finished generate"):
        chain.taken_node(home, Run("empty", "smoke", {}), node)


def test_why_names_the_part_that_changed_with_old_and_new_value(home: Home, root: Path, data: Path, built: Run):
    planned = {p.node.name: p for p in chain.plan(home, built, settings(root, data, "train.margin=0.9"))}
    assert chain.why(built, home, planned["train"]) == ["train: settings.margin: 0.3 -> 0.9"]
    assert chain.why(built, home, planned["score"]) == ["score: up to date"]
    assert chain.why(built, home, planned["evaluate"])[0].startswith("evaluate: waits for")
    assert chain.why(Run("new", "smoke", {}), home, planned["score"]) == ["score: found under another run"]


def test_keys_are_hex_of_at_least_16_digits(built: Run):
    assert all(len(k) >= 16 and set(k) <= set("0123456789abcdef") for k in built.nodes.values())
    assert json.dumps(built.nodes)


def test_an_unknown_stage_names_those_there_are(root: Path, data: Path):
    with pytest.raises(UserError, match="no stage `trian`; there are prepare"):
        chain.select_nodes(settings(root, data), ["trian"])


def test_reward_models_that_are_given_need_no_fitting(root: Path):
    names = [n.name for n in chain.nodes(load_settings(root / "pipelines.yaml", "hh-7b")[1])]
    assert "fit_reward.train" not in names and "fit_reward.eval" not in names
