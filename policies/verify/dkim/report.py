"""DKIM results as others read them: RFC 8601 results for the header, lines of evidence for those who ask why."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.api import AddressError, AuthResult, Domain
from policies.verify.dkim.signature import Refused, Signature
from policies.verify.dkim.verify import Judged
from policies.verify.signed import PASS, Step
from policies.verify.tags import Tags, without_space

# RFC 8601 2.7.1, RFC 6008 3: enough of b= to tell signatures of one domain apart
_SHOWN_CHARACTERS = 8
_SHOWN_OCTETS = 6  # of which they are the base64
_SHOWN_NAMES = 50
_TOKEN = re.compile(rb"[A-Za-z0-9._-]{1,253}")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{8}")
_ENCODED = re.compile(rb"=([0-9A-F]{2})")


def auth_result(judged: Judged) -> AuthResult:
    """One resinfo of method dkim (RFC 8601 2.7.1)."""
    finding = judged.finding
    reason = finding.reason
    if judged.is_testing:
        reason = f"{reason} (the domain is testing)" if reason else "the domain is testing"
    return AuthResult("dkim", finding.result, reason, tuple(_properties(judged.signature)))


def _properties(signature: Signature | Refused) -> Iterator[tuple[str, str]]:
    """Of a signature that was refused, what can be told of it."""
    if isinstance(signature, Signature):
        signer = signature.signer
        yield "header.d", signer.domain
        if signature.identity:
            yield "header.i", signature.identity
        yield "header.s", signer.selector
        yield "header.a", signer.algorithm
        yield "header.b", base64.b64encode(signer.signature[:_SHOWN_OCTETS]).decode("ascii")
        return
    tags = signature.tags
    domain = _domain(tags)
    if domain:
        yield "header.d", domain
    for tag in ("s", "a"):
        if _TOKEN.fullmatch(tags.get(tag, b"")):
            yield f"header.{tag}", tags[tag].decode("ascii")
    shown = without_space(tags.get("b", b""))[:_SHOWN_CHARACTERS]
    if _BASE64.fullmatch(shown):
        yield "header.b", shown.decode("ascii")


def _domain(tags: Tags) -> str:
    try:
        return Domain(tags.get("d", b"").decode("utf-8"))
    except AddressError:
        return ""


@dataclass(frozen=True, slots=True)
class DkimEvidence:
    """What was found at each signature; `unread` further ones were not looked at."""

    judged: Sequence[Judged]
    unread: int = 0

    def lines(self) -> Sequence[str]:
        lines = [line for number, each in enumerate(self.judged, 1) for line in _lines(number, each)]
        if not self.judged:
            lines.append("no signature")
        if self.unread:
            lines.append(f"{self.unread} more signatures were not looked at")
        return lines


def _lines(number: int, judged: Judged) -> Iterator[str]:
    signature, finding = judged.signature, judged.finding
    who = dict(_properties(signature))
    name = f"signature {number} by {who.get('header.d', 'nobody')}"
    yield f"{name}: {finding.result}{f', {finding.reason}' if finding.reason else ''}"
    if isinstance(signature, Refused):
        yield f"  refused at its {finding.step}, so no key was asked for"
        return
    signer, coverage = signature.signer, signature.coverage
    yield (
        f"  {signer.algorithm}, key at {signer.question.name}, "
        f"header {coverage.header_mode}, body {coverage.body_mode}"
    )
    names = b" ".join(coverage.names[:_SHOWN_NAMES]).decode("ascii")
    more = len(coverage.names) - _SHOWN_NAMES
    yield f"  signed fields: {names}{f' and {more} more' if more > 0 else ''}"
    length = coverage.body_length
    part = "" if length is None else f" (its first {length} octets)"
    yield f"  body{part}: {'as it was signed' if judged.body is PASS else 'changed since it was signed'}"
    yield f"  {_header_line(judged)}"
    if judged.is_testing:
        yield "  the domain only tests DKIM (t=y)"
    for changed in _changed_fields(judged)[:_SHOWN_NAMES]:
        yield f"  changed since it was signed, by its copy in z=: {changed}"


def _header_line(judged: Judged) -> str:
    proof = judged.proof
    assert proof is not None  # of a signature that was not refused
    if proof is PASS:
        return "header: as it was signed"
    if proof.step is Step.HEADER:
        return "header: changed since it was signed, or signed with another key"
    return f"key: {proof.reason}"


def _changed_fields(judged: Judged) -> Sequence[str]:
    """The signed fields that differ from their copies in z= (RFC 6376 3.5), white space left out of account."""
    signature = judged.signature
    if isinstance(signature, Refused) or judged.proof is PASS or not signature.copied:
        return ()
    then: dict[bytes, list[bytes]] = {}
    for copy in without_space(signature.copied).split(b"|"):
        name, _, value = copy.partition(b":")
        then.setdefault(name.lower(), []).append(without_space(_ENCODED.sub(_decoded, value)))
    now: dict[bytes, list[bytes]] = {name: [] for name in signature.coverage.names}
    for field in judged.changed:
        now[field.name].append(without_space(field.value))
    return [name.decode("ascii") for name in now if name in then and sorted(now[name]) != sorted(then[name])]


def _decoded(encoded: re.Match[bytes]) -> bytes:
    return bytes.fromhex(encoded[1].decode("ascii"))
