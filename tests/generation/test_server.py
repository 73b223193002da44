"""A vLLM server in place of the engine in this process."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from clha.config import settings_from
from clha.errors import StageFailure, UserError
from clha.generation.requests import Request, Sampling
from clha.generation.server import ServerEngine
from clha.progress import Event
from clha.runs import Run, save_run
from clha.settings import Engine
from clha.stages import chain, runner
from clha.store import Home

SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, max_tokens=4, stop_token_ids=(1,))

# path, headers, body -> status, answer
Answer = Callable[[str, dict[str, str], dict[str, Any]], tuple[int, Any]]


def models(max_model_len: int = 64, root: str = "elsewhere/policy") -> dict[str, Any]:
    return {"data": [{"id": "/somewhere/policy", "root": root, "max_model_len": max_model_len}]}


def completion(body: dict[str, Any]) -> dict[str, Any]:
    choices = [
        {
            "index": k,
            "token_ids": [k, *body["prompt"]],
            "logprobs": {"token_logprobs": [-0.5] * 3},
            "finish_reason": "stop",
        }
        for k in range(body["n"])
    ]
    return {"choices": choices[::-1]}


def plain(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/v1/models":
        return 200, models()
    if path == "/version":
        return 200, {"version": "0.32.0"}
    return 200, completion(body)


def engine(url: str, **more: Any) -> ServerEngine:
    return ServerEngine(Path("policy"), Engine(mode="server", url=url, max_model_len=64, **more), SAMPLING)


def all_results(made: ServerEngine) -> dict[str, Any]:
    results = {}
    while made.pending:
        results |= {r.id: r for r in made.poll()}
    made.close()
    return results


def test_requests_carry_token_ids_and_samples_come_back_in_order(answering: Callable[[Answer], str]) -> None:
    bodies: list[dict[str, Any]] = []

    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if body:
            bodies.append(body)
        return plain(path, headers, body)

    made = engine(answering(answer), max_concurrency=3)
    for k in range(10):
        made.submit(Request(f"r{k}", [7, k], seed=100 + k))
    results = all_results(made)
    assert {i: [s.token_ids for s in r.samples] for i, r in results.items()} == {
        f"r{k}": [[0, 7, k], [1, 7, k]] for k in range(10)
    }
    assert sorted(b["seed"] for b in bodies) == list(range(100, 110))
    assert all(b["n"] == 2 and b["stop_token_ids"] == [1] and b["return_token_ids"] for b in bodies)
    # The model's own generation_config.json must not sneak in.
    assert all((b["top_k"], b["repetition_penalty"]) == (0, 1.0) for b in bodies)


def test_a_server_that_is_busy_for_a_moment_is_asked_again(answering: Callable[[Answer], str]) -> None:
    refusals = iter([503, 429, 500])

    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        status = next(refusals, 200) if body else 200
        return (status, {}) if status != 200 else plain(path, headers, body)

    made = engine(answering(answer), max_concurrency=1)
    made.submit(Request("r", [7, 8], seed=1))
    assert set(all_results(made)) == {"r"}


def test_a_server_with_too_short_a_context_is_refused(answering: Callable[[Answer], str]) -> None:
    url = answering(lambda path, headers, body: (200, models(max_model_len=63)))
    with pytest.raises(UserError, match="max_model_len is 64, but .* was started with 63"):
        engine(url)


def test_a_server_of_another_model_on_this_machine_is_refused(
    answering: Callable[[Answer], str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    url = answering(lambda path, headers, body: (200, models(root=str(tmp_path))))
    with pytest.raises(UserError, match="is not the policy"):
        ServerEngine(tiny_model, Engine(mode="server", url=url, max_model_len=64), SAMPLING)


def test_an_answer_without_token_ids_is_refused(answering: Callable[[Answer], str]) -> None:
    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        return (200, {"choices": [{"index": 0}]}) if body else plain(path, headers, body)

    made = engine(answering(answer))
    made.submit(Request("r", [7], seed=1))
    with pytest.raises(StageFailure, match="lacks 'token_ids'"):
        made.poll()
    made.close()


def server_tree(data: Path, url: str | None, **execution: float) -> dict[str, Any]:
    """Settings of a small chain whose policy is the tiny model; its engine is the server at `url`."""
    judge = {"reward": {"type": "sequence_classification", "model": "nowhere"}}
    engine_settings = {"mode": "server", "url": url} if url else {}
    return {
        "policy": {"model": "bundled:tiny-random"},
        "prepare": {
            "source": "chat_jsonl",
            "path": str(data),
            "splits": {"train": 0.6, "dev": 0.2, "test": 0.2, "reward_train": 0, "reward_eval": 0},
        },
        "generate": {
            "n": 1,
            "temperature": 0,
            "max_tokens": 12,
            "max_prompt_tokens": 100,
            "shard_size": 8,
            "engine": {
                "max_model_len": 250,
                "args": {"max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26},
                **engine_settings,
            },
        },
        "rescore": judge,
        "evaluate": judge,
        "execution": {"min_free_disk_gb": 0.1, "retries": 0, **execution},
    }


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """24 prompts."""
    lines = [json.dumps({"messages": [{"role": "user", "content": f"Why {k}?"}]}) for k in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "data.jsonl"


@pytest.mark.slow  # a request is sent six times, over 15 s, before the stage gives up and is tried again
def test_a_stage_whose_server_is_overloaded_for_long_is_tried_again_and_loses_no_prompt(
    answering: Callable[[Answer], str], home: Home, questions: Path
) -> None:
    """The first eight prompts (a shard) are answered; then nothing, until the stage has failed once."""
    answered: list[list[int]] = []
    said: list[str] = []
    lock = threading.Lock()

    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        if not body:
            return (200, models(max_model_len=250)) if path == "/v1/models" else plain(path, headers, body)
        with lock:
            if len(answered) >= 8 and not said:
                return 503, {}
            answered.append(body["prompt"])
        logprobs = {"token_logprobs": [-0.5, -0.5]}
        choice = {"index": 0, "token_ids": [40, 41], "logprobs": logprobs, "finish_reason": "length"}
        return 200, {"choices": [choice]}

    def listen(node: str, event: Event) -> None:
        if "; again in " in event.get("message", ""):
            said.append(event["message"])

    tree = server_tree(questions, answering(answer), retries=1, retry_delay_seconds=0)
    tree["generate"]["engine"]["max_concurrency"] = 1
    settings = settings_from(tree, (), where="test")
    run = Run("r", "test", settings.model_dump(mode="json"))
    save_run(home, run)
    built = [runner.build(home, run, settings, node, listen) for node in chain.nodes(settings)[:2]]
    (message,) = said
    assert re.fullmatch(
        r"generate: http://127\.0\.0\.1:\d+/v1/completions: no answer \(status 503\) \(log: \S+\); "
        r"again in 0 s \(1 of 1\)",
        message,
    )
    manifest = built[1].artifact.manifest
    assert manifest["rows_in"] == manifest["rows_out"] == len({tuple(p) for p in answered}) > 8
    assert len(answered) == manifest["rows_in"], "the shard of the first try was kept: no prompt was asked twice"


@pytest.fixture(scope="module")
def vllm_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server with the tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_API_KEY": "for the test",
    }
    with open(log, "w") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
            + ["--host", "127.0.0.1", "--port", str(port), "--no-enable-chunked-prefill", *flags],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    try:
        while True:
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        os.killpg(child.pid, 15)
        child.wait(30)


@pytest.mark.slow  # a real server needs 40 s until it answers
def test_a_real_server_gives_the_rows_of_the_engine_in_process(
    vllm_server: str, home: Home, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "for the test")
    made = {}
    for name, url in {"in_process": None, "server": vllm_server}.items():
        settings = settings_from(server_tree(questions, url), (), where="test")
        run = Run(name, "test", settings.model_dump(mode="json"))
        save_run(home, run)
        for node in chain.nodes(settings)[:2]:
            made[name] = runner.build(home, run, settings, node, lambda *_: None).artifact
    here, there = made["in_process"].rows("candidates"), made["server"].rows("candidates")
    assert len(here) == made["in_process"].manifest["rows_in"] > 10
    for a, b in zip(here, there, strict=True):
        assert a.pop("response_logprobs") == pytest.approx(b.pop("response_logprobs"), abs=1e-4)
        assert a == b
    assert made["server"].manifest["engine"]["mode"] == "server"
    assert made["server"].key != made["in_process"].key
