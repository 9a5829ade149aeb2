"""dkim: are the signatures of a message valid (RFC 6376, 8301, 8463, 8616)? One result for each of them.

What was found is reported and, unless the settings say otherwise, nothing else: whether it matters for the author's
domain is for dmarc to say. A signature whose domain only tests DKIM is never worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from gateway.api import (
    AuthResult,
    OnError,
    Policy,
    Reply,
    Result,
    Services,
    Slot,
    Transaction,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)
from policies.verify.dkim.report import DkimEvidence, auth_result
from policies.verify.dkim.signature import NAME, Refused, Signature, parse_signatures
from policies.verify.dkim.verify import Judged, Limits, ask_keys, judge, want_bodies
from policies.verify.handling import Handling
from policies.verify.keys import MAX_RSA_BITS, MIN_RSA_BITS

# RFC 7372 3.1
NO_SIGNATURE = Reply(550, "5.7.20", "No passing DKIM signature found")
NOT_ACCEPTABLE = Reply(550, "5.7.21", "No acceptable DKIM signature found")
NONE_NOW = Reply(451, "4.7.20", "No passing DKIM signature found, try again later")
NOT_ACCEPTABLE_NOW = Reply(451, "4.7.21", "No acceptable DKIM signature found, try again later")
KEY_UNAVAILABLE = Reply(451, "4.7.20", "The key of a DKIM signature cannot be had now, try again later")

_MOST_SIGNATURES = 100
_SIGNATURES = Slot[tuple[Signature | Refused, ...]]("dkim.signatures")


class PartialBody(StrEnum):
    """What a valid signature says whose l= leaves a part of the body unsigned."""

    POLICY = "policy"
    PASS = "pass"


@dataclass(frozen=True, slots=True)
class DkimSettings:
    """The table [policy.dkim.settings]."""

    on_none: Handling = field(
        default=Handling.CONTINUE,
        metadata={"doc": "a message without a signature: 550 5.7.20 where rejected"},
    )
    on_fail: Handling = field(
        default=Handling.CONTINUE,
        metadata={
            "doc": "signatures of which none is valid and acceptable: 550 5.7.20 or 5.7.21 where rejected"
        },
    )
    on_temperror: OnError = field(
        default=OnError.CONTINUE, metadata={"doc": "no valid signature, and a key cannot be had now"}
    )
    body_length_limit: PartialBody = field(
        default=PartialBody.POLICY,
        metadata={"doc": "the result of a valid signature with an l= that is smaller than the body"},
    )
    min_rsa_bits: int = field(
        default=MIN_RSA_BITS, metadata={"doc": "RSA keys below it never pass; 1024 is the least (RFC 8301)"}
    )
    max_signatures: int = field(
        default=10, metadata={"doc": "signatures that are verified, from the top of the header"}
    )

    def __post_init__(self) -> None:
        if not MIN_RSA_BITS <= self.min_rsa_bits <= MAX_RSA_BITS:
            raise ValueError(f"min_rsa_bits is not in {MIN_RSA_BITS}..{MAX_RSA_BITS}")
        if not 1 <= self.max_signatures <= _MOST_SIGNATURES:
            raise ValueError(f"max_signatures is not in 1..{_MOST_SIGNATURES}")


class Dkim(Policy[DkimSettings]):
    """Reports each signature; acts on what it found only where the operator says so."""

    name = "dkim"
    Settings = DkimSettings
    method = "dkim"

    def __init__(self, settings: DkimSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._limits = Limits(
            min_rsa_bits=settings.min_rsa_bits,
            allows_partial_body=settings.body_length_limit is PartialBody.PASS,
        )

    def on_header(self, tx: Transaction) -> None:
        """Have the body hashed as the signatures want it, and ask for their keys."""
        message = tx.message
        assert message is not None  # the engine's word: on_header and on_eom have one
        signatures = parse_signatures(
            message.header,
            now=self.services.clock.now(),
            most=self.settings.max_signatures,
            is_internationalized=tx.envelope.smtputf8,
        )
        _SIGNATURES.put(tx, signatures)
        if signatures:
            want_bodies(signatures, message.digests)
            self.services.dns.prefetch(ask_keys(signatures), tx)

    async def on_eom(self, tx: Transaction) -> Verdict:
        """Judge the signatures, and find out what to do."""
        message = tx.message
        assert message is not None
        signatures = _SIGNATURES.get(tx) or ()
        judged: Sequence[Judged] = ()
        if signatures:
            lookup = judge(message.header, message.digests, signatures, self._limits)
            judged = await self.services.dns.run(lookup, tx)
        evidence = DkimEvidence(judged, len(message.header.all(NAME)) - len(signatures))
        results = [auth_result(each) for each in judged] or [AuthResult("dkim", Result.NONE)]
        return self._verdict(judged, results, evidence)

    def _verdict(
        self, judged: Sequence[Judged], results: Sequence[AuthResult], evidence: DkimEvidence
    ) -> Verdict:
        words = {each.finding.result for each in judged}
        if Result.PASS in words:
            return proceed(results=results, evidence=evidence)
        # RFC 6376 3.6.1: a domain that tests MUST NOT be treated worse than one that does not sign
        words = {each.finding.result for each in judged if not each.is_testing}
        if not words:
            on_finding, reason, refusal, later = self.settings.on_none, "dkim_none", NO_SIGNATURE, NONE_NOW
        elif Result.TEMPERROR in words:
            if self.settings.on_temperror is OnError.DEFER:
                return defer("dkim_temperror", KEY_UNAVAILABLE, results=results, evidence=evidence)
            return proceed(reason="dkim_temperror", results=results, evidence=evidence)
        elif Result.POLICY in words:
            on_finding, reason = self.settings.on_fail, "dkim_policy"
            refusal, later = NOT_ACCEPTABLE, NOT_ACCEPTABLE_NOW
        else:
            on_finding, reason, refusal, later = self.settings.on_fail, "dkim_fail", NO_SIGNATURE, NONE_NOW
        match on_finding:
            case Handling.CONTINUE:
                return proceed(reason=reason, results=results, evidence=evidence)
            case Handling.QUARANTINE:
                return quarantine(reason, results=results, evidence=evidence)
            case Handling.DEFER:
                return defer(reason, later, results=results, evidence=evidence)
            case Handling.REJECT:
                return reject(reason, refusal, results=results, evidence=evidence)
