"""The Received field (RFC 5321 4.4, RFC 3848, RFC 6531 4.3), and what a submitted message may lack (RFC 6409 8)."""

from __future__ import annotations

import re
from email.utils import formatdate
from functools import lru_cache
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.session import Envelope, Session, Transaction

# what a domain or an address literal may hold; the rest of a client's HELO is not written into a field of ours
_NOT_DOMAIN = re.compile(r"[^A-Za-z0-9.:_\[\]-]")


def received(tx: Transaction, hostname: str, now: float) -> bytes:
    """Our trace field in wire form: who gave us this message, how, and when (`now` in seconds since the epoch)."""
    session, envelope = tx.session, tx.envelope
    tls = f"\r\n\t({session.tls.version} {session.tls.cipher})" if session.tls is not None else ""
    client = f"IPv6:{session.client}" if isinstance(session.client, IPv6Address) else str(session.client)
    helo = _NOT_DOMAIN.sub("?", session.helo)
    rcpts = envelope.rcpts
    # RFC 5321 7.6: naming one of several recipients would tell the others who else got it
    for_ = f"\r\n\tfor <{rcpts[0].mailbox.text}>" if len(rcpts) == 1 else ""
    return (
        f"Received: from {helo} ([{client}])\r\n"
        f"\tby {hostname} with {with_protocol(session, envelope)} id {tx.id}{tls}{for_};\r\n"
        f"\t{_date(int(now))}\r\n"
    ).encode()


def with_protocol(session: Session, envelope: Envelope) -> str:
    """The word behind `with` (RFC 5321 4.4): S with TLS, A authenticated (RFC 3848); UTF8SMTP (RFC 6531 4.3)."""
    protocol = "UTF8SMTP" if envelope.smtputf8 else "ESMTP" if session.esmtp else "SMTP"
    if session.tls is not None:
        protocol += "S"
    return protocol if session.user is None else protocol + "A"


def missing_fields(tx: Transaction, hostname: str, now: float) -> bytes:
    """Date and Message-ID in wire form, those that the message has not."""
    assert tx.message is not None
    header, added = tx.message.header, b""
    # RFC 6409 8.2, 8.3: may be added where they are missing. Ids have a dot-atom in front (RFC 5322 3.6.4).
    if not header.all(b"date"):
        added += f"Date: {_date(int(now))}\r\n".encode()
    if not header.all(b"message-id"):
        added += f"Message-ID: <{tx.id}@{hostname}>\r\n".encode()
    return added


@lru_cache(maxsize=4)
def _date(now: int) -> str:
    # "-0000" would say that the zone is not known (RFC 5322 3.3)
    return formatdate(now).replace("-0000", "+0000")
