"""Reads `pipelines.yaml`: profiles that extend each other, `--set`, places relative to the file."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clha.errors import UserError
from clha.mistakes import explain, group_in, nearest
from clha.settings import Settings
from clha.settings_group import NOT_PATHS, marked


def load_settings(
    file: Path, profile: str | None = None, overrides: Iterable[str] = (), folder: Path | None = None
) -> tuple[str, Settings]:
    """Read one profile of `file`, apply `overrides` ("a.b=value", YAML values), check everything.

    Relative paths in the file are taken from the file's folder, those in `overrides` from `folder` (default: the
    current one). Returns (profile name, settings). Raises UserError naming the key, the file and the nearest known
    key.
    """
    document = _read_yaml(file)
    profiles = document.get("profiles")
    if not isinstance(profiles, dict) or not profiles:
        raise UserError(f"{file}: no `profiles` in it")
    unknown = [key for key in document if key not in ("default", "profiles")]
    if unknown:
        raise UserError(f"{file}: unknown key `{unknown[0]}`; known are `default` and `profiles`")
    for key in profiles:
        _profile_name(file, "`profiles`", key)
    default = document.get("default")
    name = profile or (next(iter(profiles)) if default is None else _profile_name(file, "`default`", default))
    tree = _resolve_paths(_extended(file, profiles, name, ()), file.resolve().parent)
    return name, settings_from(tree, overrides, where=f"{file}, profile {name}", folder=folder)


def settings_from(
    tree: Mapping[str, Any], overrides: Iterable[str], where: str, folder: Path | None = None
) -> Settings:
    """Check a settings tree (a profile, or the saved settings of a run) with `overrides` applied."""
    merged = _copy(tree)
    for override in overrides:
        merged = _merge(merged, _resolve_paths(_parse_override(override), folder or Path.cwd()))
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Settings)}") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the settings file with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    try:
        document = yaml.safe_load(text)
        if not isinstance(document, dict):
            raise UserError(f"{file}: must hold a mapping with `profiles`")
        return _copy(document)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{file}{at}: not valid YAML: {problem}") from None
    except ValueError as error:  # what looks like a date or number and is none
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply, or an alias in it refers to itself") from None


def _profile_name(file: Path, key: str, name: Any) -> str:
    if not isinstance(name, str):
        raise UserError(f"{file}: {key} must give the name of a profile as text, it is {name!r}")
    return name


def _extended(file: Path, profiles: Mapping[str, Any], name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if name not in profiles:
        raise UserError(f"{file}: no profile `{name}`{nearest(name, profiles)}")
    if name in seen:
        raise UserError(f"{file}: profiles extend each other in a circle: {' -> '.join((*seen, name))}")
    own = profiles[name]
    if not isinstance(own, dict):
        raise UserError(f"{file}: profile `{name}` must be a mapping")
    own = _copy(own)
    base = own.pop("extends", None)
    if base is None:
        return own
    base = _profile_name(file, f"`profiles.{name}.extends`", base)
    return _merge(_extended(file, profiles, base, (*seen, name)), own)


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in patch.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip() or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {override}: must be KEY=VALUE, e.g. --set train.learning_rate=1e-5")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _resolve_paths(tree: Any, folder: Path, model: type[BaseModel] | None = None) -> Any:
    """A copy of `tree` in which no path is relative."""
    if isinstance(tree, list):
        return [_resolve_paths(item, folder, model) for item in tree]
    if not isinstance(tree, dict):
        return tree
    out = dict(tree)
    for name, field in (model or Settings).model_fields.items():
        if name in tree and marked(field, "place"):
            value = tree[name]
            out[name] = [_resolved(v, folder) for v in value] if isinstance(value, list) else _resolved(value, folder)
        elif name in tree and (group := group_in(field.annotation)):
            out[name] = _resolve_paths(tree[name], folder, group)
    return out


def _resolved(value: Any, folder: Path) -> Any:
    if not isinstance(value, str) or value.startswith(NOT_PATHS) or "\0" in value:  # the last is no setting's value
        return value
    return str((folder / os.path.expanduser(value)).resolve())  # Path's own raises for a user who does not exist
