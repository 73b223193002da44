"""The chain: which nodes there are, what each reads, what makes its key, and which of them are up to date.

A key is a digest of what the output depends on: the node's own settings, the content digests of the artifacts it
reads, the digests of its models, package versions, the schema version and the stage's CODE_VERSION. Never a path.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clha.digests import digest_of
from clha.errors import UserError
from clha.models import ModelFolder, resolve_model
from clha.runs import Run
from clha.schema import SCHEMA_VERSION
from clha.settings import Settings
from clha.settings_rewards import RewardFit, RewardModel
from clha.sources.files import source_digest, weights_file_digest
from clha.stages import evaluate, fit_reward, generate, prepare, rescore, train
from clha.store import Artifact, Home, kind_of
from clha.versions import package_version

STAGES = ("prepare", "fit_reward", "generate", "rescore", "train", "evaluate")

CODE_VERSION: dict[str, int] = {
    **prepare.CODE_VERSION,
    **fit_reward.CODE_VERSION,
    **generate.CODE_VERSION,
    **rescore.CODE_VERSION,
    **train.CODE_VERSION,
    **evaluate.CODE_VERSION,
}


@dataclass(frozen=True)
class Node:
    """One artifact of the chain: who makes it and from what."""

    name: str
    stage: str
    inputs: tuple[str, ...]
    settings: dict[str, Any]  # those in the key
    models: dict[str, str] = field(default_factory=dict)  # role -> reference
    packages: tuple[str, ...] = ()  # whose versions are in the key
    splits: tuple[str, ...] = ()  # those of `prepare` that it reads

    @property
    def kind(self) -> str:
        return kind_of(self.name)


State = Literal["fresh", "stale", "waiting", "unknown"]


@dataclass(frozen=True)
class Planned:
    """A node with its key. `waiting`: its key is not known before an input is built; `unknown`: see `reason`."""

    node: Node
    state: State
    key: str | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    reason: str = ""  # why the key cannot be known now: data moved away, a server that is down


# The splits whose prompts get candidates.
_CANDIDATES = ("train", "dev")


def nodes(settings: Settings) -> list[Node]:
    """The nodes of the plain chain, in an order in which they can be built."""
    s, fit = settings, settings.fit_reward
    policy, template = {"policy": s.policy.model}, {"chat_template": s.policy.chat_template}
    chain = [Node("prepare", "prepare", (), s.prepare.key_settings())]
    if fit is not None and s.rescore.reward.uses_fitted:
        chain.append(_fit_node("train", fit.train))
    if fit is not None and s.evaluate.reward.uses_fitted:
        chain.append(_fit_node("eval", fit.eval))
    chain.append(
        Node(
            "generate",
            "generate",
            ("prepare",),
            s.generate.key_settings() | template,
            policy,
            ("vllm", "torch"),
            _CANDIDATES,
        )
    )
    score_in, score_models = _reward_inputs("rescore", s.rescore.reward, "train", fit.train if fit else None)
    chain.append(
        Node(
            "score",
            "rescore",
            ("prepare", "generate", *score_in),
            s.rescore.key_settings("rank_by", "noise", "sft_threshold"),
            score_models,
            ("torch", "transformers"),
            _CANDIDATES,
        )
    )
    weigh_in = ("fit_reward.train",) if s.rescore.sft_threshold == "fitted" else ()
    chain.append(
        Node(
            "weigh",
            "rescore",
            ("generate", "score", *weigh_in),
            s.rescore.key_settings("reward"),
        )
    )
    # What it computes depends on the policy and the candidates, not on how they are ranked or trained on.
    reference: tuple[str, ...] = ("reference",) if s.train.needs_reference else ()
    if reference:
        chain.append(
            Node("reference", "train", ("generate",), {"bf16": s.train.bf16}, policy, ("torch", "transformers"))
        )
    chain.append(
        Node(
            "train",
            "train",
            ("prepare", "generate", "score", "weigh", *reference),
            s.train.key_settings() | template,
            policy,
            ("torch", "transformers"),
            _CANDIDATES,
        )
    )
    asking = s.evaluate.key_settings("reward", "resamples", "tie", "seed") | template
    asking |= {"engine": s.generate.engine.key_settings(), "max_prompt_tokens": s.generate.max_prompt_tokens}
    asked = (s.evaluate.split,)
    chain.append(Node("answers.base", "evaluate", ("prepare",), asking, policy, ("vllm", "torch"), asked))
    chain.append(Node("answers.trained", "evaluate", ("prepare", "train"), asking, {}, ("vllm", "torch"), asked))
    eval_in, eval_models = _reward_inputs("evaluate", s.evaluate.reward, "eval", fit.eval if fit else None)
    chain.append(
        Node(
            "evaluate",
            "evaluate",
            ("prepare", "answers.base", "answers.trained", *score_in, *eval_in),
            s.evaluate.key_settings("max_tokens", "stop", "shard_size")
            | {"rescore_reward": s.rescore.reward.key_settings()},
            score_models | eval_models,
            ("torch", "transformers"),
            asked,
        )
    )
    return chain


def _fit_node(role: str, fit: RewardFit) -> Node:
    # A head's key does not name its method: it is that of the heads fitted before there was another one.
    lora = fit.method == "lora"
    unused = ("layer", "pooling", "l2", "members") if lora else ("method", "lora")
    own = fit.key_settings(*unused) | {"split": f"reward_{role}"}
    if lora and not fit.lora.curve:
        del own["lora"]["curve"]  # nor does that of a model without a learning curve speak of one
    return Node(
        f"fit_reward.{role}",
        "fit_reward",
        ("prepare",),
        own,
        {"encoder": fit.encoder},
        ("torch", "transformers", "peft") if lora else ("torch", "transformers"),
        (f"reward_{role}",),
    )


def _reward_inputs(
    user: str, reward: RewardModel, role: str, fit: RewardFit | None
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The node and the model folders that a reward model needs: ("fit_reward.train",), {"rescore.reward": ...}."""
    models: dict[str, str] = {}
    for name, part in reward.parts(f"{user}.reward").items():
        own = fit.encoder if part.type == "fitted" and fit is not None else part.model
        assert own is not None  # checked by Settings
        models[name] = own
        if part.encoder is not None:
            models[f"{name}.encoder"] = part.encoder
    return (f"fit_reward.{role}",) if reward.uses_fitted else (), models


