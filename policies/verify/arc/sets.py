"""The ARC sets of a message: their fields put in order, and the structure that a chain must have (RFC 8617 4, 5.2).

What is found here needs neither keys nor the body. Work is linear in the octets of the header, and nothing is parsed
when there are more fields of one kind than a chain may have sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from gateway.api import Field, Header
from policies.verify.tags import TagError, Tags, parse_tags

# RFC 8617 4.2.1: "Instance tag values can range from 1-50"
MAX_SETS = 50

T = TypeVar("T")

_AAR, _AMS, _SEAL = b"arc-authentication-results", b"arc-message-signature", b"arc-seal"
# RFC 8617 3.9: position = 1*2DIGIT
_POSITION = re.compile(rb"[0-9]{1,2}")
_TIME = re.compile(rb"[0-9]{1,12}")
_WHITE = re.compile(rb"[ \t\r\n]*")
_COMMENT_TEXT = re.compile(rb"[^()\\]*")


class ChainError(ValueError):
    """The fields are no chain; the text says why and holds nothing of them."""


class ArcSet(NamedTuple):
    """One set: the AAR, AMS and seal of one instance. `results` is what the AAR says behind its instance."""

    instance: int
    aar: Field
    results: bytes
    ams: Field
    ams_tags: Tags
    seal: Field
    seal_tags: Tags


def read_sets(header: Header, *, utf8: bool = False) -> tuple[ArcSet, ...]:
    """The sets of a message from the oldest to the newest, () when it has no ARC field. Raises ChainError.

    They are complete, numbered from 1 without gap or repetition, and each seal says what its position asks
    (RFC 8617 5.2, steps 1 to 3). `utf8`: tags may hold UTF-8 (RFC 8617 4.1.4).
    """
    aars, signatures, seals = header.all(_AAR), header.all(_AMS), header.all(_SEAL)
    if not (aars or signatures or seals):
        return ()
    # RFC 8617 5.2 step 1: more than the maximum number is a failure
    if max(len(aars), len(signatures), len(seals)) > MAX_SETS:
        raise ChainError(f"there are more than {MAX_SETS} sets")

    def tags(field: Field) -> tuple[int, Tags]:
        try:
            found = parse_tags(field.value, utf8=utf8)
        except TagError as exc:
            raise ChainError(f"a signature is malformed: {exc}") from exc
        return _position(found.get("i", b"")), found

    aar_of = _by_instance(aars, _results)
    ams_of = _by_instance(signatures, tags)
    seal_of = _by_instance(seals, tags)
    # RFC 8617 5.2 step 3, A and B: one of each kind, a continuous sequence from 1
    if not aar_of.keys() == ams_of.keys() == seal_of.keys() or len(aar_of) != max(aar_of, default=0):
        raise ChainError("a set is missing or not complete")
    sets = [ArcSet(at, *aar_of[at], *ams_of[at], *seal_of[at]) for at in sorted(aar_of)]
    _check_seals(sets)
    return tuple(sets)


def _by_instance(
    fields: Iterable[Field], read: Callable[[Field], tuple[int, T]]
) -> dict[int, tuple[Field, T]]:
    """Fields of one kind with what is read of them, by their instance."""
    found: dict[int, tuple[Field, T]] = {}
    for field in fields:
        instance, content = read(field)
        # RFC 8617 4.2.1: exactly one field of each kind for an instance
        if instance in found:
            raise ChainError(f"set {instance} has a field twice")
        found[instance] = field, content
    return found


def _check_seals(sets: Sequence[ArcSet]) -> None:
    """RFC 8617 5.2, steps 2 and 3 C; 4.1.3."""
    # RFC 8617 5.2 step 2: what the newest sealer found broken stays so
    if sets and sets[-1].seal_tags.get("cv") == b"fail":
        raise ChainError("the newest sealer says cv=fail")
    for each in sets:
        tags = each.seal_tags
        if tags.get("cv") != (b"none" if each.instance == 1 else b"pass"):
            raise ChainError(f"the cv= of seal {each.instance} is not what its position asks")
        # RFC 8617 4.1.3: h= "is NOT allowed and, if found, MUST result in a cv status of 'fail'"
        if "h" in tags:
            raise ChainError(f"seal {each.instance} has h=")
        if "t" in tags and not _TIME.fullmatch(tags["t"]):
            raise ChainError(f"the t= of seal {each.instance} is no number")


def _results(field: Field) -> tuple[int, bytes]:
    """Instance and authres-payload of an AAR (RFC 8617 4.1.1)."""
    value = field.value
    at = _skip_cfws(value, 0)
    for expected in (b"i", b"="):
        if not value.startswith(expected, at):
            raise ChainError("an AAR does not begin with its instance")
        at = _skip_cfws(value, at + 1)
    digits = _POSITION.match(value, at)
    if digits is None:
        raise ChainError("an AAR does not begin with its instance")
    at = _skip_cfws(value, digits.end())
    if not value.startswith(b";", at):
        raise ChainError("an AAR does not begin with its instance")
    return _position(digits[0]), value[at + 1 :]


def _position(digits: bytes) -> int:
    instance = int(digits) if _POSITION.fullmatch(digits) else 0
    if not 1 <= instance <= MAX_SETS:
        raise ChainError(f"an instance is not between 1 and {MAX_SETS}")
    return instance


def _skip_cfws(value: bytes, at: int) -> int:
    """Where the first octet stands that is neither white space nor in a comment (RFC 5322 3.2.2)."""
    depth = 0
    while True:
        at = _WHITE.match(value, at).end()  # type: ignore[union-attr]  # matches everywhere
        if value.startswith(b"(", at):
            depth += 1
            at += 1
        elif not depth or at >= len(value):
            return at
        elif value.startswith(b")", at):
            depth -= 1
            at += 1
        elif value.startswith(b"\\", at):
            at += 2
        else:
            at = _COMMENT_TEXT.match(value, at).end()  # type: ignore[union-attr]  # matches everywhere
