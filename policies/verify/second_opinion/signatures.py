"""dkimpy's word on the signatures of a message and on its ARC chain, and the differences from ours that are known.

Only whether something passes is compared: dkimpy says no more. dkimpy asks the clock of the system for t= and x=.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import dkim  # type: ignore[import-untyped]  # it has no annotations

from gateway.api import Question, RRType
from policies.verify.second_opinion.answers import Answers, UnaskedError

# What dkimpy lets pass and we do not: the reason that we give, and the rule behind it
STRICTER = {
    "the body is longer than l=": "our ruling: text can be appended to such a body (RFC 6376 8.2)",
    "the body is shorter than l=": "RFC 6376 3.5: l= MUST NOT be larger than the body",
    "there are more": "our ruling: what was added is what readers show (RFC 6376 8.15)",
    "signature has expired": "dkimpy gives clocks 10 hours, we give them 5 minutes",
    "signature is of the future": "dkimpy gives clocks 10 hours, we give them 5 minutes",
    "x= is not later than t=": "RFC 6376 3.5: x= MUST be greater than t=, not equal",
    "From is not signed": "RFC 6376 5.4: From MUST be signed",
    "the key is not for sha256": "RFC 6376 3.6.1: h= of the key is binding",
    "the key is not for email": "RFC 6376 3.6.1: s= of the key is binding",
    "the key is not for subdomains": "RFC 6376 3.6.1: t=s forbids i= below d=",
    "the record is not of version DKIM1": "RFC 6376 3.6.1: v= MUST be the first tag",
    "d= is a single label": "RFC 6376 3.5: a domain-name has two labels at least",
    "a tag holds an octet beyond ASCII": "our ruling, and RFC 6376 3.2: VALCHAR is ASCII",
    "i= has no domain": "RFC 6376 3.5: the domain-name of RFC 5321",
    "h= is no list of field names": "RFC 6376 3.5: no name may be empty",
    "rsa-sha1 is not accepted": "RFC 8301 3.1",
    "the RSA key has only": "min_rsa_bits is the operator's; dkimpy takes 1024",
    "the exponent of the RSA key": "our bound on what a key costs",
}
BLANK_NAME = "RFC 6376 3.4.2, RFC 5322 4.5: a blank before the colon is no part of the name; dkimpy finds no such field"
ZEROS = "RFC 8017 8.2.2: a signature is as long as its modulus; dkimpy takes more zeros before it"
# What we let pass and dkimpy does not
SEVERAL_RECORDS = "RFC 6376 3.6.2.2 leaves it open: we try those that are keys, dkimpy the first"
Q_LIST = "RFC 6376 3.5: q= is a list of ways to the key"
OWN_FIELD = "RFC 6376 5.4: h= means other signatures with DKIM-Signature; dkimpy takes the field itself"

# dkimpy logs each signature that it does not like as an error of ours
_SILENCE = logging.getLogger(f"{__name__}.silence")
_SILENCE.addHandler(logging.NullHandler())
_SILENCE.propagate = False

# dkimpy computes with whatever a key holds, in one step that nothing can interrupt: RSA keys of 4096 bits have 740
_MAX_KEY_BYTES = 1024
_BLANK_BEFORE_COLON = re.compile(rb"^[!-9;-~]+[ \t]+:", re.MULTILINE)
_TAG = rb"(?:^|;)\s*%b\s*=([^;]*)"


@dataclass(frozen=True, slots=True)
class Opinion:
    """Whether it passes by dkimpy; None where dkimpy has nothing but an exception. `records`: how many TXT it saw."""

    passes: bool | None
    records: int = 0


class _Keys:
    """What dkimpy asks for keys instead of the network."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.unasked: UnaskedError | None = None
        self.records = 0

    def __call__(self, name: bytes, timeout: int = 0) -> bytes | None:
        try:
            answer = self._answers(Question(name.decode("utf-8", "replace"), RRType.TXT))
        except UnaskedError as exc:
            # dkimpy may catch what is raised here
            self.unasked = self.unasked or exc
            raise dkim.DnsTimeoutError(str(exc)) from exc
        if answer.is_temporary:
            raise dkim.DnsTimeoutError(answer.why)
        if any(len(text) > _MAX_KEY_BYTES for text in answer.texts):
            self.unasked = self.unasked or UnaskedError("a key that is too large")
            return None
        self.records = max(self.records, len(answer.texts))
        return answer.texts[0] if answer.texts else None


def has_signature(octets: bytes) -> bool:
    """Whether dkimpy finds a DKIM-Signature; False for what it cannot read."""
    try:
        return bool(dkim.DKIM(octets, logger=_SILENCE).present())
    except Exception:  # noqa: BLE001  # as below
        return False


def dkim_opinion(octets: bytes, index: int, answers: Answers) -> Opinion:
    """The signature with this place, 0 for the topmost. Raises UnaskedError."""
    keys = _Keys(answers)
    try:
        passes: bool | None = bool(dkim.DKIM(octets, logger=_SILENCE).verify(index, dnsfunc=keys))
    except Exception:  # noqa: BLE001  # it raises what it likes for a signature that is none
        passes = False
    if keys.unasked is not None:
        raise keys.unasked
    return Opinion(passes, keys.records)


def arc_opinion(octets: bytes, answers: Answers) -> Opinion:
    """The chain as a whole. Raises UnaskedError."""
    keys = _Keys(answers)
    try:
        cv: bytes | None = dkim.ARC(octets, logger=_SILENCE).verify(dnsfunc=keys)[0]
        passes: bool | None = cv == dkim.CV_Pass
    except Exception:  # noqa: BLE001  # they are of many kinds, as for blanks before a colon, or none behind it
        passes = None
    if keys.unasked is not None:
        raise keys.unasked
    return Opinion(passes, keys.records)


def known_dkim_difference(reason: str, signature: bytes, header: bytes, theirs: Opinion) -> str:
    """The rule that explains why dkimpy does not say what we say, "" when there is none.

    `reason` is that of our result, `signature` the value of the field, `header` the octets of the whole header.
    """
    if theirs.passes:
        if reason.startswith("signature did not verify"):
            if _BLANK_BEFORE_COLON.search(header):
                return BLANK_NAME
            return ZEROS if _has_zeros(_tag(b"b", signature)) else ""
        return next((rule for why, rule in STRICTER.items() if reason.startswith(why)), "")
    if b"dkim-signature" in _names(_tag(b"h", signature)):
        return OWN_FIELD
    if theirs.records > 1:
        return SEVERAL_RECORDS
    return Q_LIST if b":" in _tag(b"q", signature) else ""


def known_arc_difference(reason: str, header: bytes, theirs: Opinion) -> str:
    """The same for a chain; `reason` is that of our result."""
    if theirs.passes:
        return next((rule for why, rule in STRICTER.items() if why in reason), "")
    if _BLANK_BEFORE_COLON.search(header):
        return BLANK_NAME
    return SEVERAL_RECORDS if theirs.records > 1 else ""


def _tag(name: bytes, signature: bytes) -> bytes:
    found = re.search(_TAG % name, signature)
    return found[1].strip() if found else b""


def _names(h: bytes) -> Sequence[bytes]:
    return [name.strip().lower() for name in h.split(b":")]


def _has_zeros(b: bytes) -> bool:
    try:
        return base64.b64decode(b"".join(b.split())).startswith(b"\0")
    except ValueError:
        return False
