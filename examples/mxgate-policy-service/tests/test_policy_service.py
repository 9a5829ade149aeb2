"""policy_service: what is asked, what the answers mean, and what becomes of mail without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from mxgate_policy_service import (
    REFUSED,
    REFUSED_NOW,
    OnOutage,
    PolicyService,
    PolicyServiceSettings,
    verdict,
)

from gateway.api import Action
from gateway.testing import Client, Harness, Played, PolicyContract

NOBODY = PolicyServiceSettings(port=1, deadline_s=1)


class TestContract(PolicyContract):
    """Without a service: the contract is about mail, which goes on."""

    policy = PolicyService
    settings = NOBODY


@asynccontextmanager
async def service(answer: bytes, asked: list[bytes]) -> AsyncIterator[int]:
    """A service that gives one answer to everything; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\n\n"))
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def played(answer: bytes, asked: list[bytes] | None = None) -> Played:
    """One session with such a service."""

    async def play() -> Played:
        async with service(answer, [] if asked is None else asked) as port:
            settings = PolicyServiceSettings(port=port, on_outage=OnOutage.DEFER, deadline_s=5)
            harness = Harness(PolicyService, settings)
            return await harness.play(
                client=Client("2001:db8::1", "a.example\nrecipient=x"),
                mail_from="",
                rcpts=["bob@example.org"],
            )

    return asyncio.run(play())


def test_the_question_has_what_is_known_and_no_attribute_of_the_clients_making() -> None:
    asked: list[bytes] = []
    assert played(b"action=DUNNO\n\n", asked).reply.code == 250
    (lines,) = [each.decode().splitlines() for each in asked]
    assert lines[0] == "request=smtpd_access_policy"
    assert "client_address=2001:db8::1" in lines
    assert "helo_name=a.example recipient=x" in lines
    assert "sender=" in lines
    assert [line for line in lines if line.startswith("recipient=")] == ["recipient=bob@example.org"]
    assert lines[-1] == ""


@pytest.mark.parametrize(
    ("action", "code", "text"),
    [
        ("REJECT", 550, str(REFUSED)),
        ("reject Not today", 550, "550 5.7.1 Not today"),
        ("DEFER_IF_PERMIT Greylisted\x00", 450, "450 4.7.1 Greylisted"),
        ("554 5.7.9 Go away", 550, "550 5.7.9 Go away"),
        ("451 4.3.5 Later", 450, "450 4.3.5 Later"),
        ("554 4.7.9 Go away", 550, "550 5.7.1 Go away"),
        ("DUNNO", 0, ""),
        ("OK", 0, ""),
        ("PREPEND X-Spam: yes", 0, ""),
        ("", 0, ""),
    ],
)
def test_an_action_is_a_verdict(action: str, code: int, text: str) -> None:
    found = verdict(action)
    assert (found.reply.code if found.reply else 0) == code
    assert str(found.reply or "") == text
    assert (found.action is Action.CONTINUE) == (not code)


@pytest.mark.parametrize(
    "answer", [b"", b"action=REJECT\n", b"\n\n", b"x" * 5000, b"action=REJECT", b"\xff\n\n"]
)
def test_what_is_no_answer_is_an_outage(answer: bytes) -> None:
    assert played(answer).reply == REFUSED_NOW


def test_without_a_service_mail_goes_on_and_is_counted() -> None:
    with Harness(PolicyService, NOBODY) as harness:
        assert harness.deliver().reply.code == 250
        assert harness.metrics["mxgate_policy_service_outages_total"] == 1
        (line,) = harness.log.of("warning")
    assert (line.event, line.keys["policy"]) == ("service.failed", "policy_service")
