"""Mail for the project's own tests, beside the kit's (gateway.testing.mail): signed by dkimpy, and as policies have it.

What verifies here is tested with signatures that somebody else made.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence

import dkim  # type: ignore[import-untyped]  # it has no annotations
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from gateway.mail.body import Spool
from gateway.mail.message import Message, parse_header
from gateway.testing.mail import (
    HONEST,
    RSA_BITS,
    SIGNED,
    SealOptions,
    SigningKey,
    compose,
    ed25519_key,
    rsa_key,
    seal,
    txt_line,
    zone_of,
    zone_text,
)

__all__ = [
    "HONEST",
    "RSA_BITS",
    "SIGNED",
    "SealOptions",
    "SigningKey",
    "arrive",
    "compose",
    "dkim_sign",
    "ed25519_key",
    "message_of",
    "rsa_key",
    "seal",
    "txt_line",
    "zone_of",
    "zone_text",
]


def dkim_sign(message: bytes, key: SigningKey, *, headers: Sequence[str] = SIGNED) -> bytes:
    """The message with a DKIM-Signature of this key on top, by dkimpy."""
    pair = key.private
    if isinstance(pair, rsa.RSAPrivateKey):
        private = pair.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    else:
        private = b64encode(pair.private_bytes_raw())
    field: bytes = dkim.sign(
        message,
        key.selector.encode(),
        key.domain.encode(),
        private,
        canonicalize=(b"relaxed", b"relaxed"),
        signature_algorithm=key.algorithm.encode(),
        include_headers=[name.encode() for name in headers],
    )
    return field + message


def message_of(octets: bytes) -> Message:
    """The message of these octets, as policies have it in `on_header`: nothing of the body has come."""
    end = octets.find(b"\r\n\r\n") + 2
    header = octets[:end] if end > 1 else octets
    body = Spool().new(is_stuffed=False)
    body.append(octets)
    return Message(parse_header(header, max_fields=10_000, wire_bytes=len(header)), body)


def arrive(message: Message) -> None:
    """The body comes and is digested as far as anybody wanted."""
    if message.digests.is_wanted:
        content = b"".join(message.body.blocks())
        message.digests.block(content[message.header.wire_bytes + 2 :])
        message.digests.end()
