"""Ids and seeds depend on content only."""

import hashlib

from clha.digests import canonical_json, digest_of, prompt_id, seed_of, unit_of


def test_prompt_id_is_the_documented_digest():
    text = '[{"content":"Grüße, 你好","role":"user"}]'
    assert prompt_id([{"role": "user", "content": "Grüße, 你好"}]) == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_prompt_id_ignores_other_fields_and_their_order():
    assert prompt_id([{"content": "a", "role": "user", "name": "x"}]) == prompt_id([{"role": "user", "content": "a"}])


def test_prompt_id_survives_lone_surrogates():
    assert len(prompt_id([{"role": "user", "content": "\ud800"}])) == 32


def test_canonical_json_has_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1, {"d": None, "c": "ü"}]}) == '{"a":[1,{"c":"ü","d":null}],"b":1}'
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_seeds_fit_31_bits_and_differ_by_part():
    seeds = {seed_of(0, f"p{i}") for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**31 for s in seeds)
    assert seed_of(0, "p") == seed_of(0, "p") != seed_of(1, "p")


def test_unit_numbers_are_spread_over_zero_to_one():
    units = [unit_of("s", i) for i in range(2000)]
    assert 0 <= min(units) and max(units) < 1
    assert abs(sum(u < 0.3 for u in units) / 2000 - 0.3) < 0.05
