"""gateway.config.render: the generated reference is up to date, and nothing shown is a secret."""

import json
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # its stubs are a package more

from gateway.config import Config, load, values
from gateway.config.errors import is_secret, redact
from gateway.config.render import docs_markdown, json_schema, show, toml_value
from gateway.errors import GatewayError
from gateway.plugins import configurable
from gateway.policy import OnError, Policy
from gateway.session import Trust

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "mxgate.example.toml"


def shown(config: Config) -> dict[str, object]:
    return {".".join(map(str, key.path)): key.value for key in show(config)}


def test_the_reference_is_up_to_date() -> None:
    """If this fails: ./.venv/bin/mxgate config docs > docs/configure.md."""
    assert (ROOT / "docs/configure.md").read_text() == docs_markdown(configurable()[0])


def test_the_reference_has_every_key_with_its_meaning() -> None:
    text = docs_markdown(configurable()[0])
    for line in text.splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), line
    assert "| `idle_timeout_s` | `300` | > 0, ≤ 3600 seconds | Wait for the next command. |" in text


def test_the_schema_refuses_unknown_keys_and_writes_defaults_as_operators_do() -> None:
    schema = json_schema(configurable()[0])
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]
    assert all(each["additionalProperties"] is False for each in definitions.values() if "properties" in each)
    assert definitions["Server"]["properties"]["listen"]["default"] == ["0.0.0.0:25"]
    assert definitions["Admin"]["properties"]["listen"]["default"] == "127.0.0.1:9464"
    assert definitions["Server"]["properties"]["idle_timeout_s"]["exclusiveMinimum"] == 0
    json.dumps(schema)


def test_what_is_shown_can_be_loaded_again(tmp_path: Path) -> None:
    config = load(EXAMPLE, environ={"MXGATE__POLICY__SPF__SETTINGS": "{ a = [1, 'x'], b.c = 1.5 }"})
    path = tmp_path / "again.toml"
    path.write_text(
        "".join(f"{'.'.join(map(str, key.path))} = {toml_value(key.value)}\n" for key in show(config))
    )
    assert load(path, environ={}).model_dump() == config.model_dump()


