"""Mail for tests: composed, with attachments, and signed and sealed for real; keys with their DNS records.

    AUTHOR = rsa_key("author.example")
    mail = dkim_sign(compose("ann@author.example", attach=[Attachment("a.txt", b"Hello")]), AUTHOR)
    mail = seal(mail, LIST, "mx.list.example; dmarc=pass header.from=author.example")
    zone_of(AUTHOR, LIST)           # a Zone; zone_text(AUTHOR, LIST) is for a name server

Canonicalisation (RFC 6376 3.4) is made here once more, apart from what verifies. Keys are made once for a process:
which key belongs to which name never matters.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from gateway.lookup import RRType
from gateway.testing.zone import Zone

RSA_BITS = 2048
SIGNED = ("from", "to", "subject", "date", "message-id")
_SET = ("arc-authentication-results", "arc-message-signature", "arc-seal")
_TXT_STRING_BYTES = 255
_BOUNDARY = "mxgate-part"


@dataclass(frozen=True)
class SigningKey:
    """A key pair, made when it is first used, and the name that its public half is published under."""

    domain: str
    selector: str = "s1"
    bits: int = RSA_BITS
    """Of the RSA modulus; 0 for Ed25519."""
    number: int = 0
    """Another number is another key pair."""

    @property
    def private(self) -> rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey:
        """The private half."""
        return _rsa(self.number, self.bits) if self.bits else _ed25519(self.number)

    @property
    def name(self) -> str:
        """RFC 6376 3.6.2.1: where the record is."""
        return f"{self.selector}._domainkey.{self.domain}"

    @property
    def algorithm(self) -> str:
        """The a= tag."""
        return "rsa-sha256" if self.bits else "ed25519-sha256"

    @property
    def record(self) -> str:
        """RFC 6376 3.6.1, RFC 8463 4: the TXT record."""
        public = self.private.public_key()
        if isinstance(public, rsa.RSAPublicKey):
            der = public.public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            return f"v=DKIM1; k=rsa; p={b64encode(der).decode()}"
        raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return f"v=DKIM1; k=ed25519; p={b64encode(raw).decode()}"

    def sign(self, octets: bytes) -> str:
        """The b= of these octets."""
        digest, private = sha256(octets).digest(), self.private
        if isinstance(private, rsa.RSAPrivateKey):
            return b64encode(private.sign(digest, padding.PKCS1v15(), Prehashed(hashes.SHA256()))).decode()
        return b64encode(private.sign(digest)).decode()


@cache
def _rsa(number: int, bits: int) -> rsa.RSAPrivateKey:  # noqa: ARG001  # another number is another key
    return rsa.generate_private_key(65537, bits)


@cache
def _ed25519(number: int) -> ed25519.Ed25519PrivateKey:  # noqa: ARG001  # as above
    return ed25519.Ed25519PrivateKey.generate()


def rsa_key(domain: str, selector: str = "s1", *, bits: int = RSA_BITS, number: int = 0) -> SigningKey:
    """An RSA key of this domain."""
    return SigningKey(domain, selector, bits, number)


def ed25519_key(domain: str, selector: str = "s1", *, number: int = 0) -> SigningKey:
    """An Ed25519 key of this domain."""
    return SigningKey(domain, selector, 0, number)


def zone_of(*keys: SigningKey) -> Zone:
    """A world of DNS that has these keys and nothing else."""
    return Zone({key.name: {RRType.TXT: [key.record.encode()]} for key in keys})


def zone_text(*keys: SigningKey) -> str:
    """The same as lines of a master file (RFC 1035 5), with absolute names."""
    return "".join([txt_line(key.name, key.record) for key in keys])


def txt_line(name: str, text: str, ttl_s: int = 300) -> str:
    """One TXT record of a master file, cut into strings of 255 octets."""
    strings = [text[at : at + _TXT_STRING_BYTES] for at in range(0, len(text), _TXT_STRING_BYTES)]
    return f"{name}. {ttl_s} IN TXT " + " ".join([f'"{each}"' for each in strings]) + "\n"


@dataclass(frozen=True)
class Attachment:
    """One more part of a message, in base64."""

    name: str
    content: bytes
    content_type: str = "application/octet-stream"


def compose(
    author: str = "ann@author.example",
    *,
    to: str = "bob@example.org",
    subject: str = "Hello",
    body: str = "Hello Bob.\r\n",
    fields: Iterable[str] = (),
    attach: Sequence[Attachment] = (),
) -> bytes:
    """A message; `author` is all that stands in From, `fields` come first, e.g. "List-Id: <a.example.org>".

    It is plain text without MIME fields unless something is attached.
    """
    lines = [
        *fields,
        f"From: {author}",
        f"To: {to}",
        f"Subject: {subject}",
        "Date: Tue, 14 Nov 2023 22:13:20 +0000",
        "Message-ID: <1@author.example>",
    ]
    if attach:
        lines += ["MIME-Version: 1.0", f'Content-Type: multipart/mixed; boundary="{_BOUNDARY}"']
        text = "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit"
        parts = [f"{text}\r\n\r\n{body}", *map(_part, attach)]
        body = "".join([f"--{_BOUNDARY}\r\n{part}\r\n" for part in parts]) + f"--{_BOUNDARY}--\r\n"
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


def _part(attachment: Attachment) -> str:
    """RFC 2045 6.8: lines of 76 characters."""
    encoded = b64encode(attachment.content).decode()
    lines = [encoded[at : at + 76] for at in range(0, len(encoded), 76)]
    fields = (
        f"Content-Type: {attachment.content_type}",
        f'Content-Disposition: attachment; filename="{attachment.name}"',
        "Content-Transfer-Encoding: base64",
    )
    return "\r\n".join([*fields, "", *lines])


def dkim_sign(message: bytes, key: SigningKey, *, headers: Sequence[str] = SIGNED) -> bytes:
    """The message with a DKIM-Signature of this key on top (RFC 6376 5), relaxed/relaxed, without t= and x=."""
    fields, body = _split(message)
    names = [name for name in headers if any(_name(each) == name for each in fields)]
    body_hash = b64encode(sha256(_body(body, "relaxed")).digest()).decode()
    own = (
        f"DKIM-Signature: v=1; a={key.algorithm}; c=relaxed/relaxed; d={key.domain}; s={key.selector};\r\n"
        f" h={':'.join(names)};\r\n bh={body_hash};\r\n b="
    ).encode()
    signed = [_field(each) + b"\r\n" for each in _selected(fields, names)]
    return own + key.sign(b"".join(signed) + _field(own)).encode() + b"\r\n" + message


@dataclass(frozen=True)
class SealOptions:
    """How a set departs from what an honest sealer writes; "" and 0 stand for what is right."""

    instance: int = 0
    cv: str = ""
    headers: Sequence[str] = SIGNED
    canonicalization: str = "relaxed/relaxed"
    ams_tags: str = ""
    """More tags of the AMS, such as " l=5;"."""
    seal_tags: str = ""
    ams_key: SigningKey | None = None
    """Who signs the AMS, when not the sealer."""


HONEST = SealOptions()


def seal(message: bytes, key: SigningKey, results: str, options: SealOptions = HONEST) -> bytes:
    """The message with one more ARC set on top (RFC 8617 5.1); `results` is what the AAR says behind its instance."""
    fields, body = _split(message)
    sets = _sets(fields)
    instance = options.instance or max(sets, default=0) + 1
    ams_key = options.ams_key or key
    modes = options.canonicalization.split("/")
    body_hash = b64encode(sha256(_body(body, modes[-1] if len(modes) > 1 else "simple")).digest()).decode()
    aar = f"ARC-Authentication-Results: i={instance}; {results}".encode()
    ams = (
        f"ARC-Message-Signature: i={instance}; a={ams_key.algorithm}; c={options.canonicalization};"
        f" d={ams_key.domain}; s={ams_key.selector}; t=1700000000;{options.ams_tags}\r\n"
        f" h={':'.join(options.headers)};\r\n bh={body_hash};\r\n b="
    ).encode()
    signed = [_field(each, modes[0]) + b"\r\n" for each in _selected(fields, options.headers)]
    ams += ams_key.sign(b"".join(signed) + _field(ams, modes[0])).encode()
    cv = options.cv or ("none" if instance == 1 else "pass")
    own = (
        f"ARC-Seal: i={instance}; a={key.algorithm}; t=1700000000; cv={cv};{options.seal_tags}"
        f" d={key.domain}; s={key.selector};\r\n b="
    ).encode()
    sealed = [each for number in sorted(sets) for each in sets[number]] + [aar, ams]
    own += key.sign(b"".join([_field(each) + b"\r\n" for each in sealed]) + _field(own)).encode()
    return b"\r\n".join([own, ams, aar, message])


def _split(message: bytes) -> tuple[list[bytes], bytes]:
    header, _, body = message.partition(b"\r\n\r\n")
    return re.split(rb"\r\n(?![ \t])", header), body


def _name(field: bytes) -> str:
    return field.partition(b":")[0].strip().lower().decode("latin-1")


def _sets(fields: Iterable[bytes]) -> dict[int, list[bytes]]:
    """The ARC fields by instance, those of one in the order in which seals cover them."""
    found: dict[int, list[bytes]] = {}
    for field in fields:
        if _name(field) in _SET and (instance := re.search(rb"[:;\s]i\s*=\s*(\d+)", field)):
            found.setdefault(int(instance[1]), []).append(field)
    return {number: sorted(each, key=lambda f: _SET.index(_name(f))) for number, each in found.items()}


def _selected(fields: Sequence[bytes], names: Iterable[str]) -> list[bytes]:
    """RFC 6376 5.4.2: bottom-up, each field once."""
    left = list(fields)
    chosen = []
    for name in names:
        at = next((i for i in reversed(range(len(left))) if _name(left[i]) == name.lower()), None)
        if at is not None:
            chosen.append(left.pop(at))
    return chosen


def _field(field: bytes, mode: str = "relaxed") -> bytes:
    """RFC 6376 3.4.1, 3.4.2, without the last CRLF."""
    if mode == "simple":
        return field
    name, _, value = field.partition(b":")
    value = re.sub(rb"[ \t]+", b" ", value.replace(b"\r\n", b"")).strip(b" ")
    return name.strip().lower() + b":" + value


def _body(body: bytes, mode: str) -> bytes:
    """RFC 6376 3.4.3, 3.4.4."""
    if mode == "relaxed":
        body = b"\r\n".join(re.sub(rb"[ \t]+", b" ", line).rstrip(b" ") for line in body.split(b"\r\n"))
    while body.endswith(b"\r\n\r\n"):
        body = body[:-2]
    if body == b"\r\n" or not body:
        return b"" if mode == "relaxed" else b"\r\n"
    return body if body.endswith(b"\r\n") else body + b"\r\n"
