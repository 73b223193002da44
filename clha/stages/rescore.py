"""Rescoring: the nodes `score` (rewards of all candidates) and `weigh` (what pairs and responses count for)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clha.errors import UserError
from clha.store import Artifact

if TYPE_CHECKING:
    from clha.rewards.weighing import RewardTable
    from clha.settings_rewards import RewardModel
    from clha.stages.work import Work

CODE_VERSION = {"score": 4, "weigh": 3}

# Rewards are exact to 1e-5: a model whose rewards lie closer together than that says nothing.
_CONSTANT = 1e-5


def build(work: Work) -> Artifact:
    """Build `score` or `weigh`."""
    return score(work) if work.node.rsplit("/", 1)[-1] == "score" else weigh(work)


def score(work: Work) -> Artifact:
    """Reward of every candidate; shards that are there already are kept.

    Raises UserError when there are no candidates, the reward model gives all of them the same reward, or too many
    rewards are not finite.
    """
    from clha.rewards.adapters import model_folders
    from clha.stages.scoring import Scoring, score_shards

    rescore, writer = work.settings.rescore, work.writer
    total = sum(f["rows"] for f in work.inputs["generate"].manifest["files"] if f["name"].startswith("candidates-"))
    if not total:
        raise UserError(f"{work.node}: there are no candidates; see the reasons in the quarantine of generate")
    scoring = Scoring(
        rescore.reward,
        model_folders(work.models, "rescore.reward"),
        work.inputs["fit_reward.train"].folder if rescore.reward.uses_fitted else None,
        work.inputs["prepare"],
        work.inputs["generate"],
        rescore.shard_size,
        total,
        writer,
    )
    done = score_shards(scoring, rescore.processes, work.progress)
    work.check_quarantine(total, rescore.max_quarantined, "rescore.max_quarantined")
    facts = _reward_facts(work)
    if done.candidates:
        facts |= {
            "padding_fraction": round(done.padded / done.tokens, 4) if done.tokens else 0.0,
            "tokens_per_second": round(done.tokens / done.seconds, 1) if done.seconds else None,
            "candidates_per_second": round(done.candidates / done.seconds, 2) if done.seconds else None,
        }
    return work.finish(rows_in=total, rows_out=facts["scored"], seed=None, device=done.devices, **facts)


def _reward_facts(work: Work) -> dict[str, Any]:
    """Mean, spread and truncation of all rewards. Raises UserError when they are all the same, or a member's are."""
    import numpy as np

    table = work.writer.read("rewards", ["reward", "member_rewards", "truncated"])
    rewards = table["reward"].to_numpy()
    if len(rewards) > 1:
        members = table["member_rewards"].combine_chunks().flatten().to_numpy().reshape(len(rewards), -1)
        constant = np.flatnonzero(np.ptp(members, axis=0) < _CONSTANT)
        if np.ptp(rewards) < _CONSTANT or len(constant):
            member = int(constant[0]) if len(constant) and members.shape[1] > 1 else None
            same = rewards[0] if member is None else members[0, member]
            raise UserError(
                f"{work.node}: {_name_of(work.settings.rescore.reward, member)} gives all {len(rewards)} candidates "
                f"the same reward ({same:g}); it cannot rank anything: set rescore.reward to another one"
            )
    return {
        "scored": len(rewards),
        "reward_mean": float(rewards.mean()) if len(rewards) else None,
        "reward_std": float(rewards.std()) if len(rewards) else None,
        "truncated": int(table["truncated"].to_numpy().sum()),
    }


def _name_of(reward: RewardModel, member: int | None) -> str:
    """A reward model, or one of those that make it up, for an error."""
    if member is None:
        return "the reward model"
    if reward.type == "ensemble":
        model = reward.members[member]
        return f"rescore.reward.members[{member}] ({model.model or model.type})"
    return f"head {member + 1} of the reward model"


def weigh(work: Work) -> Artifact:
    """Order, pair weights and lambda of every prompt, from stored rewards."""
    from clha.rewards.labels import judge_labels, label_facts
    from clha.rewards.rules import make_rule
    from clha.rewards.scoring import in_chunks
    from clha.rewards.trust import label_trust
    from clha.rewards.weighing import Totals, weigh_shard

    rescore, writer = work.settings.rescore, work.writer
    table = _scored(work)
    if rescore.rank_by == "label" and not (table.label == 1).any():
        raise UserError(
            "weigh: rescore.rank_by is label, but no chosen response has a reward; set generate.include to "
            "[chosen, rejected]"
        )
    threshold = _threshold(work)
    trust = label_trust(table, rescore.noise)
    rule, facts = make_rule(table, rescore.noise, rescore.rank_by, threshold, trust)
    writer.write_quarantine(
        0, [{"prompt_id": p, "reason": "no scored candidate", "detail": ""} for p in table.unscored]
    )
    labels = judge_labels(table, trust, rescore.noise, rescore.rank_by)
    if labels.num_rows:
        writer.write_shard("labels", 0, labels)
        facts |= label_facts(labels)
    totals = Totals()
    for index, prompts in enumerate(in_chunks(table.prompts, rescore.shard_size)):
        shard = weigh_shard(table, prompts, rescore.rank_by, rule, totals)
        if not writer.has_shard("weights", index):
            writer.write_shard("weights", index, shard)
        work.progress.update(prompts.stop, table.prompts, "prompts")
    facts |= totals.facts() | trust.facts | {"sft_threshold": threshold}
    return work.finish(
        rows_in=table.prompts + len(table.unscored), rows_out=table.prompts, seed=None, device="cpu", **facts
    )


def _scored(work: Work) -> RewardTable:
    """All rewards joined with the candidates; what was read for it is let go.

    Raises UserError when no candidate has a reward.
    """
    from clha.rewards.weighing import reward_table

    candidates = work.inputs["generate"].read("candidates", ["prompt_id", "candidate_id", "origin"])
    rewards = work.inputs["score"].read("rewards")
    if not rewards.num_rows:
        raise UserError(
            f"weigh: none of the {candidates.num_rows} candidates has a reward; see the reasons in the quarantine of "
            "score"
        )
    return reward_table(candidates, rewards)


def _threshold(work: Work) -> float:
    """The reward above which a best response is worth imitating."""
    from clha.rewards.head import fitted_config

    threshold = work.settings.rescore.sft_threshold
    if threshold == "fitted":
        return float(fitted_config(work.inputs["fit_reward.train"].folder / "reward_model")["threshold"])
    return float(threshold)