def _scorers(settings: Settings, node: Node) -> dict[str, RewardModel]:
    """The reward models that a node loads, by role."""
    users = {"score": ("rescore",), "evaluate": ("rescore", "evaluate")}.get(node.name, ())
    return {role: part for u in users for role, part in getattr(settings, u).reward.parts(f"{u}.reward").items()}


def _served(settings: Settings, node: Node) -> dict[str, dict[str, str]]:
    """What the servers among a node's reward models serve, by role. Raises UserError when one does not answer."""
    urls = {role: part.url for role, part in _scorers(settings, node).items() if part.url is not None}
    if not urls:
        return {}
    from clha.servers import served_identity

    return {role: served_identity(url, "reward model: url", "set the reward model's url") for role, url in urls.items()}


def _check_heads(settings: Settings, node: Node, models: Mapping[str, ModelFolder]) -> None:
    """Raises UserError where a head was fitted on another encoder than the one that is given."""
    for role, part in _scorers(settings, node).items():
        if part.type == "encoder_head":
            from clha.rewards.head import check_encoder

            check_encoder(models[role].path, models[f"{role}.encoder"].digest, role)


def select_nodes(settings: Settings, stages: Iterable[str] = STAGES) -> list[Node]:
    """The nodes that the given stages build. Raises UserError for a stage that does not exist."""
    wanted = set(stages)
    unknown = sorted(wanted - set(STAGES))
    if unknown:
        raise UserError(f"no stage `{unknown[0]}`; there are {', '.join(STAGES)}")
    return [n for n in nodes(settings) if n.stage in wanted]


