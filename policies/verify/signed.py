"""What the signatures of DKIM and ARC have in common (RFC 6376 3.5, 3.7, 6.1; RFC 8617 4.1): signer, coverage, proof.

`parse_signer` reads a=, b=, d=, s=, which every signature field has; `parse_coverage` what a signature of a message
says of header and body. `header_digest` is what was signed, `prove` asks the keys in an answer of DNS. Nothing here
asks DNS, and no input of any kind makes it raise anything but SignatureError.
"""

from __future__ import annotations

import hashlib
import re
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from gateway.api import (
    AddressError,
    Answer,
    BodyDigests,
    Canonicalization,
    Domain,
    Field,
    Header,
    Question,
    Result,
    RRType,
)
from policies.verify.canonical import canonical_fields, canonical_header
from policies.verify.keys import MIN_RSA_BITS, BadKey, KeyType, PublicKey, parse_key
from policies.verify.tags import Tags, without_space, without_tag

# RFC 1035 2.3.4
MAX_NAME = 253
# RFC 6376 3.6.2.2 leaves several records undefined: those that are keys are tried, of this many records and keys.
# A message may have a hundred signatures (RFC 8617), and an RSA key of 8192 bits takes a millisecond.
MAX_RECORDS = 8
MAX_TRIED = 3
# How far the clocks of signer and verifier may be apart; RFC 6376 3.5 leaves it to us
CLOCK_SKEW_S = 300
# Fields that stand once in a message (RFC 5322 3.6, RFC 2045 3): one that was added is what many readers show
SINGLETONS = frozenset(
    {
        b"from",
        b"to",
        b"cc",
        b"subject",
        b"date",
        b"reply-to",
        b"message-id",
        b"content-type",
        b"mime-version",
        b"content-transfer-encoding",
    }
)

_ALGORITHMS = {b"rsa-sha256": KeyType.RSA, b"ed25519-sha256": KeyType.ED25519}
_MODES = {mode.encode("ascii"): mode for mode in Canonicalization}
_NEAREST = (Result.FAIL, Result.POLICY, Result.PERMERROR)
# RFC 6376 3.5: sub-domain *("." sub-domain); underscores are no part of it, but are in use and do no harm
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_SELECTOR = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
# RFC 6376 3.5: field names (RFC 5322 2.2) with colons between them; matches a text in one way only
_FIELD_NAMES = re.compile(rb"[!-9;-~]+(?:[ \t\r\n]*:[ \t\r\n]*[!-9;-~]+)*")
_LENGTH = re.compile(rb"[0-9]{1,76}")
_TIME = re.compile(rb"[0-9]{1,12}")


class SignatureError(ValueError):
    """A signature that cannot be verified whatever the keys say; the text is in plain words."""

    def __init__(self, reason: str, result: Result = Result.PERMERROR) -> None:
        super().__init__(reason)
        self.reason = reason
        self.result = result


class Step(StrEnum):
    """What a signature was refused at, or noted for."""

    NONE = "none"  # nothing
    SIGNATURE = "signature"  # the field itself
    TIME = "time"
    KEY = "key"
    BODY = "body"
    HEADER = "header"
    COVERAGE = "coverage"  # all is as it was signed, but not enough is signed


class Finding(NamedTuple):
    """What came of a signature; `reason` is in plain words, "" for a plain pass."""

    result: Result
    step: Step = Step.NONE
    reason: str = ""


PASS = Finding(Result.PASS)


class Signer(NamedTuple):
    """Who signed, and the signature: a=, d=, s=, b=."""

    algorithm: str
    key_type: KeyType
    domain: Domain
    selector: str
    signature: bytes
    question: Question
    """RFC 6376 3.6.2.1: where the key is."""


class Coverage(NamedTuple):
    """What is signed: c=, h= (in lower case), bh=, l= (None: the whole body), t= and x= (None: not given)."""

    header_mode: Canonicalization
    body_mode: Canonicalization
    names: tuple[bytes, ...]
    body_hash: bytes
    body_length: int | None
    timestamp: int | None
    expiration: int | None


def parse_signer(tags: Tags) -> Signer:
    """Raises SignatureError for what is missing, malformed or no longer to be trusted."""
    algorithm = _required(tags, "a")
    if algorithm == b"rsa-sha1":
        # RFC 8301 3.1: rsa-sha1 MUST NOT be used for signing or verifying
        raise SignatureError("rsa-sha1 is not accepted", Result.POLICY)
    key_type = _ALGORITHMS.get(algorithm)
    if key_type is None:
        raise SignatureError("the algorithm is unknown")
    signature = _base64(tags, "b")
    domain = _domain(_required(tags, "d"))
    selector = _selector(_required(tags, "s"))
    name = f"{selector}._domainkey.{domain}"
    if len(name) > MAX_NAME:
        raise SignatureError("selector and domain are too long for a name")
    question = Question(name, RRType.TXT)
    return Signer(algorithm.decode("ascii"), key_type, domain, selector, signature, question)


