"""The settings of policies as text: their part of the reference of all keys, and of the JSON schema.

A policy's Settings is a dataclass whose fields are documented with `field(metadata={"doc": ...})`; nothing else has to
be written for either. Called by render.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from enum import Enum, StrEnum
from pathlib import PurePath
from typing import Any

from pydantic import PydanticInvalidForJsonSchema, PydanticUserError, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from gateway.config.errors import quoted
from gateway.policy import Policy

Policies = Mapping[str, type[Policy[Any]]]
_UNITS = {"_s": "seconds", "_bytes": "bytes"}


def add_settings(
    schema: dict[str, Any], policies: Policies, generator: type[GenerateJsonSchema]
) -> dict[str, Any]:
    """The schema of the configuration, in which the settings of these policies are what they take."""
    definitions, properties = dict(schema.get("$defs", {})), {}
    for name, policy in policies.items():
        try:
            settings = TypeAdapter(policy.Settings).json_schema(
                ref_template=f"#/$defs/{name}.{{model}}", schema_generator=generator
            )
        except (PydanticUserError, PydanticInvalidForJsonSchema):
            continue  # types that JSON cannot tell; the start checks them all the same
        below = settings.pop("$defs", {})
        described = {each.__name__: each for each in _dataclasses_in(policy.Settings)}
        for kind, each in (*below.items(), (policy.Settings.__name__, settings)):
            if kind in described:
                _describe(each, described[kind])
        definitions |= {f"{name}.{kind}": each for kind, each in below.items()}
        # for a domain: some of them
        some = {key: value for key, value in settings.items() if key != "required"}
        properties[name] = {
            "properties": {
                "settings": settings,
                "domains": {"additionalProperties": {"properties": {"settings": some}}},
            }
        }
    policy_key = {**schema["properties"]["policy"], "properties": properties}
    return {
        **schema,
        "$defs": definitions,
        "properties": {**schema["properties"], "policy": policy_key},
    }


def settings_tables(policies: Policies) -> Iterator[str]:
    """The reference: for each policy what it is, the defaults of the engine's keys, and a table of its settings."""
    for name, policy in policies.items():
        yield f"## `[policy.{name}.settings]`\n"
        yield f"{_first_line(policy)} {_engine_defaults(policy)}\n"
        yield from _tables(f"policy.{name}.settings", policy.Settings)


def _engine_defaults(policy: type[Policy[Any]]) -> str:
    exempt = ", ".join(f'"{each}"' for each in policy.exempt)
    return (
        f"Unless `[policy.{policy.name}]` says otherwise: `timeout_s = {policy.timeout_s:g}`, "
        f'`on_error = "{policy.on_error}"`, `exempt = [{exempt}]`.'
    )


def _first_line(policy: type[Policy[Any]]) -> str:
    return (policy.__doc__ or "").strip().partition("\n")[0] if "__doc__" in vars(policy) else ""


def _tables(path: str, settings: type) -> Iterator[str]:
    fields = dataclasses.fields(settings)
    if not fields:
        yield "It has none.\n"
        return
    hints = typing.get_type_hints(settings)
    yield "| key | default | allowed | meaning |\n|---|---|---|---|"
    below = []
    for each in fields:
        inner = [
            kind
            for kind in _kinds(hints[each.name])
            if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        ]
        default = _cell(_default(each))
        meaning = _cell(str(each.metadata.get("doc", "")))
        yield f"| `{each.name}` | {default} | {_allowed(each.name, hints[each.name])} | {meaning} |"
        where = f"[{path}.{each.name}]" if inner == [hints[each.name]] else f"[[{path}.{each.name}]]"
        below += [(where, kind) for kind in inner]
    yield ""
    for heading, kind in below:
        where = heading.strip("[]")
        yield f"### `{heading}`\n"
        yield from _tables(where, kind)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{_written(field.default_factory())}`"
    return "required" if field.default is dataclasses.MISSING else f"`{_written(field.default)}`"


def _written(value: object) -> str:
    match value:
        case None:
            return quoted("")
        case bool():
            return str(value).lower()
        case float():
            return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        case int():
            return str(value)
        case Enum():
            return _written(value.value)
        case PurePath() | str():
            return quoted(str(value))
        case Mapping():
            pairs = ", ".join(f"{_written(key)} = {_written(below)}" for key, below in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case tuple() | list() | frozenset():
            return f"[{', '.join(map(_written, value))}]"
        case _ if dataclasses.is_dataclass(value):
            return _written({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
        case _:
            return quoted(str(value))


def _allowed(name: str, hint: object) -> str:
    words = []
    for kind in _kinds(hint):
        if kind is bool:
            words += ["`true`", "`false`"]
        elif isinstance(kind, type) and issubclass(kind, StrEnum):
            words += [f"`{word}`" for word in kind]
    if words:
        return ", ".join(words)
    return next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")


def _kinds(hint: object) -> Iterator[Any]:
    """The types in a type, itself included."""
    yield hint
    for each in typing.get_args(hint):
        yield from _kinds(each)


def _dataclasses_in(settings: type) -> Iterator[type]:
    yield settings
    for hint in typing.get_type_hints(settings).values():
        for kind in _kinds(hint):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                yield from _dataclasses_in(kind)


def _describe(schema: dict[str, Any], settings: type) -> None:
    """What pydantic does not know of a dataclass: the words on its fields, and that it takes no other keys."""
    schema["additionalProperties"] = False
    schema.pop("description", None)
    for each in dataclasses.fields(settings):
        if (doc := each.metadata.get("doc")) and each.name in schema.get("properties", {}):
            schema["properties"][each.name]["description"] = doc


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
