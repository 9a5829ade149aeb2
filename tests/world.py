"""A gatekeeper with everything around it and a client's part to play: what tests of whole sessions share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from ipaddress import ip_address
from typing import Any

from gateway.decision import DecisionRing
from gateway.gatekeeper import Answer, Conversation, Gatekeeper, GatekeeperSettings
from gateway.mail.body import Spool
from gateway.plan import Step
from gateway.policy import Policy
from gateway.session import Envelope, Recipient, TlsInfo
from gateway.smtp import reply
from gateway.smtp.address import parse_forward_path, parse_reverse_path
from gateway.smtp.content import stuff
from gateway.smtp.reply import Reply
from gateway.verdict import Stage
from tests.fakes import FakeRelay, FakeServices, pipeline_of

CLIENT = ip_address("192.0.2.1")
TLS = TlsInfo("TLSv1.3", "TLS_AES_128_GCM_SHA256")
LATER = Reply(450, "4.7.1", "Later")
NEVER = Reply(550, "5.7.1", "Never")
UNKNOWN = Reply(550, "5.1.1", "Who is that?")
MESSAGE = b"From: a@client.example\r\nSubject: x\r\n\r\n.dot\r\nbody\r\n"
AUTHRES = b"Authentication-Results: mx.example.org; none\r\n"
RECEIVED = (
    b"Received: from client.example ([192.0.2.1])\r\n"
    b"\tby mx.example.org with ESMTP id T1-1\r\n"
    b"\tfor <b@example.org>;\r\n"
    b"\tTue, 14 Nov 2023 22:13:20 +0000\r\n"
)
ABOVE = AUTHRES + RECEIVED
"""What we write above a message of which no policy says anything."""
EARLY = [Stage.CONNECT, Stage.EHLO, Stage.MAIL]


def rcpt(text: str) -> Recipient:
    return Recipient(parse_forward_path(f"<{text}>", smtputf8=True))


def envelope(mail_from: str = "a@client.example") -> Envelope:
    return Envelope(parse_reverse_path(f"<{mail_from}>", smtputf8=True))


class World:
    """A gatekeeper with everything around it; its methods play a client's part."""

    def __init__(
        self,
        *policies: Policy[Any] | Step,
        settings: GatekeeperSettings | None = None,
        spool: Spool | None = None,
        services: FakeServices | None = None,
        decisions: DecisionRing | None = None,
    ) -> None:
        self.services = services or FakeServices()
        self.relay = FakeRelay()
        self.spool = spool or Spool(memory_bytes=1000)
        settings = settings or GatekeeperSettings("mx.example.org")
        ids = iter(["T1", "T2", "T3"])
        reserved = frozenset([settings.quarantine_header.lower()])
        self.pipeline = pipeline_of(self.services, *policies, reserved=reserved)
        self.gate = Gatekeeper(
            settings, self.pipeline, self.relay, self.spool, self.services, lambda: next(ids), decisions
        )

    @property
    def lines(self) -> list[tuple[str, dict[str, Any]]]:
        return [(line.event, line.keys) for line in self.services.log.of("info")]

    def count(self, name: str) -> dict[str, int]:
        """What was counted by action, whoever decided it and why."""
        counted: Counter[str] = Counter()
        for (action, *_), value in self.services.metrics.of(f"mxgate_{name}_total").items():
            counted[action] += int(value)
        return counted

    async def greet(self) -> Conversation:
        talk = self.gate.open(CLIENT, 1234)
        assert await talk.connect() is None
        assert await talk.ehlo("client.example", esmtp=True) is None
        return talk

    async def mail(self) -> Conversation:
        talk = await self.greet()
        assert await talk.mail(envelope()) == Answer(reply.SENDER_OK)
        return talk

    async def rcpt(self, *rcpts: str) -> Conversation:
        talk = await self.mail()
        answers = await talk.rcpt([rcpt(r) for r in rcpts or ["b@example.org"]])
        assert any(r.is_positive for r in answers.replies)
        return talk

    async def content(self, message: bytes = MESSAGE, *, is_stuffed: bool = True) -> Conversation:
        talk = await self.rcpt()
        send(talk, message, is_stuffed=is_stuffed)
        return talk

    async def message(self, message: bytes = MESSAGE, *, is_stuffed: bool = True) -> Answer:
        return await (await self.content(message, is_stuffed=is_stuffed)).eom(None)


def send(talk: Conversation, message: bytes = MESSAGE, *, is_stuffed: bool = True) -> None:
    talk.begin_content(is_stuffed=is_stuffed)
    wire = stuff(message) if is_stuffed else message
    for at in range(0, len(wire), 7):
        talk.content(wire[at : at + 7])


async def started(coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """The coroutine as a task that has come as far as it can."""
    task = asyncio.ensure_future(coro)
    for _ in range(5):
        await asyncio.sleep(0)
    return task