def parse_coverage(tags: Tags) -> Coverage:
    """Raises SignatureError. That From is signed is for the caller to ask."""
    header_mode, body_mode = _modes(tags.get("c", b"simple/simple"))
    listed = _required(tags, "h")
    if not _FIELD_NAMES.fullmatch(listed):
        raise SignatureError("h= is no list of field names")
    names = tuple(without_space(listed).lower().split(b":"))
    body_hash = _base64(tags, "bh")
    timestamp, expiration = _number(tags, "t", _TIME), _number(tags, "x", _TIME)
    # RFC 6376 3.5: x= MUST be greater than t= if both are present
    if timestamp is not None and expiration is not None and expiration <= timestamp:
        raise SignatureError("x= is not later than t=")
    return Coverage(
        header_mode, body_mode, names, body_hash, _number(tags, "l", _LENGTH), timestamp, expiration
    )


def judge_time(coverage: Coverage, now: float) -> Finding:
    """Whether the signature is of now, in seconds since the epoch."""
    # RFC 6376 3.5: signatures of the past and of the future MAY be ignored
    if coverage.expiration is not None and now > coverage.expiration + CLOCK_SKEW_S:
        return Finding(Result.POLICY, Step.TIME, "signature has expired")
    if coverage.timestamp is not None and coverage.timestamp > now + CLOCK_SKEW_S:
        return Finding(Result.POLICY, Step.TIME, "signature is of the future")
    return PASS


def want_body(coverage: Coverage, digests: BodyDigests) -> None:
    """Have hashed what `judge_body` compares; in `on_header`."""
    digests.want(coverage.body_mode, coverage.body_length)


def judge_body(coverage: Coverage, digests: BodyDigests) -> Finding:
    """Whether the body is the one that was signed (RFC 6376 6.1.3). Raises LookupError where it was not wanted."""
    sha256, size_bytes = digests.get(coverage.body_mode, coverage.body_length)
    # RFC 6376 3.5: l= MUST NOT be larger than the body
    if coverage.body_length is not None and coverage.body_length > size_bytes:
        return Finding(Result.FAIL, Step.BODY, "the body is shorter than l=")
    if sha256 != coverage.body_hash:
        return Finding(Result.FAIL, Step.BODY, "body hash did not verify")
    return PASS


def signed_fields(header: Header, names: Iterable[bytes], own: Field) -> list[Field]:
    """The fields that h= means: of each name the last first, never the signature's own (RFC 6376 5.4.2).

    `own` is one of `header.fields` itself. A name without a field (left) counts as empty.
    """
    by_name = header.by_name
    # what is left of each name that was met so far
    instances = {own.name: [each for each in by_name.get(own.name, ()) if each is not own]}
    signed = []
    for name in names:
        left = instances.get(name)
        if left is None:
            left = instances[name] = [*by_name.get(name, ())]
        if left:
            signed.append(left.pop())
    return signed


def added_field(header: Header, names: Sequence[bytes]) -> bytes:
    """The name of a singleton field of which the header has more than h= (`names`) signs; b"" when there is none."""
    by_name = header.by_name
    # nearly always each of them stands once
    several = [name for name in SINGLETONS.intersection(names) if len(by_name.get(name, ())) > 1]
    return min([name for name in several if len(by_name[name]) > names.count(name)], default=b"")


def header_digest(
    fields: Sequence[Field],
    own: Field,
    mode: Canonicalization,
    *,
    canonical: Callable[[bytes, Canonicalization], bytes] | None = None,
) -> bytes:
    """SHA-256 of these fields and of the signature's own field, without its b= (RFC 6376 3.7).

    `canonical` is `canonical_header` with a memory, where many signatures are of the same fields.
    """
    if canonical is None:
        hashed = canonical_fields(fields, mode)
    else:
        hashed = b"".join([canonical(field.raw, mode) for field in fields])
    return hashlib.sha256(hashed + canonical_unsigned(own, mode)).digest()


def canonical_unsigned(own: Field, mode: Canonicalization) -> bytes:
    """A signature's own field as it is hashed: without its b= and its last CRLF."""
    name, colon, value = own.raw.partition(b":")
    return canonical_header(name + colon + without_tag(value[:-2], b"b") + b"\r\n", mode)[:-2]


