"""A first user turn stays in its split whatever else happens to the data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clha.digests import unit_of
from clha.errors import StageFailure
from clha.settings import Splits
from clha.sources.splits import SplitCheck, first_user_turn, split_of

SHARES = Splits(train=0.6, dev=0.1, test=0.3, reward_train=0.3, reward_eval=0.3)
FIRSTS = [f"question {i}" for i in range(4000)]


@pytest.mark.parametrize("has_pair", [True, False])
def test_the_shares_are_kept(has_pair: bool):
    """4,000 first turns; without a pair train 0.6, dev 0.1, test 0.3, with one each of them times 1 - 0.6."""
    splits = [split_of(first, has_pair, SHARES, 0) for first in FIRSTS]
    rest = 0.4 if has_pair else 1.0
    expected = {"train": 0.6 * rest, "dev": 0.1 * rest, "test": 0.3 * rest}
    expected |= {"reward_train": 0.3, "reward_eval": 0.3} if has_pair else {}
    for split, share in expected.items():
        assert splits.count(split) / len(FIRSTS) == pytest.approx(share, abs=0.025), split
    assert set(splits) == set(expected)


def test_the_rule_is_the_documented_one():
    """u1 below 0.3 is reward_train, below 0.6 reward_eval, else u2 below 0.6 train, below 0.7 dev, else test."""
    for first in FIRSTS[:300]:
        u1, u2 = unit_of(0, "reward", first), unit_of(0, "policy", first)
        plain = "train" if u2 < 0.6 else "dev" if u2 < 0.7 else "test"
        assert split_of(first, False, SHARES, 0) == plain
        assert split_of(first, True, SHARES, 0) == (
            "reward_train" if u1 < 0.3 else "reward_eval" if u1 < 0.6 else plain
        )


@given(st.text(), st.integers(0, 5))
def test_gaining_a_pair_never_moves_a_first_turn_among_train_dev_and_test(first: str, seed: int):
    without, with_pair = (split_of(first, has_pair, SHARES, seed) for has_pair in (False, True))
    assert with_pair in (without, "reward_train", "reward_eval")


@given(st.text(), st.floats(0, 0.45), st.floats(0, 0.45))
def test_other_reward_shares_never_move_a_first_turn_among_train_dev_and_test(first: str, a: float, b: float):
    shares = SHARES.model_copy(update={"reward_train": a, "reward_eval": b})
    assert split_of(first, True, shares, 0) in (split_of(first, False, SHARES, 0), "reward_train", "reward_eval")


def test_another_seed_is_another_division():
    assert [split_of(f, False, SHARES, 0) for f in FIRSTS] != [split_of(f, False, SHARES, 1) for f in FIRSTS]


def test_the_first_user_turn_is_not_the_system_turn():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "user", "content": "v"}]
    assert first_user_turn(turns) == "u"


def test_one_first_turn_in_two_splits_is_an_error():
    check = SplitCheck()
    check.add([{"role": "user", "content": "a"}], "train")
    check.add([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "train")
    check.add([{"role": "user", "content": "b"}], "test")
    with pytest.raises(StageFailure, match="one first user turn lies in train and in test"):
        check.add([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "test")
