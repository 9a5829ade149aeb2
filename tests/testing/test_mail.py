"""gateway.testing.mail: what it signs, others verify; what it composes is MIME."""

from __future__ import annotations

from email import message_from_bytes, policy

import dkim  # type: ignore[import-untyped]  # it has no annotations
import pytest

from gateway.lookup import Question, RRType
from gateway.testing import Zone
from gateway.testing.mail import Attachment, SigningKey, compose, dkim_sign, ed25519_key, rsa_key, zone_of


def is_valid(message: bytes, zone: Zone) -> bool:
    """Whether dkimpy verifies the signature on top."""

    def txt(name: bytes, timeout: int = 0) -> bytes:
        answer = zone.answer(Question(name.decode(), RRType.TXT))
        return answer.texts[0]

    return bool(dkim.verify(message, dnsfunc=txt))


@pytest.mark.parametrize(
    "key", [rsa_key("author.example"), ed25519_key("author.example")], ids=["rsa", "ed25519"]
)
@pytest.mark.parametrize("body", ["Hello.\r\n", "", "a  b \t\r\n\r\n\r\n", "no line end"])
def test_dkimpy_verifies_the_signature_and_no_other_body(key: SigningKey, body: str) -> None:
    message = compose("ann@author.example", body=body)
    signed = dkim_sign(message, key)
    assert signed.endswith(message)
    assert is_valid(signed, zone_of(key))
    assert not is_valid(signed + b"more\r\n", zone_of(key))
    assert not is_valid(signed.replace(b"Subject: Hello", b"Subject: Hallo"), zone_of(key))


def test_a_message_with_attachments_is_mime() -> None:
    octets = bytes(range(256))
    message = compose(
        body="Grüße\r\n", attach=[Attachment("a.bin", octets), Attachment("b.txt", b"b", "text/plain")]
    )
    parsed = message_from_bytes(message, policy=policy.SMTP)
    body, first, second = parsed.walk().__iter__().__next__().iter_parts()
    assert body.get_content() == "Grüße\r\n"
    assert (first.get_filename(), first.get_content()) == ("a.bin", octets)
    assert (second.get_content_type(), second.get_filename()) == ("text/plain", "b.txt")
    assert max(map(len, message.split(b"\r\n"))) < 100