def test_downstreams_are_shown_as_they_would_be_written(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    for downstream in (["mta:25", "[2001:db8::1]:25"], [["mta:25"], ["mta2:25", "192.0.2.1:25"]]):
        path.write_text(
            EXAMPLE.read_text().replace('downstream = ["10.0.0.5:25"]', f"downstream = {downstream}")
        )
        routes: Any = shown(load(path, environ={}))["relay.routes"]
        assert routes[0]["downstream"] == downstream


def test_the_schema_takes_downstreams_and_groups_of_them() -> None:
    downstream = json_schema()["$defs"]["Route"]["properties"]["downstream"]
    assert [each["items"]["type"] for each in downstream["anyOf"]] == ["string", "array"]
    assert downstream["description"].startswith("Downstream MTAs")


def test_secrets_are_hidden_and_variables_are_shown_as_written(tmp_path: Path) -> None:
    path = tmp_path / "mxgate.toml"
    path.write_text(
        EXAMPLE.read_text()
        + """
[policy.callout]
mode = "off"
settings = { api_key = "hunter2", nested = [{ password = "hunter2" }], key_file = "/k", host = "${CALLOUT_HOST}" }
"""
    )
    config = load(
        path, environ={"CALLOUT_HOST": "hunter2", "MXGATE__STATE__URL": "redis://:hunter2@redis:6379/0"}
    )
    values = shown(config)
    assert "hunter2" not in str(values)
    assert values["state.url"] == "redis://***@redis:6379/0"
    assert values["policy.callout.settings.api_key"] == "***"
    assert values["policy.callout.settings.nested"] == [{"password": "***"}]
    assert values["policy.callout.settings.key_file"] == "/k"
    assert values["policy.callout.settings.host"] == "${CALLOUT_HOST}"


def test_names_of_secrets_are_known() -> None:
    assert all(map(is_secret, ("password", "api_key", "apikey", "auth_token", "client-secret")))
    assert not any(map(is_secret, ("token_file", "key", "secretary", "tokens_per_s")))


def test_excerpts_lose_their_secrets() -> None:
    assert redact('url = "redis://user:pw@host/0"') == 'url = "redis://***@host/0"'
    assert redact('settings.password = "x"  # y') == "settings.password = ***"
    for name in ("api_keyx", "pasword", "upstream_tokens", "db_passwrod", "clientsecret", "private_key"):
        assert redact(f'a = 1, {name} = "x"') == f"a = 1, {name} = ***"
        assert redact(f'{{"{name}": "x"}}') == f'{{"{name}": ***'
    for line in ('token_file = "/etc/x"', "domains = [1]", 'url = "redis://host/0"', 'key_file = "x"'):
        assert redact(line) == line
    assert redact('{ "token": "x" }') == '{ "token": ***'
    assert redact('token_file = "/run/token"') == 'token_file = "/run/token"'


@given(
    st.recursive(
        st.integers() | st.text() | st.floats(allow_nan=False), lambda each: st.dictionaries(st.text(), each)
    )
)
def test_every_plain_value_is_written_as_toml(value: object) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


# What a parser takes has to fit the pattern of the JSON schema too, which others check with.
WRITTEN = (
    "example.org",
    "example.org.",
    ".example.org",
    "bücher.example",
    "*",
    "192.0.2.1",
    "192.0.2.0/24",
    "2001:db8::/32",
    "::1",
    "fe80::1%eth0",
    "0.0.0.0:25",
    "[::]:25",
    "[fe80::1%eth0]:25",
    "mta:25",
    "mta.example.org.:25",
    "mta",
    "https://example.org",
    "ann@example.org",
    "10.0.0.5/33",
)


@pytest.mark.parametrize(
    ("table", "key", "parse"),
    [
        ("Server", "hostname", values.parse_domain),
        ("Server", "listen", values.parse_listen),
        ("Server", "proxy_protocol_from", values.parse_network),
        ("Relay", "domains", values.parse_domain_or_subdomains),
        ("Route", "domains", values.parse_domain_pattern),
        ("Route", "downstream", values.parse_downstream),
    ],
)
def test_the_schema_takes_what_the_gateway_takes(
    table: str, key: str, parse: Callable[[object], object]
) -> None:
    schema = json_schema()["$defs"][table]["properties"][key]
    own = next(iter(schema.get("anyOf", [schema])))
    pattern = own.get("items", own)["pattern"]
    taken = []
    for text in WRITTEN:
        with suppress(ValueError, GatewayError):
            parse(text)
            taken.append(text)
    assert taken
    assert [text for text in taken if not re.search(pattern, text)] == []
    assert re.search(pattern, "${NAME}")
    assert not re.search(pattern, "https://example.org")


# --- the settings of policies ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    zone: str = field(metadata={"doc": "where | it is"})
    weight: float = field(default=1.5, metadata={"doc": "how much"})


@dataclass(frozen=True)
class TheirSettings:
    name_s: float = field(default=2e6, metadata={"doc": "how long"})
    many: tuple[Inner, ...] = field(default=(), metadata={"doc": "several"})
    one: Inner = field(default=Inner("x"), metadata={"doc": "one alone"})
    file: Path | None = field(default=None, metadata={"doc": "a file"})
    words: tuple[str, ...] = field(default=("a",), metadata={"doc": "words"})
    on_error: OnError = field(default=OnError.DEFER, metadata={"doc": "what follows"})
    is_on: bool = field(default=False, metadata={"doc": "whether"})


class Theirs(Policy[TheirSettings]):
    """Does this. And that."""

    name = "theirs"
    Settings = TheirSettings
    timeout_s = 3.5
    exempt = (Trust.TRUSTED,)


def test_settings_of_any_policy_are_in_the_reference() -> None:
    text = docs_markdown({"theirs": Theirs})
    section = text[text.index("## `[policy.theirs.settings]`") :]
    for line in (
        (
            "Does this. And that. Unless `[policy.theirs]` says otherwise: `timeout_s = 3.5`, "
            '`on_error = "continue"`, `exempt = ["trusted"]`.'
        ),
        "| `name_s` | `2000000` | seconds | how long |",
        "| `many` | `[]` |  | several |",
        '| `file` | `""` |  | a file |',
        '| `words` | `["a"]` |  | words |',
        '| `on_error` | `"defer"` | `continue`, `defer` | what follows |',
        "| `is_on` | `false` | `true`, `false` | whether |",
        "### `[[policy.theirs.settings.many]]`",
        "### `[policy.theirs.settings.one]`",
        "| `zone` | required |  | where \\| it is |",
        "| `weight` | `1.5` |  | how much |",
    ):
        assert line in section.splitlines()


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        ({"settings": {"name_s": 5, "many": [{"zone": "a"}], "file": "/x", "on_error": "defer"}}, ""),
        ({"domains": {"example.org": {"settings": {"is_on": True}}}}, ""),
        ({"settings": {"nam_s": 5}}, "nam_s"),
        ({"settings": {"name_s": "long"}}, "long"),
        ({"settings": {"many": [{"weight": 1}]}}, "zone"),
        ({"settings": {"one": {"zone": "a", "colour": 1}}}, "colour"),
        ({"settings": {"on_error": "reject"}}, "reject"),
        ({"domains": {"example.org": {"settings": {"is_off": True}}}}, "is_off"),
        ({"mode": "on"}, "on"),
    ],
)
def test_settings_of_any_policy_are_in_the_schema(section: dict[str, Any], wrong: str) -> None:
    schema = json_schema({"theirs": Theirs})
    config = {"relay": {"routes": [{"downstream": ["a:25"]}]}, "policy": {"theirs": section}}
    errors = [error.message for error in Draft202012Validator(schema).iter_errors(config)]
    assert bool(errors) is bool(wrong)
    assert wrong in " ".join(errors)
    described = schema["properties"]["policy"]["properties"]["theirs"]["properties"]["settings"]
    assert described["properties"]["name_s"]["description"] == "how long"


def test_the_example_is_right_by_the_schema_with_all_settings() -> None:
    schema = json_schema(configurable()[0])
    config = tomllib.loads(EXAMPLE.read_text())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(config)] == []
    for name, policy in configurable()[0].items():
        assert name in schema["properties"]["policy"]["properties"], policy


def test_settings_that_json_cannot_tell_are_left_out_of_the_schema() -> None:
    @dataclass(frozen=True)
    class Odd:
        call: Callable[[], int] = field(default=int, metadata={"doc": "called"})

    odd: Any = type("OddPolicy", (Policy,), {"name": "odd", "Settings": Odd})
    assert "odd" not in json_schema({"odd": odd})["properties"]["policy"]["properties"]
    assert "| `call` |" in docs_markdown({"odd": odd})
