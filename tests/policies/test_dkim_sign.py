"""dkim_sign: what leaves is signed as it leaves, and verifiers that are not ours say so too."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import dkim  # type: ignore[import-untyped]  # it has no annotations
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api import AddressSource, Result, Trust
from gateway.mail.digest import BodyDigests
from gateway.mail.message import HeaderReader
from gateway.policy import Mode
from gateway.testing import Client, Harness, PolicyContract
from gateway.testing.mail import SigningKey, compose, zone_of
from policies.dkim_sign import DkimSign, DkimSignSettings, KeySettings
from policies.verify.dkim.sign import KeyFileError, read_key
from policies.verify.dkim.signature import parse_signatures
from policies.verify.dkim.verify import Limits, judge, want_bodies

RSA = SigningKey("example.org", "rsa1")
ED25519 = SigningKey("example.org", "ed1", bits=0)
OTHER = SigningKey("example.net", "s2", bits=0)
SUB = SigningKey("sub.example.org", "s3", bits=0)
ANN = Client(trust=Trust.AUTHENTICATED, user="ann@example.org")


def pem(key: SigningKey) -> bytes:
    return key.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


@cache
def folder() -> Path:
    return Path(mkdtemp(prefix="mxgate-keys"))


def table(key: SigningKey) -> KeySettings:
    file = folder() / f"{key.selector}.{key.domain}.pem"
    if not file.exists():
        file.write_bytes(pem(key))
    return KeySettings(key.domain, key.selector, file)


def settings_of(*keys: SigningKey, **more: Any) -> DkimSignSettings:
    return DkimSignSettings(keys=tuple(map(table, keys)), **more)


class TestContract(PolicyContract):
    policy = DkimSign
    settings = settings_of(RSA, ED25519)


def signed(message: bytes, *keys: SigningKey, **more: Any) -> bytes:
    """The message as the downstream gets it."""
    with Harness(DkimSign, settings_of(*keys, **more)) as harness:
        played = harness.deliver(message, client=ANN)
    assert played.message is not None, played.reply
    return played.message


def count(message: bytes) -> int:
    return message.partition(b"\r\n\r\n")[0].count(b"DKIM-Signature: ")


def is_good(message: bytes, *keys: SigningKey) -> bool:
    """Whether dkimpy and our own verifier accept all signatures."""
    records = {f"{key.name}.": key.record.encode() for key in keys}
    theirs = dkim.DKIM(message)
    by_dkimpy = [
        theirs.verify(idx=at, dnsfunc=lambda name, **_: records.get(name.decode()))
        for at in range(count(message))
    ]
    reader = HeaderReader(is_stuffed=False, max_bytes=1 << 20, max_fields=1000)
    reader.feed(message)
    header, digests = reader.finish(), BodyDigests()
    found = parse_signatures(header, now=1_700_000_000.0, most=10)
    want_bodies(found, digests)
    digests.block(message[header.wire_bytes + 2 :])
    digests.end()
    by_us = zone_of(*keys).run(judge(header, digests, found, Limits()))
    ours = [each.finding.result is Result.PASS for each in by_us]
    assert ours == by_dkimpy, (by_dkimpy, by_us)
    return bool(ours) and all(ours)


def test_each_key_of_the_authors_domain_signs() -> None:
    message = signed(compose("ann@example.org"), RSA, ED25519, OTHER)
    assert count(message) == 2
    assert is_good(message, RSA, ED25519)
    assert b"a=rsa-sha256; c=relaxed/relaxed; d=example.org; s=rsa1;" in message
    assert b"a=ed25519-sha256; c=relaxed/relaxed; d=example.org; s=ed1;" in b" ".join(message.split())
    # signatures stand above all else
    assert message.startswith(b"DKIM-Signature: v=1;")


@pytest.mark.parametrize(
    ("author", "domain"),
    [
        ("ann@example.org", b"d=example.org;"),
        ("ann@a.b.example.org", b"d=example.org;"),
        ("ann@sub.example.org", b"d=sub.example.org;"),
        ("ann@x.sub.example.org", b"d=sub.example.org;"),
        ("ann@EXAMPLE.NET", b"d=example.net;"),
        ("ann@notexample.org", b""),
        ("ann@org", b""),
        ("ann@example.org, bob@example.net", b""),
        ("broken", b""),
    ],
)
def test_the_key_is_that_of_the_author_domain_or_of_the_closest_one_above(author: str, domain: bytes) -> None:
    message = signed(compose(author), ED25519, OTHER, SUB)
    assert count(message) == bool(domain)
    assert domain in message


@pytest.mark.parametrize(
    "message",
    [
        b"From: a@example.org\r\n\r\n",
        b"From: a@example.org\r\n",
        b"From: a@example.org\r\n\r\n\r\n\r\n",
        b"From: a@example.org\r\n\r\nx",
        b"From: a@example.org\r\n\r\n .\r\n..\r\n.\r\n \t \r\n",
        b"From: a@example.org\r\n\r\n" + b" " * 100_000 + b"\r\n",
        b"FROM:\r\n\ta@example.org\r\nsubject:   a\t b \r\n  c\r\nTo:\r\n b@c.d\r\n\r\nx\r\n",
        b"From: a@example.org\r\nTo: b@c.d\r\nTo: e@f.g\r\nSubject: =?utf-8?q?=C3=A4?=\r\n\r\nx\r\n",
        b"Received-SPF: pass\r\nFrom: a@example.org\r\n\r\nwhat is taken out is not there any more\r\n",
        b"DKIM-Signature: v=1; d=example.com\r\nFrom: a@example.org\r\n\r\nx\r\n",
    ],
)
def test_verifiers_accept_what_leaves(message: bytes) -> None:
    left = signed(message, RSA, ED25519)
    if b"v=1; d=example.com" in left:  # somebody else's, which is none
        left = left.replace(b"DKIM-Signature: v=1; d=example.com\r\n", b"")
    assert is_good(left, RSA, ED25519)


@pytest.mark.parametrize(
    "name", ["From", "To", "Cc", "Subject", "Date", "Message-ID", "Reply-To", "MIME-Version"]
)
def test_nobody_can_add_a_field_that_is_oversigned(name: str) -> None:
    message = signed(compose("ann@example.org"), RSA)
    assert is_good(message, RSA)
    assert not is_good(f"{name}: x\r\n".encode() + message, RSA)


@pytest.mark.parametrize(
    ("client", "is_signed"),
    [
        (Client(), False),
        (Client(trust=Trust.TRUSTED), True),
        (Client(trust=Trust.TRUSTED, source=AddressSource.HIDDEN), False),
        (ANN, True),
    ],
)
def test_a_stranger_is_not_vouched_for(client: Client, is_signed: bool) -> None:
    with Harness(DkimSign, settings_of(ED25519)) as harness:
        played = harness.deliver(compose("ann@example.org"), client=client)
    assert played.message is not None
    assert count(played.message) == is_signed


def test_what_changes_on_the_way_is_not_signed() -> None:
    message = signed(compose("ann@example.org", fields=["X-Mailer: x", "Received: from a"]), RSA)
    assert is_good(
        b"Received: from b\r\nReturn-Path: <a@b.c>\r\n" + message.replace(b"X-Mailer: x", b"X-Mailer: y"), RSA
    )


def test_the_operator_chooses_the_fields() -> None:
    message = signed(
        compose("ann@example.org", fields=["X-Mailer: x"]),
        RSA,
        signed_fields=("From", "X-Mailer"),
        oversigned_fields=("Subject",),
    )
    assert b"h=from:x-mailer:subject:subject;" in message
    assert is_good(message, RSA)


def test_every_line_of_a_signature_is_short() -> None:
    message = signed(compose("ann@example.org"), RSA, ED25519)
    field = re.findall(rb"DKIM-Signature: .*?\r\n(?=\S)", message, re.DOTALL)
    assert len(field) == 2
    assert max(len(line) for line in b"".join(field).split(b"\r\n")) <= 78


def test_an_observed_one_signs_nothing() -> None:
    with Harness(DkimSign, settings_of(RSA), mode=Mode.OBSERVE) as harness:
        played = harness.deliver(compose("ann@example.org"), client=ANN)
    assert played.message is not None
    assert count(played.message) == 0


# --- keys -----------------------------------------------------------------------------------------------


def test_a_key_that_changes_is_read_again_and_a_bad_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(pem(ED25519))
    other = SigningKey("example.org", "ed1", bits=0, number=1)
    with Harness(DkimSign, DkimSignSettings(keys=(KeySettings("example.org", "ed1", file),))) as harness:

        def is_signed_by(key: SigningKey) -> bool:
            harness.clock.advance(10)
            played = harness.deliver(compose("ann@example.org"), client=ANN)
            assert played.message is not None
            return is_good(played.message, key)

        assert is_signed_by(ED25519)
        file.write_bytes(pem(other))
        os.utime(file, (1, 1))
        assert is_signed_by(other)
        file.write_bytes(b"garbage")
        assert is_signed_by(other)
        file.unlink()
        assert is_signed_by(other)
        file.write_bytes(pem(ED25519))
        assert is_signed_by(ED25519)
        assert {line.event for line in harness.log.of("error")} == {"key.reload_failed"}
        assert not any("garbage" in repr(line) for line in harness.log.lines)


def test_a_key_that_becomes_readable_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key.pem"
    file.write_bytes(pem(ED25519))
    other = SigningKey("example.org", "ed1", bits=0, number=1)
    with Harness(DkimSign, DkimSignSettings(keys=(KeySettings("example.org", "ed1", file),))) as harness:

        def is_signed_by(key: SigningKey) -> bool:
            harness.clock.advance(10)
            played = harness.deliver(compose("ann@example.org"), client=ANN)
            assert played.message is not None
            return is_good(played.message, key)

        def denied(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        assert is_signed_by(ED25519)
        file.write_bytes(pem(other))
        os.utime(file, (1, 1))
        with monkeypatch.context() as patched:
            patched.setattr(Path, "read_bytes", denied)
            assert is_signed_by(ED25519)
        # chmod: neither its time, nor its inode, nor its size
        assert is_signed_by(other)


def _other_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes = b"") -> bytes:
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def test_a_file_that_is_no_key_is_told_without_what_is_in_it() -> None:
    private = RSA.private
    assert isinstance(private, rsa.RSAPrivateKey)
    for content, why in (
        (b"", "no unencrypted private key"),
        (b"-----BEGIN PRIVATE KEY-----\nsecret\n-----END PRIVATE KEY-----\n", "no unencrypted private key"),
        (_other_pem(private, b"secret"), "no unencrypted private key"),
        (_other_pem(ec.generate_private_key(ec.SECP256R1())), "neither RSA nor Ed25519"),
        (pem(RSA).replace(b"PRIVATE", b"PUBLIC"), "no unencrypted private key"),
    ):
        with pytest.raises(KeyFileError) as caught:
            read_key(content)
        assert why in str(caught.value)
        assert "secret" not in repr(caught.value)


def test_a_key_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    for file, error in ((tmp_path / "none.pem", OSError), (tmp_path / "bad.pem", KeyFileError)):
        if error is KeyFileError:
            file.write_bytes(b"x")
        with (
            Harness(DkimSign, DkimSignSettings(keys=(KeySettings("example.org", "s", file),))) as harness,
            pytest.raises(error, match=file.name),
        ):
            harness.deliver()


@pytest.mark.parametrize(
    ("domain", "selector"),
    [
        ("a b", "s"),
        ("", "s"),
        ("example.org", ""),
        ("example.org", "a;b"),
        ("example.org", "a b"),
        ("example.org", ".a"),
    ],
)
def test_names_that_are_none_are_refused(domain: str, selector: str) -> None:
    with pytest.raises(ValueError, match=r"domain|selector"):
        KeySettings(domain, selector, Path("key.pem"))


@pytest.mark.parametrize(
    "more",
    [
        {"keys": ()},
        {"signed_fields": ("To",), "oversigned_fields": ("Subject",)},
        {"signed_fields": ("From", "a:b")},
        {"signed_fields": ("From", "a;b")},
        {"oversigned_fields": ("From", "")},
    ],
)
def test_settings_that_sign_nothing_right_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keys|From|field name"):
        DkimSignSettings(**{"keys": (table(ED25519),), **more})


# --- properties -----------------------------------------------------------------------------------------

# VT and FF are white space to dkimpy, and not to RFC 6376
_TEXT = st.text(st.sampled_from('ab:;=,. \t<>@"\\\x01\x7f'), max_size=40)
_FIELDS = st.lists(
    st.tuples(st.sampled_from(["To", "Subject", "CC", "X-A", "List-Id", "References", "date"]), _TEXT),
    max_size=8,
)
_BODY = st.lists(st.one_of(_TEXT, st.sampled_from(["", ".", "..", " ", "\t \t", "a  b"])), max_size=8)


@settings(max_examples=60)
@given(_FIELDS, _BODY)
def test_whatever_is_sent_verifies(fields: list[tuple[str, str]], body: list[str]) -> None:
    header = "".join(f"{name}: {value}\r\n" for name, value in fields)
    message = f"From: a@example.org\r\n{header}\r\n" + "".join(f"{line}\r\n" for line in body)
    assert is_good(signed(message.encode(), ED25519), ED25519)
