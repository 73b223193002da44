"""The server adapter against a real vLLM pooling server, and against servers that fail."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clha.errors import UserError
from clha.process import end_group
from clha.rewards.adapters import load_scorer
from clha.rewards.texts import RewardInput
from clha.settings_rewards import RewardModel


@pytest.fixture(scope="session")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("served") / "reward-model"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = LlamaConfig.from_pretrained(tiny_model, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


@pytest.mark.slow
def test_a_server_gives_the_rewards_of_the_same_model_in_process(reward_model: Path, url: str) -> None:
    words = ["tea", "rain", "kind", "rude"]
    items = [
        RewardInput([{"role": "user", "content": f"Question {i}?"}], " ".join(words[: i % 4 + 1] * (i + 1)))
        for i in range(9)
    ]
    served = RewardModel(type="server", model="m", url=url, max_tokens=400, tokens_per_batch=300)
    local = RewardModel(type="sequence_classification", model="m", max_tokens=400)
    heard: list[int] = []
    found = load_scorer(served, reward_model, None, "cpu").score(items, heard.append)
    expected = load_scorer(local, reward_model, None, "cpu").score(items)
    assert np.abs(found.rewards - expected.rewards).max() < 1e-4
    assert heard[-1] == len(items)


def test_no_server_is_a_clear_error(reward_model: Path) -> None:
    settings = RewardModel(type="server", model="m", url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="127.0.0.1:9/v1/models: no answer .*start the server"):
        load_scorer(settings, reward_model, None, "cpu")
