"""Judge the DKIM signatures of a message (RFC 6376 6, RFC 8601 2.7.1): a word, a reason, and what was compared.

In `on_header`: `parse_signatures`, `want_bodies`, and `ask_keys` to prefetch; at EOM: `judge`. All keys are asked
together, each name once, so ten signatures at ten dead name servers take the time of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gateway.api import Answer, BodyDigests, Field, Header, Lookup, Result
from policies.verify.dkim.signature import Refused, Signature
from policies.verify.keys import MIN_RSA_BITS, PublicKey
from policies.verify.signed import (
    PASS,
    Finding,
    Step,
    added_field,
    header_digest,
    judge_body,
    prove,
    signed_fields,
    want_body,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What is asked of a signature beyond RFC 6376."""

    min_rsa_bits: int = MIN_RSA_BITS
    allows_partial_body: bool = False  # l= may be smaller than the body


class Judged(NamedTuple):
    """What came of one signature; where one was refused unread, `body` and `proof` are None."""

    signature: Signature | Refused
    finding: Finding
    body: Finding | None = None
    proof: Finding | None = None
    key: PublicKey | None = None
    changed: tuple[Field, ...] = ()  # what h= means in this message, where that is not what was signed

    @property
    def is_testing(self) -> bool:
        """Whether the domain only tests DKIM: such a signature is never worse than none (RFC 6376 3.6.1, t=y)."""
        return self.key is not None and self.key.is_testing


def want_bodies(signatures: Iterable[Signature | Refused], digests: BodyDigests) -> None:
    """Have hashed what `judge` compares; in `on_header`."""
    for signature in signatures:
        if isinstance(signature, Signature):
            want_body(signature.coverage, digests)


def ask_keys(signatures: Iterable[Signature | Refused]) -> Lookup[dict[str, Answer]]:
    """The keys of these signatures by their names, all at once."""
    questions = {
        each.signer.question.name: each.signer.question for each in signatures if isinstance(each, Signature)
    }
    answers = (yield tuple(questions.values())) if questions else ()
    return dict(zip(questions, answers, strict=True))


def judge(
    header: Header, digests: BodyDigests, signatures: Sequence[Signature | Refused], limits: Limits
) -> Lookup[tuple[Judged, ...]]:
    """Judge each of the signatures that `parse_signatures` found in this header."""
    answers = yield from ask_keys(signatures)
    return tuple(
        [
            Judged(each, each.finding)
            if isinstance(each, Refused)
            else _judge(header, digests, each, answers[each.signer.question.name], limits)
            for each in signatures
        ]
    )


def _judge(
    header: Header, digests: BodyDigests, signature: Signature, answer: Answer, limits: Limits
) -> Judged:
    coverage = signature.coverage
    fields = signed_fields(header, coverage.names, signature.field)
    proof = prove(
        signature.signer,
        header_digest(fields, signature.field, coverage.header_mode),
        answer,
        is_own_domain=signature.is_own_domain,
        min_rsa_bits=limits.min_rsa_bits,
    )
    body = judge_body(coverage, digests)
    # A changed body is certain whatever DNS says, and nothing can make the signature valid
    finding = proof.finding if body is PASS else body
    if finding is PASS:
        finding = _judge_coverage(header, digests, signature, limits)
    # evidence is kept: the header once more only where something is to be found in it
    changed = () if proof.finding is PASS else tuple(fields)
    return Judged(signature, finding, body, proof.finding, proof.key, changed)


def _judge_coverage(header: Header, digests: BodyDigests, signature: Signature, limits: Limits) -> Finding:
    """Whether what a reader is shown is what was signed (RFC 6376 8.2, 8.15)."""
    coverage = signature.coverage
    length = coverage.body_length
    found = PASS
    if length is not None and digests.get(coverage.body_mode, length).size_bytes > length:
        word = Result.PASS if limits.allows_partial_body else Result.POLICY
        found = Finding(word, Step.COVERAGE, "the body is longer than l=")
    if added := added_field(header, coverage.names):
        why = f"there are more {added.decode('ascii')} fields than are signed"
        return Finding(Result.POLICY, Step.COVERAGE, why)
    return found
