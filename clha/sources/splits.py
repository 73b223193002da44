"""Which split a prompt belongs to: decided by its first user turn alone, so it never moves."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from clha.digests import unit_of
from clha.errors import StageFailure
from clha.settings import Splits


def first_user_turn(messages: Iterable[Mapping[str, str]]) -> str:
    """The content of the first user turn; "" where there is none."""
    return next((m["content"] for m in messages if m["role"] == "user"), "")


def split_of(first_turn: str, has_pair: bool, shares: Splits, seed: int) -> str:
    """The split of all prompts that begin with `first_turn`; `has_pair`: one of them has a preference pair.

    Two independent draws in [0, 1): the first takes pairs for the reward models, the second divides the rest, so
    that a first turn which gains or loses its pair moves between the reward splits and the others, but never among
    train, dev and test.
    """
    reward, policy = unit_of(seed, "reward", first_turn), unit_of(seed, "policy", first_turn)
    if has_pair and reward < shares.reward_train:
        return "reward_train"
    if has_pair and reward < shares.reward_train + shares.reward_eval:
        return "reward_eval"
    if policy < shares.train:
        return "train"
    return "dev" if policy < shares.train + shares.dev else "test"


def limit_order(prompt_id: str) -> str:
    """The order in which a limit keeps prompts: by the digest of the id, so that a larger limit only adds."""
    return hashlib.sha256(prompt_id.encode()).hexdigest()


class SplitCheck:
    """Sees every row that is written and raises when a first user turn lies in two splits."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def add(self, messages: Sequence[Mapping[str, str]], split: str) -> None:
        """Raises StageFailure when these messages begin like those of a prompt in another split."""
        digest = hashlib.sha256(first_user_turn(messages).encode()).digest()[:16]
        other = self._seen.setdefault(digest, split)
        if other != split:
            raise StageFailure(
                f"prepare: one first user turn lies in {other} and in {split} (digest {digest.hex()}); an evaluation "
                "prompt must never be trained on"
            )