class Proof(NamedTuple):
    """What the keys said, and the key that says it; None where the answer has no key for this signature."""

    finding: Finding
    key: PublicKey | None = None


def prove(
    signer: Signer,
    digest: bytes,
    answer: Answer,
    *,
    is_own_domain: bool = True,
    min_rsa_bits: int = MIN_RSA_BITS,
) -> Proof:
    """Whether a key in the answer to `signer.question` verifies the signature of this digest (RFC 6376 6.1.2, 6.1.3).

    `is_own_domain`: the domain of i= is that of d=, as keys with t=s demand.
    """
    if answer.is_temporary:
        return Proof(
            Finding(Result.TEMPERROR, Step.KEY, f"the look-up of the key failed for now: {answer.why}")
        )
    texts = answer.texts
    if not texts:
        return Proof(Finding(Result.PERMERROR, Step.KEY, "no key for signature"))
    proofs: list[Proof] = []
    for record in texts[:MAX_RECORDS]:
        proof = _ask_key(
            parse_key(record), signer, digest, is_own_domain=is_own_domain, min_rsa_bits=min_rsa_bits
        )
        if proof.finding is PASS:
            return proof
        proofs.append(proof)
        if sum(each.finding.step is Step.HEADER for each in proofs) == MAX_TRIED:
            break
    # what came nearest to a pass says most
    return min(proofs, key=lambda proof: _NEAREST.index(proof.finding.result))


def _ask_key(
    key: PublicKey | BadKey, signer: Signer, digest: bytes, *, is_own_domain: bool, min_rsa_bits: int
) -> Proof:
    if isinstance(key, BadKey):
        return Proof(Finding(Result.PERMERROR, Step.KEY, key.why))
    # RFC 6376 6.1.2 item 6: the algorithm of the signature MUST be one of the key
    if key.type is not signer.key_type:
        return Proof(Finding(Result.PERMERROR, Step.KEY, "the key is of another type than a="))
    # RFC 8301 3.2: keys of less than 1024 bits MUST NOT be considered valid
    if key.type is KeyType.RSA and key.bits < min_rsa_bits:
        return Proof(Finding(Result.POLICY, Step.KEY, f"the RSA key has only {key.bits} bits"), key)
    # RFC 6376 3.6.1, t=s
    if key.is_strict and not is_own_domain:
        return Proof(Finding(Result.PERMERROR, Step.KEY, "the key is not for subdomains"), key)
    if not key.verify(signer.signature, digest):
        return Proof(Finding(Result.FAIL, Step.HEADER, "signature did not verify"), key)
    return Proof(PASS, key)


def _required(tags: Tags, name: str) -> bytes:
    value = tags.get(name)
    if not value:
        raise SignatureError(f"{name}= is missing")
    return value


def _base64(tags: Tags, name: str) -> bytes:
    try:
        return a2b_base64(without_space(_required(tags, name)), strict_mode=True)
    except ValueError as exc:  # binascii.Error, and what is not ASCII
        raise SignatureError(f"{name}= is no base64") from exc


def _domain(value: bytes) -> Domain:
    try:
        domain = Domain(value.decode("utf-8"))
    except AddressError as exc:
        raise SignatureError("d= is no domain") from exc
    # RFC 6376 3.5: sub-domain 1*("." sub-domain); no signature speaks for a whole top-level domain
    if "." not in domain:
        raise SignatureError("d= is a single label")
    return domain


def _selector(value: bytes) -> str:
    if value.isascii():
        selector = value.decode("ascii")
        if not _SELECTOR.fullmatch(selector):
            raise SignatureError("s= is no selector")
        return selector
    # RFC 8616 5: it may be of U-labels, which DNS knows as A-labels
    try:
        return Domain(value.decode("utf-8"))
    except AddressError as exc:
        raise SignatureError("s= is no selector") from exc


def _modes(value: bytes) -> tuple[Canonicalization, Canonicalization]:
    header, slash, body = value.partition(b"/")
    try:
        # RFC 6376 3.5: where only one is named, the body is simple
        return _MODES[header], _MODES[body] if slash else Canonicalization.SIMPLE
    except KeyError:
        raise SignatureError("c= is unknown") from None


def _number(tags: Tags, name: str, digits: re.Pattern[bytes]) -> int | None:
    value = tags.get(name)
    if value is None:
        return None
    if not digits.fullmatch(value):
        raise SignatureError(f"{name}= is no number")
    return int(value)
