"""Which files a source consists of, and their digest."""

import re
from pathlib import Path
from typing import Any

from clha.digests import digest_of
from clha.errors import UserError, reason_of
from clha.settings import Prepare
from clha.store import Home

_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w./-]+?))?(?:@(?P<revision>[\w./-]+))?")


def source_paths(prepare: Prepare) -> list[str]:
    """The places that `prepare.path` names, as a list."""
    return [prepare.path] if isinstance(prepare.path, str) else list(prepare.path)


def local_files(path: str) -> list[Path]:
    """The file at `path`, or all files below the folder at `path`, sorted. Raises UserError when there is none."""
    place = Path(path)
    if place.is_file():
        return [place]
    files = sorted(p for p in place.rglob("*") if p.is_file() and not p.name.startswith(".")) if place.is_dir() else []
    if not files:
        raise UserError(f"prepare.path: no file at {place}; give the path of the data")
    return files


def source_digest(prepare: Prepare, home: Home) -> str:
    """Digest of the content of a source: its files' names and bytes, or the name and commit of a Hub dataset.

    A name that enters rows as their `source` or `subset` is content, the rest of a path is not.
    """
    parts: list[Any] = []
    for path in source_paths(prepare):
        if path.startswith("hub:"):
            name, folder, revision = hub_reference(path, prepare.revision)
            parts.append([name, hub_commit(name, revision), folder])
            continue
        files = local_files(path)
        digest = home.digests.of_files(files, files[0].parent if Path(path).is_file() else Path(path))
        parts.append([Path(path).name, digest] if prepare.source == "datasets" else digest)
    return digest_of(parts)


def hub_reference(path: str, revision: str | None) -> tuple[str, str | None, str | None]:
    """(owner/name, folder in the repository, revision) of "hub:owner/name[/folder][@revision]".

    `revision` is the one of the settings; what stands behind @ goes before it. Raises UserError.
    """
    match = _HUB.fullmatch(path.removeprefix("hub:"))
    if match is None:
        raise UserError(f"prepare.path {path}: must be hub:owner/name, hub:owner/name/folder, either with @revision")
    return match["name"], match["folder"], match["revision"] or revision


def hub_commit(name: str, revision: str | None) -> str:
    """The commit of a Hub dataset. Raises UserError when the Hub cannot say and `revision` is no commit."""
    if revision and len(revision) == 40:
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except Exception as error:
        raise UserError(
            f"prepare.path hub:{name}: the Hub does not answer ({reason_of(error)}); check name, network and HF_TOKEN, "
            "or set prepare.revision to a commit that is cached"
        ) from None


def weights_file_digest(path: str, home: Home) -> str:
    """Digest of a file of pair weights. Raises UserError when there is none."""
    if not Path(path).is_file():
        raise UserError(f"rescore.noise.file: no file at {path}; give a Parquet file of pair weights")
    return home.digests.of(Path(path))
