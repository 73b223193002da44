"""A vLLM server over HTTP, for generation and for rewards: JSON both ways, and what it says of itself.

Without torch: servers are asked before any stage runs.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from clha.errors import StageFailure, TransientFailure, UserError

_ATTEMPTS = 6
_FIRST_DELAY = 0.5  # seconds; doubles with each attempt
_ANSWER_SECONDS = 1800.0  # a request may wait long in the server's queue
_IDENTITY_SECONDS = 10.0  # who it is, a server says at once: planning waits for it


@dataclass(frozen=True)
class Served:
    """What a server says about itself. `root`: its model's place, as the server sees it."""

    name: str
    root: str
    max_model_len: int | None
    version: str


class Server:
    """One server at `url`, with or without the /v1 of its OpenAI-style part.

    `setting` is the name under which the user gave the address; `connections` may be open at a time. The key is taken
    from the environment, VLLM_API_KEY. Several threads may ask at once.
    """

    def __init__(self, url: str, setting: str, connections: int = 1) -> None:
        self.url, self._setting = url.rstrip("/").removesuffix("/v1"), setting
        key = os.environ.get("VLLM_API_KEY", "").strip()
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=10),
            limits=httpx.Limits(max_connections=connections),
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def ask(
        self, path: str, body: dict[str, Any] | None = None, attempts: int = _ATTEMPTS, seconds: float | None = None
    ) -> dict[str, Any]:
        """The JSON object that answers a request (POST with a body, else GET), which is tried again while it is busy.

        Raises UserError for what is no address, a refused key, a path that the server does not know and an answer that
        is no JSON object, StageFailure for other refusals, TransientFailure when no attempt was answered.
        """
        where, problem = self.url + path, ""
        timeout = httpx.USE_CLIENT_DEFAULT if seconds is None else httpx.Timeout(seconds)
        for attempt in range(attempts):
            if attempt:
                time.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
            try:
                response = self._client.request("GET" if body is None else "POST", where, json=body, timeout=timeout)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise UserError(
                    f"{self._setting}: {self.url} is no address ({error}); give one such as http://127.0.0.1:8000/v1"
                ) from None
            except httpx.LocalProtocolError:  # its text would show the key
                raise UserError("VLLM_API_KEY: holds what no key can hold, such as a line break") from None
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
                continue
            if response.status_code == 429 or response.status_code >= 500:
                problem = f"status {response.status_code}"
                continue
            return self._json(response, where)
        raise TransientFailure(f"{where}: no answer ({problem})")

    def served(self, attempts: int = _ATTEMPTS) -> Served:
        """Which model it serves. Raises UserError when it refuses or serves none, and as `ask`."""
        models = self.ask("/v1/models", attempts=attempts, seconds=_IDENTITY_SECONDS)
        try:
            version = str(self.ask("/version", attempts=attempts, seconds=_IDENTITY_SECONDS)["version"])
        except TransientFailure:  # not "unknown": it is part of keys
            raise
        except (UserError, StageFailure, KeyError):
            version = "unknown"
        try:
            first = models["data"][0]
            return Served(str(first["id"]), str(first.get("root") or first["id"]), first.get("max_model_len"), version)
        except (AttributeError, KeyError, IndexError, TypeError):
            raise UserError(f"{self._setting}: {self.url} serves no model; start it with one") from None

    def _json(self, response: httpx.Response, where: str) -> dict[str, Any]:
        status = response.status_code
        if status in (401, 403):
            raise UserError(f"{where}: the server refuses the key; set VLLM_API_KEY to the one it was started with")
        if status == 404:
            raise UserError(
                f"{where}: status 404; is {self._setting} that of a vLLM server, started for this kind of model "
                "(reward models: vllm serve MODEL --runner pooling)?"
            )
        if status != 200:
            raise StageFailure(f"{where}: status {status}: {' '.join(response.text[:300].split())}")
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UserError(f"{where}: the answer is no JSON object; is {self._setting} that of a vLLM server?")
        return answer


def served_or_down(server: Server, remedy: str) -> Served:
    """What a server serves, asked once. Raises UserError, "start the server" or `remedy`, when it does not answer."""
    try:
        return server.served(attempts=1)
    except TransientFailure as failure:
        raise UserError(f"{failure}; start the server, or {remedy}") from None


def served_identity(url: str, setting: str, remedy: str) -> dict[str, str]:
    """What of a server belongs into a key: its model's name (of a path only the last part) and its version."""
    with Server(url, setting) as server:
        found = served_or_down(server, remedy)
    return {"model": Path(found.name).name, "version": found.version}
