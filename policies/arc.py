"""arc: whether the chain of those who forwarded a message is whole (RFC 8617), and whom of them to believe.

The result is reported and, unless the settings say otherwise, nothing else. A chain that passes proves who sealed, not
that they are honest: it never makes mail better than it is, but for sealers that the operator lists. Where such a one
says that the author was authenticated when the message came to it, the result has the property `policy.trusted-sealer`,
by which dmarc may let pass what a forwarder or a mailing list has broken. With a temperror the property says who would
be believed if all keys could be looked up, so that such mail need not be refused for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.api import (
    AddressSource,
    AuthorError,
    Domain,
    Header,
    Policy,
    Reply,
    Result,
    Services,
    Slot,
    Transaction,
    Verdict,
    ask,
    author_domain,
    defer,
    proceed,
    quarantine,
    reject,
)
from policies.verify.arc.chain import Chain, ChainResult, prepare, validate
from policies.verify.arc.report import ArcEvidence, auth_result
from policies.verify.arc.trust import Trust, trusted_claim
from policies.verify.domain_list import DomainList
from policies.verify.handling import Handling

# RFC 8617 5.2.2
FAILED = Reply(550, "5.7.29", "ARC validation failure")
FAILED_NOW = Reply(451, "4.7.29", "ARC validation failure, try again later")

_CHAIN = Slot[Chain]("arc.chain")
_NO_CHAIN = ChainResult(Result.NONE)
_NONE = proceed(results=[auth_result(_NO_CHAIN, None)], evidence=ArcEvidence(_NO_CHAIN))


@dataclass(frozen=True, slots=True)
class ArcSettings:
    """The table [policy.arc.settings]."""

    trusted_sealers: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "domains whose word about the author is taken, when they seal what they forward; "
            '".example.org" stands for the subdomains'
        },
    )
    on_fail: Handling = field(
        default=Handling.CONTINUE,
        metadata={"doc": "a chain that is broken, as honest forwarding may do: 550 5.7.29 where rejected"},
    )

    def __post_init__(self) -> None:
        DomainList(self.trusted_sealers)


class Arc(Policy[ArcSettings]):
    """Reports the status of the chain, and whose word about the author counts."""

    name = "arc"
    Settings = ArcSettings
    method = "arc"

    def __init__(self, settings: ArcSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._trusted = DomainList(settings.trusted_sealers)

    def on_header(self, tx: Transaction) -> None:
        """Have the body hashed as the chain wants it, and ask for its keys."""
        message = tx.message
        assert message is not None  # the engine's word: on_header and on_eom have one
        chain = prepare(message.header, message.digests, utf8=tx.envelope.smtputf8)
        if chain is not None:
            _CHAIN.put(tx, chain)
            if chain.questions:
                self.services.dns.prefetch(ask(*chain.questions), tx)

    async def on_eom(self, tx: Transaction) -> Verdict:
        """Judge the chain, and whether somebody in it is believed."""
        message, chain = tx.message, _CHAIN.get(tx)
        if chain is None:
            return _NONE
        assert message is not None
        lookup = validate(chain, message.header, message.digests, now=self.services.clock.now())
        result = await self.services.dns.run(lookup, tx)
        author, trust = self._believed(result, message.header)
        is_hidden = tx.session.address_source is AddressSource.HIDDEN
        results = [auth_result(result, None if is_hidden else tx.session.client, trust)]
        evidence = ArcEvidence(result, author, trust)
        if result.result is not Result.FAIL:
            reason = "arc_temperror" if result.result is Result.TEMPERROR else ""
            return proceed(reason=reason, results=results, evidence=evidence)
        match self.settings.on_fail:
            case Handling.CONTINUE:
                return proceed(reason="arc_fail", results=results, evidence=evidence)
            case Handling.QUARANTINE:
                return quarantine("arc_fail", results=results, evidence=evidence)
            case Handling.DEFER:
                return defer("arc_fail", FAILED_NOW, results=results, evidence=evidence)
            case Handling.REJECT:
                return reject("arc_fail", FAILED, results=results, evidence=evidence)

    def _believed(self, result: ChainResult, header: Header) -> tuple[Domain | None, Trust]:
        """The author domain and who vouches for it, or would if keys could be had; where the operator lists anybody."""
        if not self._trusted or result.result not in (Result.PASS, Result.TEMPERROR):
            return None, Trust()
        try:
            author = author_domain(header)
        except AuthorError:
            return None, Trust()
        return author, trusted_claim(result.sets, header, author, self._trusted)
