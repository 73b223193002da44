"""Turns a model folder with pickled weights into one with safetensors.

usage: python -m clha.rewards.pickled FOLDER NEW_FOLDER

The chain never reads pickled weights. This reads them once, in a process of its own, with torch's weights_only
unpickler, which refuses anything but tensors.
"""

import argparse
import pickle
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from clha.errors import UserError

_PICKLED = ("*.bin", "*.pt", "*.pth")
# What training leaves beside the weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
_OTHER = ("*.json", "*.txt", "*.model", "*.jinja")


def convert(source: Path, target: Path) -> list[Path]:
    """Write the weights of `source` as safetensors into `target`, which must not exist, with config and tokenizer.

    Returns the files that were read. Raises UserError when there are none, or when they hold more than tensors or none
    at their top level.
    """
    from safetensors.torch import save_file

    files = sorted(f for pattern in _PICKLED for f in source.glob(pattern) if not f.name.startswith(_NO_WEIGHTS))
    if not files:
        raise UserError(f"{source}: has no pickled weights ({', '.join(_PICKLED)})")
    if target.exists():
        raise UserError(f"{target}: exists already; name a new folder")
    unfinished = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for number, file in enumerate(files, start=1):
            # A copy of each: tensors that share memory cannot be saved side by side.
            tensors = {name: t.clone().contiguous() for name, t in _weights(file).items()}
            name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            save_file(tensors, unfinished / name, metadata={"format": "pt"})
        for pattern in _OTHER:
            for file in source.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, unfinished / file.name)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return files


def _weights(file: Path) -> dict[str, Any]:
    """The named tensors of a file. Raises UserError where there are none, or not at its top level."""
    import torch

    state = _tensors_only(file)
    named = state if isinstance(state, dict) else {}
    tensors = {name: t for name, t in named.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    inner = [repr(name) for name, value in named.items() if isinstance(value, dict)]
    if inner:
        raise UserError(
            f"{file}: holds its weights in a part of it ({' or '.join(inner)}); load it with torch and save that part "
            "alone in a new folder"
        )
    if not tensors:
        raise UserError(f"{file}: has no named tensors; give a folder with a model's weights")
    return tensors


def _tensors_only(file: Path) -> Any:
    """Unpickle tensors. Raises UserError for anything else; torch's own words would advise to read it all the same."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise UserError(
                f"{file}: is not read, it holds more than tensors or is damaged ({type(error).__name__})"
            ) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    try:
        convert(args.source, args.target)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
