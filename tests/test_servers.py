"""The client of vLLM servers against HTTP servers on this machine that answer as told."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from clha import servers
from clha.errors import StageFailure, TransientFailure, UserError
from clha.servers import Served, Server, served_identity

Answering = Callable[[Callable[..., Any]], str]
SETTING = ("generate.engine.url", "set generate.engine.mode: in_process")


def plain(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
    if path == "/v1/models":
        return 200, {"data": [{"id": "/somewhere/policy", "root": "elsewhere/policy", "max_model_len": 64}]}
    return (200, {"version": "0.32.0"}) if path == "/version" else (404, {})


def served(url: str) -> Served:
    with Server(url, SETTING[0]) as server:
        return server.served()


def test_a_server_says_what_it_serves_with_and_without_v1_in_its_address(answering: Answering) -> None:
    url = answering(plain)
    assert (
        served(url) == served(url.removesuffix("/v1")) == Served("/somewhere/policy", "elsewhere/policy", 64, "0.32.0")
    )


def test_a_key_holds_the_served_models_name_and_version_but_no_path(answering: Answering) -> None:
    assert served_identity(answering(plain), *SETTING) == {"model": "policy", "version": "0.32.0"}


def test_a_server_that_tells_no_version_has_an_unknown_one_but_not_while_it_is_busy(answering: Answering) -> None:
    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        return (status, {}) if path == "/version" else plain(path, headers, body)

    status = 404
    assert served(answering(answer)).version == "unknown"
    status = 503
    with pytest.raises(TransientFailure, match="version: no answer .status 503"):
        served(answering(answer))


def test_a_server_that_stays_away_is_a_failure_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_FIRST_DELAY", 0.001)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(TransientFailure, match="no answer"):
        served(url)
    with pytest.raises(UserError, match="no answer .*; start the server, or set generate.engine.mode: in_process"):
        served_identity(url, *SETTING)


def test_the_key_is_sent_and_a_refused_one_is_the_users_to_mend(
    answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        right = headers.get("Authorization") == "Bearer open sesame"
        return plain(path, headers, body) if right else (401, {"error": "Unauthorized"})

    url = answering(answer)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(UserError, match="VLLM_API_KEY"):
        served(url)
    monkeypatch.setenv("VLLM_API_KEY", "open sesame\n")  # as a file of secrets ends
    assert served(url).version == "0.32.0"


def test_a_key_that_cannot_be_sent_is_not_shown(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "open\nsesame")
    with pytest.raises(UserError, match="VLLM_API_KEY: holds what no key can hold") as caught:
        served(answering(plain))
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, {"data": []}), "serves no model"),
        ((200, {"data": ["a"]}), "serves no model"),
        ((200, "<html>"), "no JSON object; is generate.engine.url that of a vLLM server"),
        ((200, [1]), "no JSON object; is generate.engine.url that of a vLLM server"),
        ((404, "nothing here"), "status 404; is generate.engine.url that of a vLLM server"),
    ],
)
def test_what_is_no_vllm_server_is_one_clear_line(answering: Answering, answer: tuple[int, Any], expected: str) -> None:
    for ask in (served, lambda url: served_identity(url, *SETTING)):
        with pytest.raises(UserError, match=expected) as error:
            ask(answering(lambda *_: answer))
        assert "\n" not in str(error.value)


def test_a_refused_request_is_a_failure_that_says_why(answering: Answering) -> None:
    url = answering(lambda path, headers, body: (400, {"message": "the prompt is\ntoo long"}))
    with Server(url, SETTING[0]) as server, pytest.raises(StageFailure, match="status 400: .*too long"):
        server.ask("/v1/completions", {"prompt": [1]})


@pytest.mark.parametrize("url", ["nonsense", "http://host:port"])
def test_what_is_no_address_is_a_clear_error(url: str) -> None:
    with pytest.raises(UserError, match=f"generate.engine.url: {url} is no address .*; give one such as http"):
        served_identity(url, *SETTING)