def plan_node(home: Home, run: Run, settings: Settings, node: Node, inputs: Mapping[str, Artifact]) -> Planned:
    """The key of one node from the finished artifacts that it reads, and whether it is built already."""
    models = {role: resolve_model(ref, home) for role, ref in node.models.items()}
    _check_heads(settings, node, models)
    parts: dict[str, Any] = {
        "kind": node.kind,
        "schema_version": SCHEMA_VERSION,
        "code_version": CODE_VERSION[node.kind],
        "settings": node.settings,
        "inputs": {name: inputs[name].content_of(node.splits) for name in node.inputs},
        "models": {role: model.digest for role, model in models.items()},
        "versions": {name: package_version(name) for name in node.packages},
        "attempt": run.attempts.get(node.name, 0),
    }
    if node.name == "prepare":
        parts["source"] = source_digest(settings.prepare, home)
    engine = settings.generate.engine
    if engine.mode == "server" and node.name in ("generate", "answers.base"):
        from clha.servers import served_identity

        assert engine.url is not None  # checked by Settings
        parts["server"] = served_identity(engine.url, "generate.engine.url", "set generate.engine.mode: in_process")
    if servers := _served(settings, node):
        parts["reward_servers"] = servers
    if node.kind == "weigh" and settings.rescore.noise.file is not None:
        parts["weights_file"] = weights_file_digest(settings.rescore.noise.file, home)
    key = digest_of(parts)[:24]
    artifact = home.find(node.kind, key)
    return Planned(node, "fresh" if artifact else "stale", key, parts, artifact)


def plan(home: Home, run: Run, settings: Settings) -> list[Planned]:
    """All nodes of the chain with their keys and states, for those who only look.

    A node whose key cannot be known now is `unknown`; what follows is planned with its recorded artifact.
    """
    done: dict[str, Artifact] = {}
    planned: list[Planned] = []
    for node in nodes(settings):
        if all(name in done for name in node.inputs):
            try:
                entry = plan_node(home, run, settings, node, done)
            except UserError as error:
                recorded = home.find(node.kind, run.nodes.get(node.name, ""))
                entry = Planned(node, "unknown", artifact=recorded, reason=str(error))
        else:
            entry = Planned(node, "waiting")
        if entry.artifact is not None:
            done[node.name] = entry.artifact
        planned.append(entry)
    return planned


def taken_node(home: Home, run: Run, node: Node) -> Planned:
    """A node as the run recorded it. Raises UserError when the run has none, or its artifact is gone."""
    key = run.nodes.get(node.name)
    artifact = home.find(node.kind, key) if key else None
    if artifact is None:
        raise UserError(f"run {run.name} has no finished {node.name}; build it with --from {node.stage} or a plain run")
    return Planned(node, "fresh", key, artifact.manifest.get("key_parts", {}), artifact)


def why(run: Run, home: Home, planned: Planned) -> list[str]:
    """One line for each part of the key that differs from what the run recorded, old and new value."""
    name = planned.node.name
    old_key = run.nodes.get(name)
    if planned.state == "unknown":
        return [f"{name}: cannot be told, {planned.reason}"]
    if planned.state == "waiting":
        return [f"{name}: waits for {', '.join(planned.node.inputs)}"]
    if old_key is None:
        return [f"{name}: {'found under another run' if planned.artifact else 'was never built in this run'}"]
    old = home.find_any(planned.node.kind, old_key)
    if old is None:
        return [f"{name}: its artifact {old_key} is gone"]
    if old_key == planned.key:
        damage = old.damage()
        return [f"{name}: up to date" if damage is None else f"{name}: damaged, {damage}"]
    before, after = _flat(old.manifest.get("key_parts", {})), _flat(planned.parts)
    changed = [p for p in sorted(before.keys() | after.keys()) if before.get(p) != after.get(p)]
    return [f"{name}: {part}: {_short(before.get(part))} -> {_short(after.get(part))}" for part in changed]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
