"""The Arrow schemas of all tables, with one version for all of them. Meaning of each column: docs/data-formats.md."""

import pyarrow as pa

SCHEMA_VERSION = 1

SPLITS = ("train", "dev", "test", "reward_train", "reward_eval")

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("subset", pa.string()),
        ("split", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("chosen", pa.list_(pa.string())),
        ("rejected", pa.list_(pa.string())),
    ]
)

QUARANTINE = pa.schema([("prompt_id", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

CANDIDATES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("candidate_id", pa.int32()),
        ("origin", pa.string()),
        ("text", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("response_logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("truncated_turns", pa.int32()),
        ("seed", pa.int64()),
        ("generator", pa.string()),
    ]
)

REWARDS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("candidate_id", pa.int32()),
        ("reward", pa.float64()),
        ("member_rewards", pa.list_(pa.float64())),
        ("truncated", pa.bool_()),
    ]
)

WEIGHTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("order", pa.list_(pa.int32())),
        ("pair_weights", pa.list_(pa.list_(pa.float32()))),
        ("sft_index", pa.int32()),
        ("sft_lambda", pa.float32()),
        ("flags", pa.list_(pa.string())),
    ]
)

REFERENCE = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("candidate_id", pa.int32()),
        ("logp", pa.float64()),  # of the whole response, under the policy before training
    ]
)

ANSWERS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("text", pa.string()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("response_token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("truncated_turns", pa.int32()),
        ("policy", pa.string()),
    ]
)

SCORES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("policy", pa.string()),
        ("reward", pa.float64()),  # by the reward model that training never saw
        ("length", pa.int32()),
        ("training_reward", pa.float64()),  # by the one that rescoring used
        ("truncated", pa.bool_()),  # for either of the two
    ]
)

# The columns of `metrics`: `step` int64, then the float64 metrics that the training loop logged.
