"""Public keys in DNS: their records (RFC 6376 3.6.1, RFC 8301, RFC 8463 4) and what they verify.

A record becomes a PublicKey or a BadKey, never an exception. Both are remembered by the text of the record, since
loading a key costs as much as a verification does.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from policies.verify.tags import TagError, colon_list, parse_tags, without_space

# RFC 8301 3.2: keys below 1024 bits never verify; the upper bound is ours, and so is that of a record that is kept
MIN_RSA_BITS = 1024
MAX_RSA_BITS = 8192
# Ours: the largest in use is 2**32 + 1, and the time of a verification grows with it
_MAX_EXPONENT_BITS = 33
_MAX_KEPT_BYTES = 4096
_KEPT = 1024


class KeyType(StrEnum):
    """RFC 6376 3.6.1, RFC 8463 4.1: the values of k=."""

    RSA = "rsa"
    ED25519 = "ed25519"


class KeyFault(StrEnum):
    """Why a record is no key that can be used."""

    SYNTAX = "syntax"
    REVOKED = "revoked"
    UNKNOWN_TYPE = "unknown_type"
    UNFIT = "unfit"  # it is a key, but not for this


class BadKey(NamedTuple):
    """A record that gives no key; `why` is in plain words and holds nothing of the record."""

    fault: KeyFault
    why: str


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key as its owner published it. `bits` is the length of an RSA modulus, 256 for Ed25519."""

    type: KeyType
    bits: int
    is_testing: bool  # t=y: the domain is testing DKIM
    is_strict: bool  # t=s: the domain of i= must be that of d=
    _verify: Callable[[bytes, bytes], None]  # raises InvalidSignature

    def verify(self, signature: bytes, digest: bytes) -> bool:
        """Whether this is the signature of a SHA-256 digest (RFC 6376 3.3.2, RFC 8463 3)."""
        try:
            self._verify(signature, digest)
        except InvalidSignature:
            return False
        return True


_PADDING = PKCS1v15()
_PREHASHED = Prehashed(SHA256())


def parse_key(record: bytes) -> PublicKey | BadKey:
    """The key of one TXT record, whose strings are joined."""
    return _kept(record) if len(record) <= _MAX_KEPT_BYTES else _parse(record)


def _parse(record: bytes) -> PublicKey | BadKey:
    try:
        tags = parse_tags(record)
    except TagError as exc:
        return BadKey(KeyFault.SYNTAX, f"the key record is malformed: {exc}")
    # RFC 6376 3.6.1: v= is the first tag where it is given, and records with any other value MUST be discarded
    if "v" in tags and (tags["v"] != b"DKIM1" or next(iter(tags)) != "v"):
        return BadKey(KeyFault.SYNTAX, "the record is not of version DKIM1")
    if "p" not in tags:
        return BadKey(KeyFault.SYNTAX, "the key record has no p=")
    encoded = without_space(tags["p"])
    if not encoded:
        return BadKey(KeyFault.REVOKED, "the key is revoked")
    # RFC 6376 3.6.1: unrecognized algorithms, service types and key types are ignored
    if "h" in tags and b"sha256" not in colon_list(tags["h"]):
        return BadKey(KeyFault.UNFIT, "the key is not for sha256")
    if not {b"*", b"email"}.intersection(colon_list(tags.get("s", b"*"))):
        return BadKey(KeyFault.UNFIT, "the key is not for email")
    try:
        octets = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return BadKey(KeyFault.SYNTAX, "the key is no base64")
    flags = colon_list(tags.get("t", b""))
    match tags.get("k", b"rsa"):
        case b"rsa":
            return _rsa(octets, flags)
        case b"ed25519":
            return _ed25519(octets, flags)
        case _:
            return BadKey(KeyFault.UNKNOWN_TYPE, "the type of the key is unknown")


_kept = lru_cache(maxsize=_KEPT)(_parse)


def _rsa(octets: bytes, flags: list[bytes]) -> PublicKey | BadKey:
    # RFC 6376 3.6.1 and its erratum 3017: a SubjectPublicKeyInfo is what everybody publishes, RSAPublicKey what
    # the text asks for; both are loaded here
    try:
        key = load_der_public_key(octets)
    except (ValueError, UnsupportedAlgorithm):
        return BadKey(KeyFault.SYNTAX, "the key is no RSA key")
    if not isinstance(key, RSAPublicKey):
        return BadKey(KeyFault.SYNTAX, "the key is no RSA key")
    exponent = key.public_numbers().e
    if exponent < 3 or exponent % 2 == 0 or exponent.bit_length() > _MAX_EXPONENT_BITS:
        return BadKey(
            KeyFault.UNFIT,
            f"the exponent of the RSA key is not odd, below 3 or over {_MAX_EXPONENT_BITS} bits",
        )
    if key.key_size > MAX_RSA_BITS:
        return BadKey(KeyFault.UNFIT, f"the RSA key has more than {MAX_RSA_BITS} bits")

    def verify(signature: bytes, digest: bytes) -> None:
        key.verify(signature, digest, _PADDING, _PREHASHED)

    return PublicKey(KeyType.RSA, key.key_size, b"y" in flags, b"s" in flags, verify)


def _ed25519(octets: bytes, flags: list[bytes]) -> PublicKey | BadKey:
    # RFC 8463 4.2: the key itself, 256 bits, in no structure
    try:
        key = Ed25519PublicKey.from_public_bytes(octets)
    except ValueError:
        return BadKey(KeyFault.SYNTAX, "the key is no Ed25519 key")
    return PublicKey(KeyType.ED25519, 256, b"y" in flags, b"s" in flags, key.verify)
