"""Policies that ask a service in explained sessions: asked where there is a world, and never about a record."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.api import HttpResponse
from gateway.explain.remembered import offline
from gateway.open_http import WorkerHttp
from gateway.policy import NoSettings, Policy
from gateway.services import HttpError
from gateway.testing import FakeHttp, FakeServices, Zone
from policies.clamav import Clamav
from policies.http_hook import HttpHook
from policies.rspamd import Rspamd
from tests.explainkit import case, explained, planned_of, record_of, replayed
from tests.mailkit import compose

SETTINGS: dict[str, dict[str, object]] = {
    "http_hook": {"url": "http://hook.example/", "stages": ("connect", "ehlo", "mail", "rcpt", "eom")}
}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeHttp:
    """What all policies that ask by HTTP reach."""
    fake = FakeHttp()
    monkeypatch.setattr(WorkerHttp, "for_policy", lambda *_: fake)
    return fake


@pytest.mark.parametrize(
    ("action", "code"), [("continue", 250), ("quarantine", 250), ("defer", 451), ("reject", 550)]
)
def test_a_record_comes_to_the_same_without_the_service(service: FakeHttp, action: str, code: int) -> None:
    def answer(request: Any) -> HttpResponse:
        at_eom = b'"stage": "eom"' in request.content
        return HttpResponse(200, b'{"action": "%b"}' % (action if at_eom else "continue").encode())

    service.answer = answer
    planned = planned_of(HttpHook, settings=SETTINGS)
    live = explained(case(compose()), Zone(), planned)
    assert live.decision.reply is not None
    assert live.decision.reply.code == code
    assert len(service.requests) == 5
    again = replayed(record_of(live), planned)
    assert len(service.requests) == 5, "the service is not asked about a record"
    assert (again.differences, again.missing) == ((), ())


def test_a_world_that_is_a_zone_has_no_services(service: FakeHttp) -> None:
    planned = offline(planned_of(HttpHook, Rspamd, Clamav, settings=SETTINGS))
    live = explained(case(compose()), Zone(), planned)
    assert live.decision.reply is not None
    assert live.decision.reply.code == 250
    assert service.requests == []
    assert not {each.policy for each in live.decision.judged} & {"http_hook", "rspamd", "clamav"}


class Asks(Policy[NoSettings]):
    name = "asks"
    needs_http = True


class AsksNobody(Policy[NoSettings]):
    name = "asks_nobody"


async def test_only_who_says_so_has_a_client() -> None:
    http = WorkerHttp([Asks, AsksNobody], FakeServices())
    with pytest.raises(RuntimeError, match="needs_http"):
        await http.for_policy(AsksNobody, 1.0).request("GET", "http://127.0.0.1:1/")
    with pytest.raises(HttpError, match="connect"):
        await http.for_policy(Asks, 1.0).request("GET", "http://127.0.0.1:1/")
    await http.close()
