"""A decision record as it is read back from its JSON, for a replay.

Records come as files, from who knows where: each value is checked once, here, and a RecordError says on one line what
is wrong. What the JSON has beside that is left out of account.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from math import isfinite
from typing import Any, TypeVar

from gateway.decision.exact import parse_record
from gateway.errors import GatewayError
from gateway.lookup import Answer, Asked, Found, Question, RRType
from gateway.mail.digest import BodyDigest, Canonicalization, Wanted
from gateway.session import (
    AddressSource,
    BodyType,
    Envelope,
    Recipient,
    Role,
    Session,
    TlsInfo,
    Trust,
    client_address,
)
from gateway.smtp.address import AddressError, parse_forward_path, parse_reverse_path
from gateway.smtp.reply import Reply

T = TypeVar("T")

_SURROGATE = re.compile("[\ud800-\udfff]")


class RecordError(GatewayError):
    """The JSON is no decision record, or not one in full; the text names the key."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What of a record is needed to judge its transaction again."""

    tx: str
    session: Session
    envelope: Envelope
    """Without recipients; `rcpts` has all."""
    rcpts: tuple[tuple[Recipient, Reply | None, str], ...]
    """With the reply that each got, and the reason."""
    stage: str
    policy: str
    reason: str
    reply: Reply | None
    """The last word to the client."""
    delivered: bool
    header: bytes
    size_bytes: int
    digests: Mapping[Wanted, BodyDigest]
    dns: tuple[Asked, ...]
    time: float
    """The clock when policies saw it, seconds since the epoch."""
    authserv_id: str
    said: Mapping[str, object]
    """All that the record says, as it is."""
    missing: tuple[str, ...]
    """What was left out of the record because it was too large."""


def read_record(record: object) -> Recorded:
    """The record of its JSON: what /api/v1/decisions/ID gives, or `mxgate decisions --tx ID --json`.

    Raises RecordError.
    """
    if isinstance(record, Mapping) and isinstance(found := record.get("decisions"), list):
        if len(found) != 1:
            raise RecordError(f"the file holds {len(found)} decisions; one is replayed")
        record = found[0]
    if not isinstance(record, Mapping):
        raise RecordError("the file holds no JSON object")
    at = _At(record)
    if "header_octets" not in record:
        raise RecordError("header_octets: not there; ask for the record by its id; log.redact holds it back")
    smtputf8 = at.flag("smtputf8")
    return Recorded(
        tx=at.text("tx"),
        session=_session(at),
        envelope=Envelope(
            at.made("mail_from", lambda path: parse_reverse_path(f"<{path}>", smtputf8=True)),
            body_type=at.made("body_type", BodyType),
            smtputf8=smtputf8,
            size_hint=at.number("size_hint"),
            dsn_ret=at.text("dsn_ret"),
            dsn_envid=at.text("dsn_envid"),
        ),
        rcpts=tuple([_rcpt(each) for each in at.all("rcpts")]),
        stage=at.text("stage"),
        policy=at.text("policy"),
        reason=at.text("reason"),
        reply=_reply(at),
        delivered=at.flag("delivered"),
        header=at.made("header_octets", lambda text: base64.b64decode(text, validate=True)),
        size_bytes=at.number("size_bytes"),
        digests=dict([_digest(each) for each in at.all("digests")]),
        dns=tuple([_asked(each) for each in at.all("dns")]),
        time=at.seconds("judged_at"),
        authserv_id=at.text("authserv_id"),
        said=record,
        missing=_missing(at),
    )


