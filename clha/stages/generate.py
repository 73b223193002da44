"""Stage `generate`: candidates for the prompts of train and dev."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from clha.digests import seed_of
from clha.schema import CANDIDATES

if TYPE_CHECKING:
    from clha.chat import EncodedPrompt
    from clha.generation.requests import Result
    from clha.stages.work import Work
    from clha.store import Artifact

CODE_VERSION = {"generate": 3}


def build(work: "Work") -> "Artifact":
    """Sample `generate.n` responses to each prompt; one row per distinct candidate."""
    from clha.chat import load_chat
    from clha.generation.candidates import (
        COUNTED,
        candidate_rows,
        checked_samples,
        dataset_responses,
        finished_response,
    )
    from clha.generation.engine import open_engine
    from clha.generation.requests import Sampling
    from clha.generation.sharded import Plan, generate_shards

    settings = work.settings.generate
    folder, digest = work.models["policy"], str(work.parts["models"]["policy"])
    prompts = [p for p in work.inputs["prepare"].rows("prompts") if p["split"] in ("train", "dev")]
    prompts.sort(key=lambda p: str(p["prompt_id"]))
    chat = load_chat(folder, work.settings.policy.chat_template)
    sampling = Sampling(
        n=settings.n,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop=tuple(settings.stop),
        stop_token_ids=tuple(sorted(chat.special_ids)),
    )
    version = work.parts["server"]["version"] if "server" in work.parts else work.parts["versions"]["vllm"]
    generator = f"vllm {version} policy {digest[:12]}"

    def seed(prompt_id: str) -> int:
        return seed_of(settings.seed, prompt_id)

    def rows(
        prompt: dict[str, Any], encoded: "EncodedPrompt", result: "Result", counts: Counter[str]
    ) -> list[dict[str, Any]]:
        samples = checked_samples(result.samples, settings.n)
        return candidate_rows(
            prompt["prompt_id"],
            encoded,
            [finished_response(chat, s, settings.stop) for s in samples],
            dataset_responses(chat, prompt, settings.include, counts),
            seed=seed(prompt["prompt_id"]),
            generator=generator,
            source=prompt["source"],
            counts=counts,
        )

    plan = Plan(
        "candidates",
        CANDIDATES,
        prompts,
        settings.shard_size,
        settings.max_prompt_tokens,
        settings.n * settings.max_tokens,
        seed,
        COUNTED,
    )
    done = generate_shards(
        work.writer,
        work.progress,
        plan,
        chat,
        lambda: open_engine(folder, settings.engine, sampling, settings.seed, work.progress),
        rows,
    )
    work.check_quarantine(len(prompts), settings.max_quarantined, "generate.max_quarantined")
    return work.finish(rows_in=len(prompts), rows_out=done.rows_out, seed=settings.seed, **done.manifest_fields())
