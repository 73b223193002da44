"""A reward model behind HTTP: a vLLM server with a pooling model (`vllm serve MODEL --runner pooling`)."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clha.errors import StageFailure, UserError
from clha.generation.server import serves_another
from clha.rewards.interface import Done, Scored, one_member
from clha.rewards.scoring import Padding, length_batches
from clha.rewards.texts import RewardInput, encode_all, text_encoder
from clha.servers import Server
from clha.settings_rewards import RewardModel

_SETTING = "reward model: url"
_CONCURRENT = 4
_ANSWER_SECONDS = 600.0  # a batch may wait in the server's queue
_REMEDY = "it must be a vLLM server of 0.11 or later with a reward model (vllm serve MODEL --runner pooling)"


class ServerReward:
    """Asks `/pooling` for the raw output of a classifier; texts go as token IDs, so they are what this side encodes."""

    def __init__(self, model: Path, settings: RewardModel) -> None:
        """`model`: the folder of the model that the server has; its tokenizer and template are used here.

        Raises UserError when nothing answers at the URL, or a server with another model or too short a context.
        """
        assert settings.url is not None
        self.padding = Padding()
        self._tokens = settings.tokens_per_batch
        self._texts = text_encoder(model, settings.max_tokens, closed=True)
        self._model = _served_model(model, settings.url, self._texts.max_tokens)
        self._server = Server(settings.url, _SETTING, _CONCURRENT)  # last: what was refused holds no connection

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

    def close(self) -> None:
        self._server.close()

    def _ask(self, ids: list[list[int]]) -> list[float]:
        body = {"model": self._model, "input": ids, "task": "classify", "use_activation": False}
        where = f"{self._server.url}/pooling"
        answer = self._server.ask("/pooling", body, seconds=_ANSWER_SECONDS)
        by_index = _outputs(answer, where)
        if len(by_index) != len(ids):
            raise StageFailure(f"{where}: {len(ids)} texts asked for, {len(by_index)} answered; {_REMEDY}")
        if by_index.keys() != set(range(len(ids))):
            odd = next(i for i in by_index if i not in range(len(ids)))
            raise StageFailure(f"{where}: {len(ids)} texts asked for, number {odd} answered; {_REMEDY}")
        return [_single(by_index[i], where) for i in range(len(ids))]


def _served_model(model: Path, url: str, max_tokens: int) -> str:
    """The name that the server has for `model`. Raises UserError as `ServerReward`."""
    with Server(url, _SETTING) as server:
        served = server.served()
    if serves_another(served.root, model):
        raise UserError(f"reward model: {url} serves {served.root}, which is not its model {model}")
    if served.max_model_len is not None and served.max_model_len < max_tokens:
        raise UserError(
            f"reward model: max_tokens is {max_tokens}, but {url} was started with {served.max_model_len}; lower one "
            "or raise the other"
        )
    return served.name


def _single(output: Any, where: str) -> float:
    """The one number of a classifier, NaN for null.

    Raises UserError for a model with more outputs, StageFailure for what is no number.
    """
    while isinstance(output, list) and len(output) == 1:
        output = output[0]
    if isinstance(output, list):
        raise UserError(f"{where}: gives {len(output)} numbers for a text, a reward model gives one")
    if output is None:
        return math.nan
    if isinstance(output, bool) or not isinstance(output, int | float):
        told = repr(output)
        told = told if len(told) <= 40 else f"{told[:40]}..."
        raise StageFailure(f"{where}: gives {told} for a text, where a number belongs; {_REMEDY}")
    try:
        return float(output)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _outputs(answer: dict[str, Any], where: str) -> dict[int, Any]:
    """{number of a text: what the server says of it}. Raises StageFailure where it does not say of which text."""
    entries = answer.get("data")
    if not isinstance(entries, list):
        raise StageFailure(f"{where}: an answer lacks 'data', a list; {_REMEDY}")
    by_index: dict[int, Any] = {}
    for entry in entries:
        index = entry.get("index") if isinstance(entry, dict) else None
        if type(index) is not int or "data" not in entry:  # True is no number
            raise StageFailure(f"{where}: an answer lacks 'index' (a number) or 'data' of a text; {_REMEDY}")
        if index in by_index:
            raise StageFailure(f"{where}: text {index} was answered twice; {_REMEDY}")
        by_index[index] = entry["data"]
    return by_index
