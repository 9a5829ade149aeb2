"""gateway.config.render: the generated reference is up to date, and nothing shown is a secret."""

import json
import tomllib
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.config import Config, load
from gateway.config.errors import is_secret, redact
from gateway.config.render import docs_markdown, json_schema, show, toml_value

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "mxgate.example.toml"


def shown(config: Config) -> dict[str, object]:
    return {".".join(map(str, key.path)): key.value for key in show(config)}


def test_the_reference_is_up_to_date() -> None:
    """If this fails: ./.venv/bin/mxgate config docs > docs/configure.md."""
    assert (ROOT / "docs/configure.md").read_text() == docs_markdown()


def test_the_reference_has_every_key_with_its_meaning() -> None:
    text = docs_markdown()
    for line in text.splitlines():
        if line.startswith("| `"):
            assert not line.endswith("|  |"), line
    assert "| `idle_timeout_s` | `300` | > 0, ≤ 3600 seconds | Wait for the next command. |" in text


def test_the_schema_refuses_unknown_keys_and_writes_defaults_as_operators_do() -> None:
    schema = json_schema()
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