class _At:
    """One object of the JSON; its values by key, each of the type that is asked for."""

    def __init__(self, record: Mapping[str, Any], path: str = "") -> None:
        self._record = record
        self._path = path

    def value(self, key: str, kind: type[T]) -> T:
        value: object = self._record.get(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RecordError(f"{self._path}{key}: no {kind.__name__}")
        return value

    def text(self, key: str) -> str:
        text = self.value(key, str)
        if _SURROGATE.search(
            text
        ):  # JSON has them, to_json writes none, and no field of a header can hold one
            raise RecordError(f"{self._path}{key}: no text")
        return text

    def has(self, key: str) -> bool:
        return key in self._record

    def flag(self, key: str) -> bool:
        return self.value(key, bool)

    def number_or_none(self, key: str) -> int | None:
        return None if self._record.get(key, 0) is None else self.number(key)

    def number(self, key: str) -> int:
        number = self.value(key, int)
        if not 0 <= number < 1 << 63:
            raise RecordError(f"{self._path}{key}: out of range")
        return number

    def seconds(self, key: str) -> float:
        value = self._record.get(key)
        # what time.gmtime takes, with room
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e11:
            raise RecordError(f"{self._path}{key}: no time")
        return value if isfinite(value) else 0.0

    def made(self, key: str, make: Callable[[str], T]) -> T:
        """What `make` makes of a text, or a RecordError."""
        text = self.text(key)
        try:
            return make(text)
        except (ValueError, AddressError) as exc:  # binascii.Error is a ValueError
            raise RecordError(f"{self._path}{key}: {text[:80]!a} cannot be used") from exc

    def all(self, key: str) -> list[_At]:
        found: list[_At] = []
        for number, each in enumerate(self.value(key, list)):
            if not isinstance(each, Mapping):
                raise RecordError(f"{self._path}{key}[{number}]: no object")
            found.append(_At(each, f"{self._path}{key}[{number}]."))
        return found

    def texts(self, key: str) -> list[str]:
        found = self.value(key, list)
        if not all(isinstance(each, str) for each in found):
            raise RecordError(f"{self._path}{key}: not only texts")
        return found


def _session(at: _At) -> Session:
    client: IPv4Address | IPv6Address = at.made("client", client_address)
    tls = at.text("tls")
    return Session(
        at.text("session"),
        client,
        at.number("port"),
        at.text("helo"),
        at.flag("esmtp"),
        TlsInfo(tls, at.text("cipher")) if tls else None,
        at.made("trust", Trust),
        at.made("address_source", AddressSource),
        # records of before there was submission have neither
        at.text("user") or None if at.has("user") else None,
        at.made("role", Role) if at.has("role") else Role.MX,
    )


def _rcpt(at: _At) -> tuple[Recipient, Reply | None, str]:
    mailbox = at.made("rcpt", lambda text: parse_forward_path(f"<{text}>", smtputf8=True))
    reason = at.text("reason") if not at.text("policy") else ""
    return Recipient(mailbox, at.text("notify"), at.text("orcpt")), _reply(at), reason


def _reply(at: _At) -> Reply | None:
    code = at.number("code")
    if not code:
        return None
    try:
        return Reply(code, at.text("enhanced"), at.text("text"))
    except ValueError as exc:
        raise RecordError(f"{exc}"[:200]) from exc


def _digest(at: _At) -> tuple[Wanted, BodyDigest]:
    canonicalization: Canonicalization = at.made("canonicalization", Canonicalization)
    sha256: bytes = at.made("sha256", bytes.fromhex)
    return (canonicalization, at.number_or_none("length")), BodyDigest(sha256, at.number("size_bytes"))


def _asked(at: _At) -> Asked:
    rrtype: RRType = at.made("rrtype", RRType)
    found: Found = at.made("answer", Found)
    try:
        records = tuple([parse_record(rrtype, text) for text in at.texts("records")])
    except ValueError as exc:
        raise RecordError(f"dns: {exc}"[:200]) from exc
    return Asked(at.text("policy"), Question(at.text("name"), rrtype), Answer(found, records, at.text("why")))


def _missing(at: _At) -> tuple[str, ...]:
    return tuple(
        [
            f"{count} {what}"
            for key, what in (
                ("omitted_header_bytes", "octets of the header"),
                ("omitted_dns", "answers of DNS"),
                ("omitted_rcpts", "recipients"),
                ("omitted_verdicts", "verdicts"),
            )
            if (count := at.number(key))
        ]
    )
