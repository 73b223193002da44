"""What is wrong with a tree of settings, as one line for people: the key, what it must be, what it is."""

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

# What pydantic says of Python types, for people who write YAML; "{...}" is filled from the error's own facts.
_MUST = {
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of settings",
    "invalid_key": "must be text, as every key",
    "too_short": "must be a list of at least {min_length}",
}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of validating a tree against `model`, as one line."""
    problems = [(_location(e["loc"], model), e) for e in error.errors(include_url=False)]
    # The members of a union fail one by one at the same key; the one that came deepest is the one that was meant.
    start = problems[0][0][0]
    of_first = [p for p in problems if p[0][0][: len(start)] == start]
    (path, within), first = max(of_first, key=lambda p: len(p[0][0]))
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key `{dotted}`{nearest(path[-1], within.model_fields if within else ())}"
    if first["type"] == "missing":
        return f"`{dotted}` is missing"
    said = dict.fromkeys(_words(e) for (keys, _), e in problems if keys == path)
    message = " or ".join(words.removeprefix("must be ") if i else words for i, words in enumerate(said))
    return f"`{dotted}`: {message}{_shown(first['input'])}" if dotted else message


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, or all of them, as the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(f'`{k}`' for k in known)}"


def group_in(annotation: Any) -> type[BaseModel] | None:
    """The group of settings that a field holds, also one that may be null or stands in a list."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _location(place: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """The keys and list places of an error, without the names of union members, and the group of the last key."""
    path: list[str] = []
    inside: type[BaseModel] | None = model
    within: type[BaseModel] | None = model
    for part in place:
        if isinstance(part, int):
            path.append(str(part))
        elif inside is not None:
            path.append(part)
            within, field = inside, inside.model_fields.get(part)
            inside = group_in(field.annotation) if field else None
    return path, within


def _words(error: Mapping[str, Any]) -> str:
    words = _MUST.get(error["type"])
    if words is not None:
        return words.format(**error.get("ctx", {}))
    message: str = error["msg"]
    return message.removeprefix("Value error, ").replace("Input should be ", "must be ", 1)


def _shown(value: Any) -> str:
    if isinstance(value, dict | BaseModel):
        return ""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f" (it is {text if len(text) <= 60 else text[:60] + '...'})"
