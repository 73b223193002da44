"""A reward model behind HTTP: a vLLM server with a pooling model (`vllm serve MODEL --runner pooling`)."""

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clha.errors import StageFailure, TransientFailure, UserError
from clha.rewards.interface import Done, Scored, one_member
from clha.rewards.scoring import Padding, length_batches
from clha.rewards.texts import RewardInput, encode_all, text_encoder
from clha.settings_rewards import RewardModel

_TIMEOUT_SECONDS = 600
_CONCURRENT = 4


class ServerReward:
    """Asks `/pooling` for the raw output of a classifier; texts go as token IDs, so they are what this side encodes."""

    def __init__(self, model: Path, settings: RewardModel) -> None:
        """`model`: the folder of the model that the server has; its tokenizer and template are used here.

        Raises UserError when nothing answers at the URL.
        """
        assert settings.url is not None
        self.padding = Padding()
        self._root = settings.url.rstrip("/").removesuffix("/v1")
        self._tokens = settings.tokens_per_batch
        self._texts = text_encoder(model, settings.max_tokens, closed=True)
        try:
            self._model = str(self._call("/v1/models")["data"][0]["id"])
        except TransientFailure as error:
            raise UserError(f"{error}; start the server, or set the reward model's url") from None

    def score(self, inputs: Sequence[RewardInput], progress: Done | None = None) -> Scored:
        places, encoded, problems = encode_all(self._texts, inputs)
        batches = length_batches([len(e.ids) for e in encoded], self._tokens)
        rewards = np.full(len(encoded), np.nan)
        done = 0
        with ThreadPoolExecutor(_CONCURRENT) as pool:
            asked = pool.map(lambda rows: self._ask([encoded[i].ids for i in rows]), batches)
            for rows, answered in zip(batches, asked, strict=True):
                rewards[rows] = answered
                done += len(rows)
                self.padding.tokens += sum(len(encoded[i].ids) for i in rows)
                if progress:
                    progress(done)
        return one_member(len(inputs), places, encoded, rewards, problems)

    def _ask(self, ids: list[list[int]]) -> list[float]:
        body = {"model": self._model, "input": ids, "task": "classify", "use_activation": False}
        data = sorted(self._call("/pooling", body)["data"], key=lambda d: d["index"])
        if len(data) != len(ids):
            raise StageFailure(f"{self._root}/pooling: {len(ids)} texts asked for, {len(data)} answered")
        return [_single(d["data"], self._root) for d in data]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
                answer: dict[str, Any] = json.loads(response.read())
                return answer
        except urllib.error.HTTPError as error:
            reason = f"{self._root}{path}: answers {error.code}: {error.read(300).decode(errors='replace')}"
            kind = TransientFailure if error.code >= 500 or error.code == 429 else UserError
            raise kind(" ".join(reason.split())) from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise TransientFailure(f"{self._root}{path}: no answer ({getattr(error, 'reason', error)})") from None


def _single(output: Any, where: str) -> float:
    """The one number of a classifier. Raises UserError for a model with more outputs."""
    while isinstance(output, list) and len(output) == 1:
        output = output[0]
    if isinstance(output, list):
        raise UserError(f"{where}: gives {len(output)} numbers for a text, a reward model gives one")
    return math.nan if output is None else float(output)
