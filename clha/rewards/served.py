"""What a pooling server is asked and what it says of itself; without torch, for it is asked before any stage runs."""

import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from clha.errors import StageFailure, TransientFailure, UserError
from clha.generation.server import Served

_TIMEOUT_SECONDS = 600
# Who it is, a server says at once: planning waits for it.
_IDENTITY_SECONDS = 10


def root_of(url: str) -> str:
    """The address of the server without the /v1 of its OpenAI-style part."""
    return url.rstrip("/").removesuffix("/v1")


def ask(url: str, path: str, body: dict[str, Any] | None = None, timeout: float = _TIMEOUT_SECONDS) -> dict[str, Any]:
    """The JSON answer of the server at `url` to a request.

    Raises UserError when the server refuses it, StageFailure when the answer is no JSON object, TransientFailure when
    there is none or the server is overloaded.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    where = root_of(url) + path
    try:
        request = urllib.request.Request(where, data, headers)
    except ValueError as error:
        raise UserError(f"reward model: url {url} is no address ({error})") from None
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = json.loads(response.read())
    except urllib.error.HTTPError as error:
        reason = f"{where}: answers {error.code}: {error.read(300).decode(errors='replace')}"
        kind = TransientFailure if error.code >= 500 or error.code == 429 else UserError
        raise kind(" ".join(reason.split())) from None
    except http.client.InvalidURL as error:
        raise UserError(f"reward model: url {url} is no address ({error})") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise TransientFailure(f"{where}: no answer ({getattr(error, 'reason', error)})") from None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise StageFailure(f"{where}: the answer is no JSON object; is this a vLLM server?")
    return answer


def served(url: str) -> Served:
    """Ask the server at `url` which model it serves. Raises UserError when it serves none or does not answer."""
    try:
        models = ask(url, "/v1/models", timeout=_IDENTITY_SECONDS)
    except StageFailure as failure:
        raise UserError(f"{failure}; start the server, or set the reward model's url") from None
    try:
        version = str(ask(url, "/version", timeout=_IDENTITY_SECONDS)["version"])
    except (UserError, StageFailure, KeyError):
        version = "unknown"
    try:
        first = models["data"][0]
        return Served(str(first["id"]), str(first.get("root") or first["id"]), first.get("max_model_len"), version)
    except (AttributeError, KeyError, IndexError, TypeError):
        raise UserError(f"{url}: serves no model; start it with the reward model") from None


def served_identity(url: str) -> dict[str, str]:
    """What of a server belongs into a key: its model's name (of a path only the last part) and its version.

    Raises UserError when the server does not answer.
    """
    server = served(url)
    return {"model": Path(server.name).name, "version": server.version}
