"""iprev: whether the name of the client's address leads back to it (RFC 8601 3, "forward-confirmed reverse DNS").

The address is asked for its names (PTR), each name for its addresses; pass where one of them is the client's. The
result is reported as iprev in Authentication-Results. By default nothing follows: `on_fail = "reject"` refuses with
550 5.7.25 (RFC 7372 3.2), which the engine holds until RCPT.

While clients are hidden behind a balancer's address there is nothing to check, and nothing is reported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from gateway.api import (
    AddressSource,
    AuthResult,
    Policy,
    Reply,
    Result,
    Session,
    Trust,
    Verdict,
    defer,
    proceed,
    reject,
)
from policies.verify.iprev import confirm

NOT_CONFIRMED = Reply(550, "5.7.25", "The name of your address does not lead back to it")
NOT_CONFIRMED_NOW = Reply(450, "4.7.25", "The name of your address does not lead back to it now")


class OnFinding(StrEnum):
    """What follows from a result. There is no quarantine at CONNECT."""

    CONTINUE = "continue"
    DEFER = "defer"
    REJECT = "reject"


class OnTrouble(StrEnum):
    """What follows from a temporary error, which is never a refusal for good."""

    CONTINUE = "continue"
    DEFER = "defer"


@dataclass(frozen=True, slots=True)
class IprevSettings:
    """[policy.iprev.settings]."""

    on_fail: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "an address whose names lead elsewhere"}
    )
    on_permerror: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "an address that has no name"}
    )
    on_temperror: OnTrouble = field(
        default=OnTrouble.CONTINUE, metadata={"doc": "a check that DNS trouble left undecided"}
    )


class Iprev(Policy[IprevSettings]):
    """Asks once for each session, at CONNECT."""

    name = "iprev"
    Settings = IprevSettings
    method = "iprev"
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)

    async def on_connect(self, session: Session) -> Verdict:
        """One result, and what the operator wants to follow from it."""
        if session.address_source is AddressSource.HIDDEN:
            return proceed(reason="iprev_client_hidden")
        found = await self.services.dns.run(confirm(session.client))
        results = (AuthResult("iprev", found.result, found.why, (("policy.iprev", str(session.client)),)),)
        reason = f"iprev_{found.result}"
        match self._action(found.result):
            case OnFinding.CONTINUE:
                return proceed(reason=reason, results=results, evidence=found)
            case OnFinding.DEFER:
                return defer(reason, NOT_CONFIRMED_NOW, results=results, evidence=found)
            case OnFinding.REJECT:
                return reject(reason, NOT_CONFIRMED, results=results, evidence=found)

    def _action(self, result: Result) -> OnFinding:
        settings = self.settings
        actions = {
            Result.FAIL: settings.on_fail,
            Result.PERMERROR: settings.on_permerror,
            Result.TEMPERROR: OnFinding(settings.on_temperror.value),
        }
        return actions.get(result, OnFinding.CONTINUE)
