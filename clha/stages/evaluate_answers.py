"""Greedy answers of one policy to the held-out prompts: the nodes `answers.base` and `answers.trained`."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from clha.schema import ANSWERS

if TYPE_CHECKING:
    from clha.chat import EncodedPrompt
    from clha.generation.requests import Result
    from clha.stages.work import Work
    from clha.store import Artifact


def build_answers(work: "Work") -> "Artifact":
    """One greedy answer to each prompt of the split `evaluate.split`, an empty one too; shard by shard, resumable.

    The trained policy is always loaded into this process: a server has the base policy.
    """
    from clha.chat import load_chat
    from clha.generation.candidates import checked_samples, finished_response
    from clha.generation.engine import open_engine
    from clha.generation.requests import Sampling
    from clha.generation.sharded import Plan, generate_shards

    settings, generate = work.settings.evaluate, work.settings.generate
    policy = work.node.rsplit(".", 1)[-1]
    engine = generate.engine
    if policy == "trained":
        folder = work.inputs[next(n for n in work.inputs if n.rsplit("/", 1)[-1] == "train")].folder / "model"
        engine = engine.model_copy(update={"mode": "in_process"})
    else:
        folder = work.models["policy"]
    prompts = [p for p in work.inputs["prepare"].rows("prompts") if p["split"] == settings.split]
    prompts.sort(key=lambda p: str(p["prompt_id"]))
    chat = load_chat(folder, work.settings.policy.chat_template)
    sampling = Sampling(
        n=1,
        temperature=0.0,
        top_p=1.0,
        max_tokens=settings.max_tokens,
        stop=tuple(settings.stop),
        stop_token_ids=tuple(sorted(chat.special_ids)),
    )

    def rows(
        prompt: dict[str, Any], encoded: "EncodedPrompt", result: "Result", counts: Counter[str]
    ) -> list[dict[str, Any]]:
        (sample,) = checked_samples(result.samples, 1)
        response = finished_response(chat, sample, settings.stop)
        counts[f"finish_{response.finish_reason}"] += 1
        counts["empty_responses"] += not response.text.strip()
        return [
            {
                "prompt_id": prompt["prompt_id"],
                "text": response.text,
                "prompt_token_ids": encoded.token_ids,
                "response_token_ids": response.token_ids,
                "finish_reason": response.finish_reason,
                "truncated_turns": encoded.truncated_turns,
                "policy": policy,
            }
        ]

    plan = Plan(
        "answers",
        ANSWERS,
        prompts,
        settings.shard_size,
        generate.max_prompt_tokens,
        settings.max_tokens,
        lambda prompt_id: None,  # greedy
        ("empty_responses",),
    )
    done = generate_shards(
        work.writer,
        work.progress,
        plan,
        chat,
        lambda: open_engine(folder, engine, sampling, settings.seed, work.progress),
        rows,
    )
    work.check_quarantine(len(prompts), generate.max_quarantined, "generate.max_quarantined")
    return work.finish(rows_in=len(prompts), rows_out=done.rows_out, seed=None, **done.manifest_fields())
