"""policy_service: asks a service that speaks the policy delegation protocol of Postfix, at RCPT.

Each question has a connection of its own, which ends with the answer. That there is none is no exception: it is what
`on_outage` is for. What the client said goes to the service without line ends, which would be more attributes.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.api import (
    Policy,
    Recipient,
    Reply,
    Services,
    Transaction,
    Trust,
    Verdict,
    defer,
    proceed,
    reject,
)

REFUSED = Reply(550, "5.7.1", "Refused by local policy")
REFUSED_NOW = Reply(450, "4.7.1", "Refused by local policy for now")

_MAX_ANSWER_BYTES = 4096
_MAX_TEXT = 300
_CONTROLS = re.compile(r"[^\x20-\x7e]+")
_CODE = re.compile(r"([45])\d\d (?:([45]\.\d{1,3}\.\d{1,3}) )?(.*)")


class OnOutage(StrEnum):
    """What becomes of mail without an answer."""

    CONTINUE = "continue"
    DEFER = "defer"


@dataclass(frozen=True, slots=True)
class PolicyServiceSettings:
    """[policy.policy_service.settings]."""

    host: str = field(default="127.0.0.1", metadata={"doc": "where the service listens"})
    port: int = field(default=10040, metadata={"doc": "its port"})
    deadline_s: float = field(default=3.0, metadata={"doc": "seconds for connection and answer together"})
    on_outage: OnOutage = field(default=OnOutage.CONTINUE, metadata={"doc": "without an answer"})


class PolicyService(Policy[PolicyServiceSettings]):
    """One question for each recipient."""

    name = "policy_service"
    Settings = PolicyServiceSettings
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)

    def __init__(self, settings: PolicyServiceSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._outages = services.metrics.counters("outages_total", "Questions without an answer").labels()

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        """What the service says of this recipient."""
        try:
            async with asyncio.timeout(self.settings.deadline_s):
                answer = await self._ask(question(tx, rcpt))
        except (OSError, TimeoutError, ValueError) as exc:
            self._outages.inc()
            self.services.log.warning("service.failed", tx=tx.id, error=repr(exc))
            if self.settings.on_outage is OnOutage.DEFER:
                return defer("service_outage", REFUSED_NOW)
            return proceed(reason="service_outage")
        return verdict(answer)

    async def _ask(self, asked: bytes) -> str:
        """The action. Raises OSError, and ValueError for what is no answer."""
        reader, writer = await asyncio.open_connection(self.settings.host, self.settings.port)
        try:
            writer.write(asked)
            answer = b""
            while b"\n\n" not in answer:
                more = await reader.read(_MAX_ANSWER_BYTES)
                answer += more
                if not more or len(answer) > _MAX_ANSWER_BYTES:
                    raise ValueError(f"{answer[:80]!r} is no answer")
        finally:
            writer.close()
        for line in answer.decode("utf-8", "replace").splitlines():
            name, _, value = line.partition("=")
            if name == "action":
                return value.strip()
        raise ValueError(f"{answer[:80]!r} has no action")


def question(tx: Transaction, rcpt: Recipient) -> bytes:
    """The attributes of SMTPD_POLICY_README that are known at RCPT."""
    session, mail_from = tx.session, tx.envelope.mail_from
    attributes = {
        "request": "smtpd_access_policy",
        "protocol_state": "RCPT",
        "protocol_name": "ESMTP" if session.esmtp else "SMTP",
        "instance": tx.id,
        "client_address": str(session.client),
        "client_port": str(session.port),
        "helo_name": session.helo,
        "sender": "" if mail_from is None else mail_from.text,
        "recipient": rcpt.mailbox.text,
        "size": str(tx.envelope.size_hint),
        "encryption_protocol": session.tls.version if session.tls else "",
        "encryption_cipher": session.tls.cipher if session.tls else "",
    }
    lines = [f"{name}={value}".replace("\r", " ").replace("\n", " ") for name, value in attributes.items()]
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


def verdict(action: str) -> Verdict:
    """The verdict of an action; its text goes to the client as printable ASCII."""
    word, _, text = action.partition(" ")
    if code := _CODE.fullmatch(action):
        kind, enhanced, text = code[1], code[2] or "", code[3]
    else:
        kind = {"REJECT": "5", "DEFER": "4", "DEFER_IF_PERMIT": "4"}.get(word.upper(), "")
        enhanced = ""
    clean = _CONTROLS.sub(" ", text).strip()[:_MAX_TEXT]
    fits = enhanced if enhanced.startswith(kind) else ""
    if kind == "5":
        return reject("service_refused", Reply(550, fits or "5.7.1", clean) if clean else REFUSED)
    if kind == "4":
        return defer("service_deferred", Reply(450, fits or "4.7.1", clean) if clean else REFUSED_NOW)
    return proceed()
