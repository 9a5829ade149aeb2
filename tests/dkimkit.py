"""DKIM signatures with any tags, honest or not, for tests; canonicalised by dkimpy, signed here.

    sign(mail, KEY, {"l": "5", "i": "@sub.example.org", "t": None})

A tag of None is left out. What the tags say is what is signed, as far as it means something: c=, h=, l=.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256

import dkim  # type: ignore[import-untyped]  # it has no annotations
from dkim.canonicalization import CanonicalizationPolicy  # type: ignore[import-untyped]

from gateway.testing import Zone
from policies.verify.dkim.signature import parse_signatures
from policies.verify.dkim.verify import Judged, Limits, judge, want_bodies
from tests.mailkit import SigningKey, arrive, message_of

NOW = 1_700_000_000
HEADERS = "from:to:subject:date:message-id"


def sign(
    message: bytes, key: SigningKey, changes: Mapping[str, str | None] | None = None, *, separator: str = "; "
) -> bytes:
    """The message with one more signature on top."""
    tags: dict[str, str | None] = {
        "v": "1",
        "a": key.algorithm,
        "c": "relaxed/relaxed",
        "d": key.domain,
        "s": key.selector,
        "h": HEADERS,
        "bh": "",
        **(changes or {}),
    }
    policy = _policy(tags.get("c"))
    fields, body = dkim.rfc822_parse(message)
    if tags.get("bh") == "":
        hashed = policy.canonicalize_body(body)
        length = tags.get("l") or ""
        tags["bh"] = b64encode(
            sha256(hashed[: int(length)] if length.isdigit() else hashed).digest()
        ).decode()
    given = tags.pop("b", "")
    text = separator.join([f"{name}={value}" for name, value in tags.items() if value is not None])
    field = f"DKIM-Signature: {text}{separator}b=".encode()
    names = [name.strip().lower().encode() for name in (tags.get("h") or "").split(":")]
    signed = dkim.select_headers(policy.canonicalize_headers(fields), names)
    own = policy.canonicalize_headers([(field.partition(b":")[0], field.partition(b":")[2])])
    octets = b"".join([name + b":" + value for name, value in [*signed, *own]])
    return field + (given or key.sign(octets.removesuffix(b"\r\n"))).encode() + b"\r\n" + message


def _policy(modes: str | None) -> CanonicalizationPolicy:
    try:
        return CanonicalizationPolicy.from_c_value((modes or "simple/simple").encode())
    except dkim.canonicalization.InvalidCanonicalizationPolicyError:
        return CanonicalizationPolicy.from_c_value(b"simple/simple")


def judge_all(
    octets: bytes,
    zone: Zone,
    limits: Limits | None = None,
    *,
    now: float = NOW,
    most: int = 10,
    is_internationalized: bool = False,
) -> tuple[Judged, ...]:
    """What the verifier finds in a message, each signature from the top."""
    message = message_of(octets)
    signatures = parse_signatures(
        message.header, now=now, most=most, is_internationalized=is_internationalized
    )
    want_bodies(signatures, message.digests)
    arrive(message)
    return zone.run(judge(message.header, message.digests, signatures, limits or Limits()))


def _der_length(size: int) -> bytes:
    return bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")


def _der_integer(number: int) -> bytes:
    octets = number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)
    return b"\x02" + _der_length(len(octets)) + octets


def bare_rsa(modulus: int, exponent: int) -> str:
    """An RSAPublicKey (RFC 8017 A.1.1), however odd its numbers are."""
    content = _der_integer(modulus) + _der_integer(exponent)
    return b64encode(b"\x30" + _der_length(len(content)) + content).decode()
