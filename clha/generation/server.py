"""A vLLM server that speaks the OpenAI protocol, in place of an engine in this process: token ids both ways."""

import hashlib
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from clha.digests import file_sha256
from clha.errors import StageFailure, UserError
from clha.generation.requests import Request, Result, Sample, Sampling
from clha.servers import Served, Server
from clha.settings import Engine as EngineSettings

# What a server would otherwise take from the generation_config.json of its model.
_PLAIN_SAMPLING = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class ServerEngine:
    """Samples by requests to a server; `settings.max_concurrency` of them at a time."""

    def __init__(self, model: Path, settings: EngineSettings, sampling: Sampling) -> None:
        """Raises UserError when the server does not serve the policy in folder `model`, or with too short a context."""
        assert settings.url is not None  # checked by the settings
        self._server = Server(settings.url, "generate.engine.url", settings.max_concurrency)
        self._served = self._server.served()
        _check_served(self._served, model, settings)
        self._sampling, self._concurrency = sampling, settings.max_concurrency
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
        self._server.close()

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
        answer = self._server.ask("/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda c: int(c["index"]))
            return Result(request.id, [_sample(choice) for choice in choices])
        except (KeyError, TypeError) as error:
            raise StageFailure(
                f"{self._server.url}: an answer lacks {error}; it must be a vLLM server of 0.11 or later"
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
