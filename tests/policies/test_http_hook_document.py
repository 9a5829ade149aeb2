"""docs/http-hook.md: its schemas are what is asked and answered, and its service is right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # no stubs are wanted for one test
import pytest

from gateway.api import AuthResult, HttpResponse, Result, Stage
from gateway.testing import Harness, HttpRequest
from gateway.testing.mail import compose
from policies.http_hook import HttpHook, HttpHookSettings, verdict

TEXT = (Path(__file__).parents[2] / "docs" / "http-hook.md").read_text("utf-8")
SCHEMAS = {
    name: jsonschema.Draft202012Validator(json.loads(text))
    for name, text in re.findall(r"^```json schema (\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
}
(SERVICE,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SPF = AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", "ann@client.example"),))


def service() -> Any:
    """The module of the document's service."""
    names: dict[str, Any] = {"__name__": "hook"}
    exec(SERVICE, names)
    return names["judge"]


def closed(schema: Any) -> Any:
    """The same schema, in which no other members may be."""
    if isinstance(schema, dict):
        more = {"additionalProperties": False} if "properties" in schema else {}
        return {**more, **{key: closed(value) for key, value in schema.items()}}
    return schema


@pytest.mark.parametrize("mail_from", ["", "jörg@bücher.example"])
def test_what_is_asked_is_what_the_schema_says_and_the_service_answers_by_its_own(mail_from: str) -> None:
    judge = service()
    asked: list[Any] = []

    def answer(request: HttpRequest) -> HttpResponse:
        asked.append(json.loads(request.content))
        said = judge(asked[-1])
        SCHEMAS["answer"].validate(said)
        return HttpResponse(200, json.dumps(said).encode())

    settings = HttpHookSettings("http://127.0.0.1:8080/judge", stages=tuple(Stage), send_content=True)
    with Harness(HttpHook, settings, results=[SPF]) as harness:
        harness.http.answer = answer
        rcpts = ["old@example.org", "new@example.org"]
        content = compose(subject="Your Invoice")
        played = harness.deliver(content, mail_from=mail_from, rcpts=rcpts)
    assert [each.code for each in played.replies] == [250, 551, 250, 250]
    assert played.message is not None
    assert b"X-Seen-By-Hook: invoice\r\n" in played.message
    schema = jsonschema.Draft202012Validator(closed(SCHEMAS["request"].schema))
    for each in asked:
        schema.validate(each)
    assert {each["stage"] for each in asked} == set(Stage)


def test_the_example_of_an_answer_is_one() -> None:
    (example,) = re.findall(r"For example `(.*?)`", TEXT)
    SCHEMAS["answer"].validate(json.loads(example))
    assert str(verdict(HttpResponse(200, example.encode())).reply) == "550 5.7.1 No invoices"
