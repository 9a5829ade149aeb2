"""DKIM signatures as a signer makes them (RFC 6376 5, RFC 8301, RFC 8463): relaxed/relaxed, the whole body, no l=.

The header is hashed by what verifies it elsewhere in this package, the body by the engine while it arrives, so that the
size of a message costs no memory here. A signature covers every instance of the fields that it names; those that are
oversigned are named once more than they stand there, so that nobody can add another one (RFC 6376 8.15).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from gateway.api import Canonicalization, Field, Header
from policies.verify.keys import MAX_RSA_BITS, MIN_RSA_BITS
from policies.verify.signed import SINGLETONS, header_digest, signed_fields

FIELD_NAME = "DKIM-Signature"
MODE = Canonicalization.RELAXED

# RFC 6376 5.4.1: what says who wrote what to whom; Received and the like are not signed, since they change
SIGNED = (
    *("from", "sender", "reply-to", "to", "cc", "subject", "date", "message-id", "in-reply-to", "references"),
    *("mime-version", "content-type", "content-transfer-encoding", "content-disposition", "content-id"),
    *("content-description", "resent-from", "resent-sender", "resent-to", "resent-cc", "resent-date"),
    *("resent-message-id", "list-id", "list-help", "list-unsubscribe", "list-unsubscribe-post"),
    *("list-subscribe", "list-post", "list-owner", "list-archive", "auto-submitted", "feedback-id"),
)
OVERSIGNED = tuple(name for name in SIGNED if name.encode() in SINGLETONS)

# RFC 5322 2.1.1: lines of no more than 78 characters
_LINE = 76
_FOLD = "\r\n\t"


class KeyFileError(ValueError):
    """A file that holds no key that may sign; the text says why and holds nothing of it."""


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """A key that signs SHA-256 digests. `algorithm` is the a= tag."""

    algorithm: str
    _key: RSAPrivateKey | Ed25519PrivateKey

    def sign(self, digest: bytes) -> bytes:
        """RFC 6376 3.3.1; RFC 8463 3: Ed25519 signs the digest."""
        if isinstance(self._key, RSAPrivateKey):
            return self._key.sign(digest, PKCS1v15(), Prehashed(SHA256()))
        return self._key.sign(digest)


def read_key(pem: bytes) -> PrivateKey:
    """The key of a PEM file (PKCS #8 or PKCS #1, unencrypted). Raises KeyFileError."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # their texts are for who knows OpenSSL
        raise KeyFileError("it holds no unencrypted private key in PEM") from None
    if isinstance(key, Ed25519PrivateKey):
        return PrivateKey("ed25519-sha256", key)
    if not isinstance(key, RSAPrivateKey):
        raise KeyFileError("its key is neither RSA nor Ed25519")
    # RFC 8301 3.2: signers MUST use at least 1024 bits
    if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        raise KeyFileError(
            f"its RSA key has {key.key_size} bits, which is not in {MIN_RSA_BITS}..{MAX_RSA_BITS}"
        )
    return PrivateKey("rsa-sha256", key)


def signature(
    header: Header,
    body_sha256: bytes,
    key: PrivateKey,
    *,
    domain: str,
    selector: str,
    now: float,
    signed: Sequence[str] = SIGNED,
    oversigned: Sequence[str] = OVERSIGNED,
) -> str:
    """The value of a DKIM-Signature field, folded, for a message with this header.

    `body_sha256` is that of the body in its relaxed form, `now` in seconds since the epoch.
    """
    names = _names(header, signed, oversigned)
    tags = [
        "v=1;",
        f"a={key.algorithm};",
        f"c={MODE}/{MODE};",
        f"d={domain};",
        f"s={selector};",
        f"t={int(now)};",
        # RFC 6376 3.5: h= may be folded at its colons
        *(f"{name}:" for name in ("h=" + ":".join(names)).split(":")[:-1]),
        f"{names[-1] if len(names) > 1 else 'h=' + names[0]};",
        f"bh={base64.b64encode(body_sha256).decode('ascii')};",
    ]
    unsigned = _folded(tags) + f"{_FOLD}b="
    own = Field(FIELD_NAME.lower().encode(), f"{FIELD_NAME}: {unsigned}\r\n".encode("ascii"))
    fields = signed_fields(header, [name.encode("ascii") for name in names], own)
    value = base64.b64encode(key.sign(header_digest(fields, own, MODE))).decode("ascii")
    return unsigned + _FOLD.join(
        [value[: _LINE - 2], *(value[at : at + _LINE] for at in range(_LINE - 2, len(value), _LINE))]
    )


def _names(header: Header, signed: Sequence[str], oversigned: Sequence[str]) -> list[str]:
    """h=: each name as often as it stands in the header, and once more where it is oversigned."""
    names = []
    for name in dict.fromkeys((*signed, *oversigned)):
        count = len(header.all(name.encode("ascii")))
        names += [name] * (count + (name in oversigned))
    return names


def _folded(words: Sequence[str]) -> str:
    """Words in lines; within h= nothing stands between two of them."""
    lines = [""]
    for word in words:
        is_within = lines[-1].endswith(":")
        gap = "" if is_within or not lines[-1] else " "
        if lines[-1] and len(lines[-1]) + len(gap) + len(word) > _LINE - len(FIELD_NAME) * (len(lines) == 1):
            lines.append(word)
        else:
            lines[-1] += gap + word
    return _FOLD.join(lines)
