"""Installed versions of what a result can depend on, without importing any of it."""

import sys
from importlib.metadata import PackageNotFoundError, version

from clha import __version__

_PACKAGES = ("torch", "transformers", "vllm", "pyarrow", "numpy", "datasets", "prefect")


def package_version(name: str) -> str:
    """The installed version of a package ("vllm" also under the name of its CPU build), or "absent"."""
    for distribution in (name, f"{name}-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "absent"


def installed_versions() -> dict[str, str]:
    """Name -> version of Python, clha and the packages that a manifest records; "absent" for what is not there."""
    return {"clha": __version__, "python": sys.version.split()[0], **{n: package_version(n) for n in _PACKAGES}}
