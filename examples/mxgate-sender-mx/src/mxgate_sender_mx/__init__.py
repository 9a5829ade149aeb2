"""sender_mx: whether the domain of the sender takes mail (RFC 5321 5.1, RFC 7505), as a field above the message."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.api import (
    AddField,
    Domain,
    Lookup,
    Policy,
    Question,
    Reply,
    RRType,
    Slot,
    Transaction,
    Verdict,
    proceed,
    reject,
)

# RFC 7505 4.2
NO_ANSWER_POSSIBLE = Reply(550, "5.7.27", "The domain of the sender takes no mail")
FIELD = "X-Sender-Mx"

_FOUND = Slot[str]("sender_mx")


@dataclass(frozen=True, slots=True)
class SenderMxSettings:
    """[policy.sender_mx.settings]."""

    refuse: bool = field(default=False, metadata={"doc": "refuse mail from a domain that takes none"})


def takes_mail(domain: str) -> Lookup[str]:
    """yes, no, or unknown where DNS does not answer."""
    (answer,) = yield [Question(domain, RRType.MX)]
    if answer.is_temporary:
        return "unknown"
    if answer.exchanges:
        # RFC 7505 3: a single MX of no name is "no mail here"
        return "yes" if any(mx.host for mx in answer.exchanges) else "no"
    # RFC 5321 5.1: without an MX the domain's own address takes its mail
    answers = yield [Question(domain, RRType.A), Question(domain, RRType.AAAA)]
    if any(each.addresses for each in answers):
        return "yes"
    return "unknown" if any(each.is_temporary for each in answers) else "no"


class SenderMx(Policy[SenderMxSettings]):
    """Asks at MAIL; the field is written with the message."""

    name = "sender_mx"
    Settings = SenderMxSettings

    async def on_mail(self, tx: Transaction) -> Verdict:
        """Keep what was found for the message."""
        sender = tx.envelope.mail_from
        if sender is None or not isinstance(sender.domain, Domain):
            return proceed()
        found = await self.services.dns.run(takes_mail(sender.domain), tx)
        _FOUND.put(tx, found)
        if found == "no" and self.settings.refuse:
            return reject("sender_takes_no_mail", NO_ANSWER_POSSIBLE)
        return proceed()

    async def on_eom(self, tx: Transaction) -> Verdict:
        """The field, where there is a domain to speak of."""
        found = _FOUND.get(tx)
        return proceed(edits=[AddField(FIELD, found)]) if found else proceed()
