"""The server adapter against a real vLLM pooling server, and against servers that fail."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from reward_cases import candidate_row, node_work, prompt_row, settings, write_candidates, write_prompts

from clha import servers
from clha.errors import StageFailure, TransientFailure, UserError
from clha.process import end_group
from clha.rewards import server as adapter
from clha.rewards.adapters import load_scorer
from clha.rewards.texts import RewardInput
from clha.runs import Run
from clha.settings_rewards import RewardModel
from clha.stages import rescore
from clha.stages.chain import nodes, plan_node
from clha.store import Home


def classifier(tiny_model: Path, folder: Path, seed: int = 0) -> Path:
    """A random Llama with one output, on the tiny model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tiny_model, tmp_path_factory.mktemp("served") / "reward-model")


@pytest.fixture(scope="session")
def url(reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server with that model, on a free port; it takes about 40 s to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(reward_model)]
    command += ["--runner", "pooling", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            end_group(server)


def _wait(health: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 480
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(health, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


WORDS = ["tea", "rain", "kind", "rude", "whatever", "gladly"]


def inputs(count: int) -> list[RewardInput]:
    """Questions with responses of 1 to 24 words."""
    draw = random.Random(0)
    return [
        RewardInput(
            [{"role": "user", "content": f"Question {i}? {' '.join(draw.choices(WORDS, k=i % 7))}"}],
            " ".join(draw.choices(WORDS, k=draw.randint(1, 24))),
        )
        for i in range(count)
    ]


def asks(url: str, **changes: Any) -> RewardModel:
    return RewardModel(**({"type": "server", "model": "m", "url": url, "max_tokens": 400} | changes))


@pytest.mark.slow
def test_a_server_gives_the_rewards_of_the_same_model_in_process(reward_model: Path, url: str) -> None:
    items = inputs(9)
    local = RewardModel(type="sequence_classification", model="m", max_tokens=400)
    heard: list[int] = []
    found = load_scorer(asks(url, tokens_per_batch=300), reward_model, None, "cpu").score(items, heard.append)
    expected = load_scorer(local, reward_model, None, "cpu").score(items)
    assert np.abs(found.rewards - expected.rewards).max() < 1e-4
    assert heard[-1] == len(items)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_rewards_of_a_server_do_not_depend_on_batches_order_or_neighbours(
    reward_model: Path, url: str, seed: int
) -> None:
    items, draw = inputs(24), random.Random(seed)
    whole = load_scorer(asks(url, tokens_per_batch=100_000), reward_model, None, "cpu").score(items)
    order = list(range(len(items)))
    draw.shuffle(order)
    some = order[: draw.randint(1, len(items))]
    part = load_scorer(asks(url, tokens_per_batch=draw.randint(30, 3000)), reward_model, None, "cpu")
    found = part.score([items[i] for i in some]).rewards
    assert np.abs(found - whole.rewards[some]).max() < 1e-5
    assert np.ptp(whole.rewards) > 1e-3


@pytest.mark.slow
def test_a_server_with_another_model_is_refused(tiny_model: Path, url: str, tmp_path: Path) -> None:
    """Of the same architecture, size and name: only the weights differ."""
    other = classifier(tiny_model, tmp_path / "reward-model", seed=1)
    with pytest.raises(UserError, match=f"serves .*, which is not its model {other}"):
        load_scorer(asks(url), other, None, "cpu")


@pytest.mark.slow
def test_a_server_with_too_short_a_context_is_refused(reward_model: Path, url: str) -> None:
    with pytest.raises(UserError, match="max_tokens is 600, but .* was started with 512; lower one or raise the other"):
        load_scorer(asks(url, max_tokens=600), reward_model, None, "cpu")


@contextmanager
def answering(answers: dict[str, Any]) -> Iterator[str]:
    """The URL of a server that gives these answers (path -> JSON) and 404 for all other paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path)
            self.send_response(200 if found is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def serving(root: Path | str, name: str = "judge", version: str = "0.32.0") -> dict[str, Any]:
    """What a vLLM server says of itself."""
    return {
        "/v1/models": {"data": [{"id": name, "root": str(root), "max_model_len": 1024}]},
        "/version": {"version": version},
    }


def test_what_a_server_serves_is_checked_before_anything_is_asked(
    tiny_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    other = classifier(tiny_model, tmp_path / "reward-model", seed=1)
    copied = tmp_path / "copy"
    shutil.copytree(reward_model, copied)
    for root in (reward_model, copied, "/elsewhere/of/the/server"):
        with answering(serving(root)) as url:
            load_scorer(asks(url), reward_model, None, "cpu")
    with answering(serving(other)) as url, pytest.raises(UserError, match="which is not its model"):
        load_scorer(asks(url), reward_model, None, "cpu")


def score_key(home: Home, model: Path, *reward: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Key and its parts of `score` with that reward model, or an ensemble of several."""
    own = [{"type": "server", "model": str(model)} | r for r in reward]
    tree = own[0] if len(own) == 1 else {"type": "ensemble", "members": own}
    chain = settings(rescore={"reward": tree, "sft_threshold": 0.0})
    node = next(n for n in nodes(chain) if n.name == "score")
    inputs = {"prepare": write_prompts(home, []), "generate": write_candidates(home, [])}
    planned = plan_node(home, Run("r", "p", {}), chain, node, inputs)
    return planned.key, planned.parts


def test_what_a_server_serves_is_in_the_key_and_where_it_listens_is_not(home: Home, reward_model: Path) -> None:
    with answering(serving("/models/a", "/models/judge")) as one, answering(serving("/b", "/b/judge")) as same:
        key, parts = score_key(home, reward_model, {"url": one})
        assert parts["reward_servers"] == {"rescore.reward": {"model": "judge", "version": "0.32.0"}}
        assert score_key(home, reward_model, {"url": same})[0] == key
        _, parts = score_key(home, reward_model, {"url": one}, {"url": same})
        assert parts["reward_servers"].keys() == {"rescore.reward.0", "rescore.reward.1"}
    for other in (serving("/b", "another"), serving("/b", "judge", "0.33.0")):
        with answering(other) as url:
            assert score_key(home, reward_model, {"url": url})[0] != key


def test_a_node_without_a_server_asks_for_none(home: Home, reward_model: Path) -> None:
    _, parts = score_key(home, reward_model, {"type": "sequence_classification"})
    assert "reward_servers" not in parts


def test_a_server_that_is_down_is_said_when_the_run_is_planned(home: Home, reward_model: Path) -> None:
    with pytest.raises(UserError, match="127.0.0.1:9/v1/models: no answer .*start the server"):
        score_key(home, reward_model, {"url": "http://127.0.0.1:9/v1"})


def test_no_server_is_a_failure_that_may_pass(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_FIRST_DELAY", 0.001)
    with pytest.raises(TransientFailure, match="127.0.0.1:9/v1/models: no answer"):
        load_scorer(asks("http://127.0.0.1:9/v1"), reward_model, None, "cpu")


def test_a_reward_server_that_is_busy_is_asked_again(
    reward_model: Path, answering: Callable[[Callable[..., Any]], str]
) -> None:
    """The first two answers are refusals; after them each text gets the reward 0.5."""
    refusals = iter([503, 429])

    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if not body:
            return 200, serving("/models/judge").get(path, {})
        outputs = [{"index": i, "data": [0.5]} for i in range(len(body["input"]))]
        return next(refusals, 200), {"data": outputs[::-1]}

    found = load_scorer(asks(answering(answer)), reward_model, None, "cpu").score(inputs(3))
    assert found.rewards.tolist() == [0.5] * 3


def answer_of(*values: Any, at: list[Any] | None = None) -> dict[str, Any]:
    """What a server says of as many texts; `at`: the numbers that it gives them."""
    places = list(range(len(values))) if at is None else at
    return {"data": [{"index": i, "data": v} for i, v in zip(places, values, strict=True)]}


# Answers to three texts -> what is said of them.
JUNK: dict[str, tuple[dict[str, Any], str]] = {
    "one text twice": (answer_of([0.1], [0.2], [0.3], at=[0, 0, 2]), "text 0 was answered twice"),
    "other texts": (answer_of([0.1], [0.2], [0.3], at=[0, 1, 5]), "3 texts asked for, number 5 answered"),
    "a negative number": (answer_of([0.1], [0.2], [0.3], at=[0, 1, -1]), "number -1 answered"),
    "too few": (answer_of([0.1], [0.2]), "3 texts asked for, 2 answered"),
    "no numbers": (answer_of([0.1], [0.2], [0.3], at=[None] * 3), "lacks 'index' (a number) or 'data'"),
    "numbers that are words": (answer_of([0.1], [0.2], [0.3], at=["0", "1", "2"]), "lacks 'index'"),
    "numbers that are truths": (answer_of([0.1], [0.2], [0.3], at=[False, True, 2]), "lacks 'index'"),
    "no rewards": ({"data": [{"index": i} for i in range(3)]}, "lacks 'index' (a number) or 'data'"),
    "no objects": ({"data": [0.1, 0.2, 0.3]}, "lacks 'index'"),
    "no list": ({"data": "abc"}, "lacks 'data', a list"),
    "null": ({"data": None}, "lacks 'data', a list"),
    "words": (answer_of(["abc"], [0.2], [0.3]), "gives 'abc' for a text, where a number belongs"),
    "base64": (answer_of("AACAPw==" * 9, [0.2], [0.3]), "gives 'AACAPw==AACAPw==AACAPw==AACAPw==AACAPw=... for"),
    "an object": (answer_of({"x": 1}, [0.2], [0.3]), "gives {'x': 1} for a text"),
    "a truth": (answer_of([True], [0.2], [0.3]), "gives True for a text"),
    "a number in quotes": (answer_of(["1.5"], [0.2], [0.3]), "gives '1.5' for a text"),
}


@pytest.mark.parametrize("case", JUNK)
def test_junk_of_a_server_is_refused_in_one_line_that_names_it(
    reward_model: Path, answering: Callable[[Callable[..., Any]], str], case: str
) -> None:
    junk, said = JUNK[case]
    url = answering(lambda path, headers, body: (200, junk if body else serving("/m").get(path, {})))
    with pytest.raises(StageFailure) as raised:
        load_scorer(asks(url), reward_model, None, "cpu").score(inputs(3))
    line = str(raised.value)
    assert said in line and "\n" not in line
    assert line.startswith(url.removesuffix("/v1")) and line.endswith("(vllm serve MODEL --runner pooling)")


def test_numbers_of_a_server_that_are_not_finite_are_rewards_for_the_quarantine(
    reward_model: Path, answering: Callable[[Callable[..., Any]], str]
) -> None:
    answer = answer_of(None, [10**400], [[2]])
    url = answering(lambda path, headers, body: (200, answer if body else serving("/m").get(path, {})))
    found = load_scorer(asks(url), reward_model, None, "cpu").score(inputs(3)).rewards
    assert sorted(found, key=lambda r: (np.isnan(r), r))[:2] == [2.0, np.inf]  # the texts are asked by length
    assert np.isnan(found).sum() == 1


def test_an_answer_without_rewards_is_refused(
    reward_model: Path, answering: Callable[[Callable[..., Any]], str]
) -> None:
    url = answering(lambda path, headers, body: (200, {"odd": 1} if body else serving("/m").get(path, {})))
    with pytest.raises(StageFailure, match="lacks 'data'"):
        load_scorer(asks(url), reward_model, None, "cpu").score(inputs(1))


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Client]:
    """The HTTP clients that reward models open, in order."""
    made: list[httpx.Client] = []

    class Listed(servers.Server):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self._client)

    monkeypatch.setattr(adapter, "Server", Listed)
    return made


def rewarding(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
    """A server whose reward is the number of tokens."""
    if not body:
        return 200, serving("/models/judge").get(path, {})
    return 200, {"data": [{"index": i, "data": [float(len(ids))]} for i, ids in enumerate(body["input"])]}


def test_an_ensemble_closes_the_client_of_a_server_in_it(
    reward_model: Path, answering: Callable[[Callable[..., Any]], str], clients: list[httpx.Client]
) -> None:
    local = RewardModel(type="sequence_classification", model="m", max_tokens=400)
    both = RewardModel(type="ensemble", members=[local, asks(answering(rewarding))])
    scorer = load_scorer(both, [reward_model, reward_model], None, "cpu")
    assert scorer.score(inputs(3)).members.shape == (3, 2)
    assert not clients[-1].is_closed
    scorer.close()
    assert all(client.is_closed for client in clients)


def test_a_member_that_cannot_be_loaded_leaves_no_client_open(
    reward_model: Path, answering: Callable[[Callable[..., Any]], str], clients: list[httpx.Client]
) -> None:
    """Neither its own, nor those of the members before it."""
    both = RewardModel(type="ensemble", members=[asks(answering(rewarding)), asks("http://127.0.0.1:9/v1")])
    with pytest.raises(TransientFailure, match="no answer"):
        load_scorer(both, [reward_model, reward_model], None, "cpu")
    assert len(clients) == 3 and all(client.is_closed for client in clients)


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_closes_its_client_at_the_end_and_when_it_fails(
    home: Home,
    reward_model: Path,
    answering: Callable[[Callable[..., Any]], str],
    clients: list[httpx.Client],
    fails: bool,
) -> None:
    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        return (200, {"odd": 1}) if body and fails else rewarding(path, headers, body)

    prompts = [prompt_row([{"role": "user", "content": f"Question {i}?"}], "train") for i in range(4)]
    candidates = [candidate_row(p, i, "tea " * (i + 1)) for p in prompts for i in range(2)]
    tree = {"type": "server", "model": str(reward_model), "url": answering(answer), "max_tokens": 400}
    chain = settings(rescore={"reward": tree, "sft_threshold": 0.0})
    made = {"prepare": write_prompts(home, prompts), "generate": write_candidates(home, candidates)}
    work = node_work(home, chain, "score", made, {"rescore.reward": reward_model})
    if fails:
        with pytest.raises(StageFailure, match="lacks 'data'"):
            rescore.build(work)
    else:
        assert rescore.build(work).manifest["rows_out"] == len(candidates)
    assert clients and all(client.is_closed for client in clients)
