"""Samples to candidates: where a response ends, which candidates are the same, and those that the data brought."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clha.chat import Chat, EncodedPrompt, Unusable
from clha.generation.requests import Sample

# What is counted while candidates are made.
COUNTED = ("merged_candidates", "empty_responses", "unusable_dataset_responses")


@dataclass(frozen=True)
class Response:
    """A response as it is stored. `logprobs` are None where the policy did not generate it."""

    token_ids: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: str  # eos, stop_string, length or dataset


def finished_response(chat: Chat, sample: Sample, stop: Sequence[str]) -> Response:
    """Where a sampled response ends, and why; its ids, log-probabilities and text are cut together.

    EOS, or the token that ends a turn in the chat template, ends it as `eos` and stays in the ids; another special
    token ends it as `stop_string` and does not. A stop string leaves the longest run of whole tokens before it; then
    the text is what those tokens spell.
    """
    ids, reason = sample.token_ids, "length" if sample.finish_reason == "length" else "stop_string"
    end = next((k for k, i in enumerate(ids) if i in chat.special_ids), None)
    if end is not None:
        reason = "eos" if ids[end] in (chat.eos_id, chat.end_id) else "stop_string"
        ids = ids[: end + 1] if reason == "eos" else ids[:end]
    text = chat.decode(ids)
    match = min((at for s in stop if (at := text.find(s)) >= 0), default=-1)
    if match >= 0:
        reason = "stop_string"
        ids, text = _before(chat, ids, text, match)
    return Response(ids, sample.logprobs[: len(ids)], text, reason)


def _before(chat: Chat, ids: list[int], text: str, match: int) -> tuple[list[int], str]:
    """The longest prefix of `ids` that spells a prefix of text[:match], and what it spells."""
    wanted = text[:match]
    for k in range(len(ids) - 1, 0, -1):
        spelled = chat.decode(ids[:k])
        # Half of a character decodes to a replacement sign, which is no prefix.
        if len(spelled) <= match and wanted.startswith(spelled):
            return ids[:k], spelled
    return [], ""


def checked_samples(samples: Sequence[Sample], n: int) -> Sequence[Sample]:
    """The samples of one prompt.

    Raises Unusable: `wrong_sample_count`, `invalid_logprobs` (not finite, or not one for each token).
    """
    if len(samples) != n:
        raise Unusable("wrong_sample_count", f"the engine returned {len(samples)} samples, {n} were asked for")
    for k, sample in enumerate(samples):
        if len(sample.logprobs) != len(sample.token_ids) or not all(map(math.isfinite, sample.logprobs)):
            raise Unusable("invalid_logprobs", f"the log-probabilities of sample {k} are not finite, or not complete")
    return samples


def dataset_responses(
    chat: Chat, prompt: Mapping[str, Any], include: Iterable[str], counts: Counter[str]
) -> list[tuple[str, Response]]:
    """The responses that the data has for a prompt, as (origin, response), in the order of `include`.

    `include`: columns of the prompts table ("chosen", "rejected"). Those that cannot be spelled, or hold a turn of
    their own, are counted as `unusable_dataset_responses`.
    """
    responses = []
    for column in include:
        for text in prompt[column]:
            try:
                chat.check_markers([text])
                encoded = chat.encode_response(text)
            except Unusable:
                counts["unusable_dataset_responses"] += 1
                continue
            responses.append((f"dataset_{column}", Response(encoded.token_ids, None, encoded.text, "dataset")))
    return responses


def candidate_rows(
    prompt_id: str,
    prompt: EncodedPrompt,
    generated: Sequence[Response],
    from_data: Sequence[tuple[str, Response]],
    *,
    seed: int,
    generator: str,
    source: str,
    counts: Counter[str],
) -> list[dict[str, Any]]:
    """Rows of `candidates` for one prompt, generated ones first.

    Empty ones are dropped. Of candidates with the same text one is kept: the data's before a generated one, since it
    carries the label. `counts` gets `empty_responses`, `merged_candidates`, `finish_<reason>` (generated ones).
    Raises Unusable `no_response` when none is left.
    """
    labelled: dict[str, tuple[str, Response]] = {}
    for origin, response in from_data:
        if response.text in labelled:
            counts["merged_candidates"] += 1
        labelled.setdefault(response.text, (origin, response))
    kept: dict[str, Response] = {}
    for response in generated:
        counts[f"finish_{response.finish_reason}"] += 1
        if not response.text.strip():
            counts["empty_responses"] += 1
        elif response.text in kept or response.text in labelled:
            counts["merged_candidates"] += 1
        else:
            kept[response.text] = response
    ordered = [("generated", r) for r in kept.values()] + list(labelled.values())
    if not ordered:
        raise Unusable("no_response", f"all {len(generated)} responses are empty")
    return [
        {
            "prompt_id": prompt_id,
            "candidate_id": k,
            "origin": origin,
            "text": response.text,
            "prompt_token_ids": prompt.token_ids,
            "response_token_ids": response.token_ids,
            "response_logprobs": response.logprobs,
            "finish_reason": response.finish_reason,
            "truncated_turns": prompt.truncated_turns,
            "seed": seed if origin == "generated" else None,
            "generator": generator if origin == "generated" else f"dataset {source}",
        }
        for k, (origin, response) in enumerate(ordered)
    ]
