"""gateway.config.locate: every key is found where it was written, and no text makes it fail."""

import json
import time
import tomllib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.errors import KeyPath
from gateway.config.locate import locate, parse_key
from gateway.config.render import toml_value

KEYS = st.text("abcXYZ012_-", min_size=1, max_size=4) | st.text(max_size=4)
SCALARS = (
    st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["#", "]", '"', "'''", '"""', "a = 1"])
)


def tables(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(KEYS, values, max_size=3)


VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | tables(inner), max_leaves=8)


@dataclass
class Writer:
    """Writes a tree as TOML, in a style that a test draws, and remembers where it put each key."""

    data: st.DataObject
    text: str = ""
    places: dict[KeyPath, int] = field(default_factory=dict)

    def chance(self) -> bool:
        return self.data.draw(st.booleans())

    def key(self, name: str) -> str:
        if name and name.isascii() and name.replace("_", "a").replace("-", "a").isalnum() and self.chance():
            return name
        if name and "'" not in name and name.isprintable() and self.chance():
            return f"'{name}'"
        return toml_value(name)

    def blank(self) -> str:
        return self.data.draw(st.sampled_from(["", " ", "\t", "\n", "\r\n", "# k = [\n", " # 'x\n\n"]))

    def table(self, table: dict[str, Any], path: KeyPath, headers: tuple[str, ...]) -> None:
        below = {}
        for name, value in table.items():
            if self.is_headed(value) and self.chance():
                below[name] = value
            else:
                self.text += self.data.draw(st.sampled_from(["", " ", "\n", "# x\n"]))
                self.pair(name, value, path)
                self.text += self.data.draw(st.sampled_from(["\n", " # c\n", "\r\n"]))
        for name, value in below.items():
            keys = (*headers, self.key(name))
            if isinstance(value, dict):
                self.header("[", ".".join(keys), "]", (*path, name))
                self.table(value, (*path, name), keys)
                continue
            for index, element in enumerate(value):
                self.places.setdefault((*path, name), len(self.text))
                self.header("[[", " . ".join(keys), "]]", (*path, name, index))
                self.table(element, (*path, name, index), keys)

    def header(self, opening: str, keys: str, closing: str, path: KeyPath) -> None:
        self.places[path] = len(self.text)
        self.text += f"{opening} {keys} {closing}\n"

    def is_headed(self, value: object) -> bool:
        is_array = isinstance(value, list) and value and all(isinstance(element, dict) for element in value)
        return isinstance(value, dict) or bool(is_array)

    def pair(self, name: str, value: object, path: KeyPath) -> None:
        here = len(self.text)
        self.text += self.key(name)
        path = (*path, name)
        # A table of one key may be written as a dotted key, which stands for its whole path.
        while isinstance(value, dict) and len(value) == 1 and self.chance():
            ((name, value),) = value.items()
            self.text += f" . {self.key(name)}"
            path = (*path, name)
        self.places[path] = here
        self.text += self.data.draw(st.sampled_from(["=", " = "]))
        self.value(value, path)

    def value(self, value: object, path: KeyPath) -> None:
        match value:
            case dict():
                self.text += "{ "
                for index, (name, below) in enumerate(value.items()):
                    self.text += ", " if index else ""
                    self.pair(name, below, path)
                self.text += " }"
            case list():
                self.text += "["
                for index, below in enumerate(value):
                    self.text += self.blank()
                    self.places[(*path, index)] = len(self.text)
                    self.value(below, (*path, index))
                    self.text += self.blank() + ("," if index < len(value) - 1 or self.chance() else "")
                self.text += self.blank() + "]"
            case str() if value.isprintable() and "'" not in value and self.chance():
                self.text += self.data.draw(
                    st.sampled_from([f"'{value}'", f"'''{value}'''", f"'''\n{value}'''"])
                )
            case str():
                quoted = toml_value(value)
                self.text += self.data.draw(
                    st.sampled_from([quoted, f'""{quoted}""', f'""{quoted[:-1]}""""""'[:-1]])
                )
            case _:
                self.text += toml_value(value)


def offsets(text: str) -> dict[KeyPath, int]:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return {path: starts[line - 1] + column - 1 for path, (line, column) in locate(text).items()}


@given(tables(VALUES), st.data())
def test_every_key_of_toml_is_found_where_it_was_written(tree: dict[str, Any], data: st.DataObject) -> None:
    writer = Writer(data)
    writer.table(tree, (), ())
    tomllib.loads(writer.text)  # the writer writes TOML
    assert offsets(writer.text) == writer.places


@given(tables(VALUES), st.sampled_from([None, 0, 2]))
def test_every_key_of_json_is_found_where_it_was_written(tree: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(tree, indent=indent)
    found = offsets(text)
    assert set(found) == set(paths(tree, ()))
    for path, offset in found.items():
        if isinstance(path[-1], str):
            assert text[offset:].startswith(json.dumps(path[-1]))


def paths(value: object, path: KeyPath) -> list[KeyPath]:
    below: list[tuple[str | int, object]] = []
    match value:
        case dict():
            below = [*value.items()]
        case list():
            below = [*enumerate(value)]
    here = [path] if path else []
    return [*here, *(each for key, inner in below for each in paths(inner, (*path, key)))]


@given(st.text("ab.=:[]{}\"'\\#, \t\r\n") | st.text())
def test_no_text_makes_it_fail(text: str) -> None:
    for position in locate(text).values():
        assert 1 <= position.line <= text.count("\n") + 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000,
        "a = " + "[{a=" * 10_000,
        '"' * 300_000,
        "a = '''" * 50_000,
        "a=1\n" * 50_000,
        "#" * 300_000,
    ],
)
def test_it_is_linear_in_the_text(text: str) -> None:
    started = time.process_time()
    locate(text)
    assert time.process_time() - started < 3


def test_arrays_of_tables_and_their_children_are_found() -> None:
    text = "[[relay.routes]]\ntls = 1\n[relay.routes.x]\ny = 1\n[[relay.routes]]\n  tls = 2\n"
    found = locate(text)
    assert found["relay", "routes"] == (1, 1)
    assert found["relay", "routes", 0, "x", "y"] == (4, 1)
    assert found["relay", "routes", 1, "tls"] == (6, 3)


@pytest.mark.parametrize(
    "value", ['"""x"""""', '"""x\\\\"""', "'''x'''''", '"""\n# \\"""\n[b]"""', "1979-05-27 07:32:00"]
)
def test_the_key_behind_a_value_is_found(value: str) -> None:
    text = f"a = {value}\nkey = 1\n"
    assert tomllib.loads(text)["key"] == 1
    assert offsets(text)["key",] == text.index("key")


@pytest.mark.parametrize(
    ("text", "parts", "end"),
    [
        ("a.b=1", ("a", "b"), 3),
        ('a."b.c" . d = 1', ("a", "b.c", "d"), 11),
        ("'x y'.\"\\u00e4\"=", ("x y", "ä"), 14),
    ],
)
def test_a_dotted_key_is_taken_apart(text: str, parts: tuple[str, ...], end: int) -> None:
    assert parse_key(text) == (parts, end)


@pytest.mark.parametrize("text", ["", "=1", " a=1", "[a]"])
def test_what_begins_with_no_key_has_none(text: str) -> None:
    assert parse_key(text) is None
