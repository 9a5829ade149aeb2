"""Key records: which are keys, what for, and what they verify."""

from __future__ import annotations

from base64 import b64decode, b64encode
from hashlib import sha256
from itertools import count

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from policies.verify.keys import BadKey, KeyFault, KeyType, PublicKey, parse_key
from tests.dkimkit import bare_rsa
from tests.mailkit import ed25519_key, rsa_key

RSA = rsa_key("example.org")
ED = ed25519_key("example.org")
P = RSA.record.partition("p=")[2]
ED_P = ED.record.partition("p=")[2]


def spki(public: rsa.RSAPublicKey | ec.EllipticCurvePublicKey) -> str:
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b64encode(der).decode()


assert isinstance(RSA.private, rsa.RSAPrivateKey)
RSA_MODULUS = RSA.private.public_key().public_numbers().n


def key_of(record: str) -> PublicKey:
    key = parse_key(record.encode())
    assert isinstance(key, PublicKey), key
    return key


def fault_of(record: bytes) -> KeyFault:
    key = parse_key(record)
    assert isinstance(key, BadKey), key
    return key.fault


@pytest.mark.parametrize(
    "record",
    [
        f"v=DKIM1; k=rsa; p={P}",
        f"p={P}",
        f"v=DKIM1; h=sha1 : sha256; k=rsa; s=tlsrpt : email; t=x; n=note; g=*; p={P[:40]} \t{P[40:]};",
        f"k=rsa; s=*; h=sha256;p={P}",
        f"p={bare_rsa(RSA_MODULUS, 65537)}",
    ],
    ids=count(),  # keys are made anew in each process
)
def test_rsa_key_is_read_and_verifies(record: str) -> None:
    key = key_of(record)
    assert (key.type, key.bits, key.is_testing, key.is_strict) == (KeyType.RSA, 2048, False, False)
    signature = b64decode(RSA.sign(b"abc"))
    assert key.verify(signature, sha256(b"abc").digest())
    assert not key.verify(signature, sha256(b"abd").digest())
    assert not key.verify(signature[:-1], sha256(b"abc").digest())
    assert not key.verify(b"", sha256(b"abc").digest())


def test_ed25519_key_is_read_and_verifies() -> None:
    key = key_of(f"v=DKIM1; k=ed25519; t=y:s; p={ED_P}")
    assert (key.type, key.bits, key.is_testing, key.is_strict) == (KeyType.ED25519, 256, True, True)
    signature = b64decode(ED.sign(b"abc"))
    assert key.verify(signature, sha256(b"abc").digest())
    assert not key.verify(signature[:-1], sha256(b"abc").digest())


EC = spki(ec.generate_private_key(ec.SECP256R1()).public_key())
MODULUS = (1 << 2047) | 12345


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (b"", KeyFault.SYNTAX),
        (b"junk", KeyFault.SYNTAX),
        (b"v=DKIM1; k=rsa", KeyFault.SYNTAX),
        (b"v=DKIM1; k=rsa; p=", KeyFault.REVOKED),
        (b"v=DKIM1; k=rsa; p= \t", KeyFault.REVOKED),
        (b"k=rsa; v=DKIM1; p=" + P.encode(), KeyFault.SYNTAX),
        (b"v=DKIM2; p=" + P.encode(), KeyFault.SYNTAX),
        (b"v=dkim1; p=" + P.encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + P.encode() + b"; p=" + P.encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; n=\xe4; p=" + P.encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; h=sha1; p=" + P.encode(), KeyFault.UNFIT),
        (b"v=DKIM1; h=; p=" + P.encode(), KeyFault.UNFIT),
        (b"v=DKIM1; s=tlsrpt; p=" + P.encode(), KeyFault.UNFIT),
        (b"v=DKIM1; k=dsa; p=" + P.encode(), KeyFault.UNKNOWN_TYPE),
        (b"v=DKIM1; p=AAAA", KeyFault.SYNTAX),
        (b"v=DKIM1; p=A", KeyFault.SYNTAX),
        (b"v=DKIM1; p=!!!!", KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + b64encode(b"\x30\x82\xff\xff" + b"A" * 40), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + EC.encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + ED_P.encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; k=ed25519; p=" + P.encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; k=ed25519; p=" + b64encode(b"k" * 51), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + bare_rsa(MODULUS, 1).encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + bare_rsa(MODULUS, 2).encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + bare_rsa(MODULUS, 65536).encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + bare_rsa(MODULUS, -3).encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + bare_rsa(0, 3).encode(), KeyFault.SYNTAX),
        (b"v=DKIM1; p=" + bare_rsa(MODULUS, (1 << 33) | 1).encode(), KeyFault.UNFIT),
        (b"v=DKIM1; p=" + bare_rsa(MODULUS, (1 << 64) | 1).encode(), KeyFault.UNFIT),
        (b"v=DKIM1; p=" + bare_rsa((1 << 8192) | 1, 3).encode(), KeyFault.UNFIT),
        (b"v=DKIM1; p=" + bare_rsa((1 << 16383) | 1, (1 << 16380) | 1).encode(), KeyFault.UNFIT),
    ],
    ids=count(),
)
def test_record_that_is_no_key_for_mail(record: bytes, fault: KeyFault) -> None:
    assert fault_of(record) is fault


@pytest.mark.parametrize(
    ("modulus", "exponent"),
    [((1 << 8191) | 1, 3), ((1 << 511) | 1, 3), (MODULUS, 17), (MODULUS, (1 << 32) | 1)],
    ids=count(),
)
def test_length_of_an_rsa_key_is_told(modulus: int, exponent: int) -> None:
    assert key_of(f"p={bare_rsa(modulus, exponent)}").bits == modulus.bit_length()


def test_key_is_made_once() -> None:
    record = f"v=DKIM1; n=once; p={P}".encode()
    assert parse_key(record) is parse_key(bytes(bytearray(record)))


def test_long_record_is_read_and_not_kept() -> None:
    record = f"v=DKIM1; n={'x' * 60_000}; p={P}".encode()
    assert isinstance(parse_key(record), PublicKey)
    assert parse_key(record) is not parse_key(record)
