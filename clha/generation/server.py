"""A vLLM server that speaks the OpenAI protocol, in place of an engine in this process: token ids both ways."""

import hashlib
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from clha.digests import file_sha256
from clha.errors import StageFailure, TransientFailure, UserError
from clha.generation.requests import Request, Result, Sample, Sampling
from clha.settings import Engine as EngineSettings

_ATTEMPTS = 6
_FIRST_DELAY = 0.5  # seconds; doubles with each attempt
_ANSWER_SECONDS = 1800.0  # a request may wait long in the server's queue

# What a server would otherwise take from the generation_config.json of its model.
_PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Served:
    """What a server says about itself. `root`: its model's place, as the server sees it."""

    name: str
    root: str
    max_model_len: int | None
    version: str


def served(url: str, attempts: int = _ATTEMPTS) -> Served:
    """Ask the server at `url` (with /v1) which model it serves.

    Raises UserError when it refuses or serves none, TransientFailure when it does not answer.
    """
    with _client(url) as client:
        models = _asked(client, "GET", f"{url.rstrip('/')}/models", None, attempts)
        try:
            version = str(_asked(client, "GET", f"{_base(url)}/version", None, 1)["version"])
        except (UserError, StageFailure, KeyError):
            version = "unknown"
    try:
        first = models["data"][0]
        return Served(first["id"], str(first.get("root") or first["id"]), first.get("max_model_len"), version)
    except (KeyError, IndexError, TypeError):
        raise UserError(f"generate.engine.url: {url} serves no model; start it with the policy") from None


def served_identity(url: str) -> dict[str, str]:
    """What of a server belongs into a key: its model's name (of a path only the last part) and its version.

    Raises UserError when the server does not answer.
    """
    try:
        server = served(url, attempts=1)
    except TransientFailure as failure:
        raise UserError(f"{failure}; start the server, or set generate.engine.mode: in_process") from None
    return {"model": Path(server.name).name, "version": server.version}


class ServerEngine:
    """Samples by requests to a server; `settings.max_concurrency` of them at a time."""

    def __init__(self, model: Path, settings: EngineSettings, sampling: Sampling) -> None:
        """Raises UserError when the server does not serve the policy in folder `model`, or with too short a context."""
        assert settings.url is not None  # checked by the settings
        self._url = settings.url.rstrip("/")
        self._served = served(self._url)
        _check_served(self._served, model, settings)
        self._sampling, self._concurrency = sampling, settings.max_concurrency
        self._client = _client(self._url, settings.max_concurrency)
        self._pool = ThreadPoolExecutor(settings.max_concurrency, thread_name_prefix="request")
        self._futures: set[Future[Result]] = set()

    @property
    def capacity(self) -> int:
        return 2 * self._concurrency

    @property
    def pending(self) -> int:
        return len(self._futures)

    def submit(self, request: Request) -> None:
        self._futures.add(self._pool.submit(self._ask, request))

    def poll(self) -> list[Result]:
        done, self._futures = wait(self._futures, return_when=FIRST_COMPLETED)
        return [future.result() for future in done]

    @property
    def identity(self) -> dict[str, Any]:
        engine = {"name": "vllm", "version": self._served.version, "mode": "server"}
        return {"engine": engine | {"model": Path(self._served.name).name}, "device": "server"}

    def tokens_generated(self) -> int | None:
        return None

    def prefix_cache_hits(self) -> int | None:
        return None  # a server counts the requests of all its clients together

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _ask(self, request: Request) -> Result:
        sampling = self._sampling
        body = {
            "model": self._served.name,
            "prompt": request.token_ids,
            "n": sampling.n,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,
            "return_token_ids": True,
            **_PLAIN_SAMPLING,
        }
        answer = _asked(self._client, "POST", f"{self._url}/completions", body, _ATTEMPTS)
        try:
            choices = sorted(answer["choices"], key=lambda c: int(c["index"]))
            return Result(request.id, [_sample(choice) for choice in choices])
        except (KeyError, TypeError) as error:
            raise StageFailure(
                f"{self._url}: an answer lacks {error}; it must be a vLLM server of 0.11 or later"
            ) from None


def _sample(choice: dict[str, Any]) -> Sample:
    ids = [int(i) for i in choice["token_ids"]]
    return Sample(ids, [float(p) for p in choice["logprobs"]["token_logprobs"]], str(choice["finish_reason"]))


def _check_served(server: Served, model: Path, settings: EngineSettings) -> None:
    if server.max_model_len is not None and server.max_model_len < settings.max_model_len:
        raise UserError(
            f"generate.engine.max_model_len is {settings.max_model_len}, but {settings.url} was started with "
            f"{server.max_model_len}; lower one or raise the other"
        )
    if serves_another(server.root, model):
        raise UserError(f"generate.engine.url: {settings.url} serves {server.root}, which is not the policy {model}")


def serves_another(root: str, model: Path) -> bool:
    """Whether a server whose model lies in `root` serves another one than `model`; False where this cannot be seen."""
    place = Path(root)
    return place.is_dir() and place.resolve() != model.resolve() and _signature(place) != _signature(model)


def _signature(folder: Path) -> list[tuple[str, str]]:
    """Enough of a model folder to tell two models apart without reading all of their weights."""
    weights = [(f.name, _sampled(f)) for f in folder.glob("*.safetensors")]
    texts = [folder / name for name in ("config.json", "tokenizer.json")]
    return sorted(weights + [(f.name, file_sha256(f)) for f in texts if f.is_file()])


def _sampled(file: Path) -> str:
    """Digest of a file's size and of sixteen pieces of it: weights of one shape that were trained apart differ."""
    size, piece, digest = file.stat().st_size, 1 << 16, hashlib.sha256()
    digest.update(str(size).encode())
    with open(file, "rb") as content:
        for i in range(16):
            content.seek(max(0, size - piece) * i // 15)
            digest.update(content.read(piece))
    return digest.hexdigest()


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def _client(url: str, connections: int = 1) -> httpx.Client:
    key = os.environ.get("VLLM_API_KEY")
    return httpx.Client(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(_ANSWER_SECONDS, connect=10),
        limits=httpx.Limits(max_connections=connections),
    )


def _asked(client: httpx.Client, method: str, url: str, body: dict[str, Any] | None, attempts: int) -> Any:
    """The JSON answer to a request, tried again when the connection fails or the server is overloaded.

    Raises UserError for a refused key, StageFailure for other refusals, TransientFailure when no attempt succeeded.
    """
    problem = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
        try:
            response = client.request(method, url, json=body)
        except httpx.TransportError as error:
            problem = str(error) or type(error).__name__
            continue
        except httpx.InvalidURL as error:
            raise UserError(f"generate.engine.url: {url} is no address ({error})") from None
        if response.status_code == 429 or response.status_code >= 500:
            problem = f"status {response.status_code}"
            continue
        if response.status_code in (401, 403):
            raise UserError(f"{url}: the server refuses the key; set VLLM_API_KEY to the one that it was started with")
        if response.status_code != 200:
            raise StageFailure(f"{url}: status {response.status_code}: {response.text[:300]!r}")
        try:
            return response.json()
        except ValueError:
            raise StageFailure(f"{url}: the answer is not JSON; is this a vLLM server?") from None
    raise TransientFailure(f"{url}: no answer ({problem})")
