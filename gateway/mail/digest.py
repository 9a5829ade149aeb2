"""Body digests: SHA-256 of the canonicalised body (RFC 6376 3.4), computed once while it streams in.

Policies ask in `on_header`, when each signature's canonicalisation and length are known, and read in `on_eom`. One
pass over the body serves all signatures; nothing of the body is kept. Time is linear in the octets of the body.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Canonicalization(StrEnum):
    """RFC 6376 3.4: how a body is brought into one form before it is hashed."""

    SIMPLE = "simple"
    RELAXED = "relaxed"


class BodyDigest(NamedTuple):
    """A finished digest. `size_bytes` is the length of the whole canonicalised body, also where less was hashed."""

    sha256: bytes
    size_bytes: int


class BodyDigests:
    """The digests of one message: wanted at the header, fed with the body, read at EOM."""

    def want(self, canonicalization: Canonicalization, length: int | None = None) -> None:
        """Have the first `length` octets of the canonicalised body hashed, all of them when None (RFC 6376 3.7)."""
        raise NotImplementedError

    def get(self, canonicalization: Canonicalization, length: int | None = None) -> BodyDigest:
        """What was wanted. Raises LookupError for what was not, or while the body is not complete."""
        raise NotImplementedError
