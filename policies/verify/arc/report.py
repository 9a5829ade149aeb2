"""ARC results as others read them: an RFC 8601 result for the header, lines of evidence for those who ask why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from gateway.api import AuthResult, Domain, Result
from policies.verify.arc.chain import ChainResult, Judged, SignedMessage
from policies.verify.arc.trust import Standing, Trust
from policies.verify.signed import Finding

_NO_TRUST = Trust()
_WORDS = {
    Standing.BELIEVED: "is listed, and its word that the author was authenticated is taken",
    Standing.NO_CLAIM: "is listed, but does not say that the author was authenticated",
    Standing.NOT_LISTED: "is not listed, so no word of it or before it is taken",
    Standing.NOT_AS_SEALED: "leaves unsigned what a reader is shown, so no word of it or before it is taken",
}


def auth_result(
    chain: ChainResult, client: IPv4Address | IPv6Address | None, trust: Trust = _NO_TRUST
) -> AuthResult:
    """The resinfo of method arc (RFC 8617 6, 10.2); `client` is None where its address is not known."""
    return AuthResult("arc", chain.result, chain.reason, tuple(_properties(chain, client, trust)))


def _properties(
    chain: ChainResult, client: IPv4Address | IPv6Address | None, trust: Trust
) -> Iterator[tuple[str, str]]:
    if chain.oldest_pass is not None:
        yield "header.oldest-pass", str(chain.oldest_pass)
    if client is not None:
        yield "smtp.remote-ip", str(client)
    # ours (RFC 8601 2.3, ptype "policy"): dmarc acts on it
    if trust.sealer is not None:
        yield "policy.trusted-sealer", trust.sealer


@dataclass(frozen=True, slots=True)
class ArcEvidence:
    """What was found at each set, and of each sealer from the newest on that was asked for its word."""

    chain: ChainResult
    author: Domain | None = None
    trust: Trust = _NO_TRUST

    def lines(self) -> Sequence[str]:
        chain = self.chain
        if chain.result is Result.NONE:
            return ["no ARC set"]
        lines = [f"chain: {chain.result}{f', {chain.reason}' if chain.reason else ''}"]
        for at, judged in enumerate(chain.sets):
            lines += _lines(judged)
            if at < len(self.trust.standings):
                lines.append(f"  {judged.link.sealer.domain} {_WORDS[self.trust.standings[at]]}")
        if self.trust.sealer is not None:
            lines.append(f"{self.author} was authenticated, says {self.trust.sealer}")
        return lines


def _lines(judged: Judged) -> Iterator[str]:
    sealer, message = judged.link.sealer, judged.link.message
    yield f"set {judged.link.arc_set.instance}, sealed by {sealer.domain}"
    yield f"  ARC-Seal: {_outcome(judged.seal)}; {sealer.algorithm}, key at {sealer.question.name}"
    how = ""
    if isinstance(message, SignedMessage):
        fields = b" ".join(message.coverage.names).decode("ascii")
        how = f"; {message.signer.algorithm}, key at {message.signer.question.name}, signed fields: {fields}"
    yield f"  ARC-Message-Signature: {_outcome(judged.ams)}{how}"


def _outcome(finding: Finding | None) -> str:
    if finding is None:
        return "not looked at"
    return f"{finding.result}, {finding.reason}" if finding.reason else finding.result
