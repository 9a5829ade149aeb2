"""What is wrong, in an operator's words: the key's path, what it must be, and what may have been meant.

`explain` translates pydantic's errors; `print_problems` is how every command shows a ConfigError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TextIO, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gateway.config.errors import ConfigError, KeyPath, did_you_mean

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_QUOTED = re.compile(r"'([^']*)'")
_WORDS = {
    "missing": "is required",
    "model_type": "must be a table",
    "dataclass_type": "must be a table",
    "dict_type": "must be a table",
    "mapping_type": "must be a table",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "frozen_set_type": "must be a list",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number",
}


def explain(error: ValidationError, kind: type, data: object) -> dict[KeyPath, str]:
    """One message for each path of `data`, which was to become a `kind`."""
    messages: dict[KeyPath, list[str]] = {}
    details = [(_path_in(data, detail, kind), detail) for detail in error.errors(include_url=False)]
    for path, detail in details:
        # pydantic counts the good elements only: a list with a bad one is then also "too short".
        if detail["type"] == "too_short" and any(path in (other[:-1], other[:-2]) for other, _ in details):
            continue
        messages.setdefault(path, []).append(_message(detail, kind, path))
    # Several messages for one path are the members of a union: any of them would do.
    return {path: " or ".join(dict.fromkeys(texts)) for path, texts in messages.items()}


def print_problems(error: ConfigError, stream: TextIO) -> None:
    """Each problem as one line, then the line of the file with a caret below the place."""
    for problem in error.problems:
        print(problem, file=stream)
        if excerpt := problem.origin.excerpt.rstrip():
            # A tab before the caret must be as wide as the one above it.
            before = "".join("\t" if char == "\t" else " " for char in excerpt[: problem.origin.column - 1])
            print(f"    {excerpt}\n    {before}^", file=stream)


def _path_in(data: Any, detail: ErrorDetails, kind: type) -> KeyPath:
    """The location in an error without what pydantic adds for unions and keys of mappings."""
    path: KeyPath = ()
    for part in detail["loc"]:
        is_index = isinstance(data, list) and part in range(len(data))
        is_given = is_index or (isinstance(data, dict) and part in data)
        # A key that is required, or whose default is bad, is not given but known.
        if not is_given and part not in _keys(kind, path):
            break
        data = data[part] if is_given else None
        path = (*path, part)
    return path


def _message(detail: ErrorDetails, kind: type, path: KeyPath) -> str:
    context: dict[str, Any] = detail.get("ctx", {})
    match detail["type"]:
        case "value_error":
            return str(context["error"])
        case unknown if unknown in _UNKNOWN:
            return f"unknown key{did_you_mean(str(path[-1]), _keys(kind, path[:-1]))}"
        case "enum" | "literal_error":
            words = tuple(_QUOTED.findall(context["expected"]))
            given = detail["input"]
            return f"must be one of {', '.join(words)}{did_you_mean(given, words) if isinstance(given, str) else ''}"
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case other:
            return _WORDS.get(other) or detail["msg"].replace("Input should be", "must be").replace(
                "a valid ", "a "
            )


def _keys(kind: object, path: KeyPath) -> Mapping[str, object]:
    """The keys that the table at a path below a type may have, with their types."""
    members: Mapping[str, object]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        members = {name: field.annotation for name, field in kind.model_fields.items()}
    elif isinstance(kind, type) and is_dataclass(kind):
        members = get_type_hints(kind)
    else:
        # A list or a mapping takes one step of the path; a union or an annotation takes none.
        is_container = isinstance(get_origin(kind), type) and issubclass(
            get_origin(kind) or object, Sequence | Mapping
        )
        below = path[1:] if is_container else path
        return next((keys for argument in get_args(kind) if (keys := _keys(argument, below))), {})
    return _keys(members.get(str(path[0])), path[1:]) if path else members
