"""access: an operator's own lists of who is let in and who is not, by client, HELO, sender and recipient.

A line of a list says what it is about, and which of them:

    client 192.0.2.0/24             # or one address, of either version
    helo   .dynamic.example         # names below dynamic.example; "dynamic.example" is that name alone
    sender ann@spam.example         # a mailbox; or its domain, as with helo; <> is the null reverse-path
    rcpt   list@example.org

Whoever is on the deny list is refused at RCPT, unless anything about the mail is on the allow list. That is all that
allowing does: every other policy judges as ever, and the relay guard before all of them. Senders and HELO names are
what the client says and not authenticated: who allows one lets everybody in who says it.

The files are read again when they change. Domains are compared as A-labels, local parts without case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple

from gateway.api import (
    AddressSource,
    Domain,
    ListFile,
    Mailbox,
    Policy,
    Recipient,
    Reply,
    Services,
    Transaction,
    Trust,
    Verdict,
    defer,
    parse_forward_path,
    proceed,
    reject,
)

DENIED = Reply(550, "5.7.1", "Access denied")
DENIED_NOW = Reply(450, "4.7.1", "Access denied for now")


class OnDenied(StrEnum):
    """What becomes of mail from who is on the deny list."""

    REJECT = "reject"
    DEFER = "defer"


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """[policy.access.settings]."""

    deny_file: Path | None = field(default=None, metadata={"doc": "file with who is refused"})
    allow_file: Path | None = field(
        default=None, metadata={"doc": "file with who is not, although the deny list has it"}
    )
    on_denied: OnDenied = field(
        default=OnDenied.REJECT, metadata={"doc": "refuse for good (550) or for now (450)"}
    )


class Subject(StrEnum):
    """What an entry is about."""

    CLIENT = "client"
    HELO = "helo"
    SENDER = "sender"
    RCPT = "rcpt"


class Entry(NamedTuple):
    """One line of a list, in the form in which it is looked up."""

    subject: Subject
    pattern: str


class Access(Policy[AccessSettings]):
    """Looks everything up at RCPT, when all of it is known."""

    name = "access"
    Settings = AccessSettings
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)

    def __init__(self, settings: AccessSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._deny = _List(settings.deny_file, services)
        self._allow = _List(settings.allow_file, services)

    async def start(self) -> None:
        """Raises OSError or ListError when a file cannot be read now."""
        self._deny.load()
        self._allow.load()

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        """The first entry of the deny list that fits, unless the allow list has one too."""
        denied = self._deny.find(tx, rcpt)
        if denied is None:
            return proceed()
        if (allowed := self._allow.find(tx, rcpt)) is not None:
            return proceed(reason=f"{allowed.subject}_allowed", evidence=_Found(denied, allowed))
        reason, evidence = f"{denied.subject}_denied", _Found(denied)
        if self.settings.on_denied is OnDenied.DEFER:
            return defer(reason, DENIED_NOW, evidence=evidence)
        return reject(reason, DENIED, evidence=evidence)


@dataclass(frozen=True, slots=True)
class _Found:
    """The evidence of a verdict."""

    denied: Entry
    allowed: Entry | None = None

    def lines(self) -> tuple[str, ...]:
        allowed = f"the allow list has {' '.join(self.allowed)}" if self.allowed else ""
        return tuple(filter(None, (f"the deny list has {' '.join(self.denied)}", allowed)))


class _List:
    """One list, and which lengths its networks have."""

    def __init__(self, path: Path | None, services: Services) -> None:
        self._file = ListFile(path, parse_entry, services)
        self._lengths: frozenset[tuple[int, int]] = frozenset()

    def load(self) -> None:
        self._file.load()
        self._take_lengths()

    def find(self, tx: Transaction, rcpt: Recipient) -> Entry | None:
        """The entry that fits; there are few to look for, however long the list is."""
        if self._file.refresh():
            self._take_lengths()
        entries = self._file.entries
        return next((entry for entry in self._candidates(tx, rcpt) if entry in entries), None)

    def _take_lengths(self) -> None:
        networks = [ip_network(each.pattern) for each in self._file.entries if each.subject is Subject.CLIENT]
        self._lengths = frozenset((each.version, each.prefixlen) for each in networks)

    def _candidates(self, tx: Transaction, rcpt: Recipient) -> Iterator[Entry]:
        session = tx.session
        # an address that hides its clients says nothing about them
        if session.address_source is not AddressSource.HIDDEN:
            for version, length in self._lengths:
                if version == session.client.version:
                    network = ip_network((session.client, length), strict=False)
                    yield Entry(Subject.CLIENT, str(network))
        for pattern in _with_parents(session.helo.lower()):
            yield Entry(Subject.HELO, pattern)
        mail_from = tx.envelope.mail_from
        for pattern in ("<>",) if mail_from is None else _of_mailbox(mail_from):
            yield Entry(Subject.SENDER, pattern)
        for pattern in _of_mailbox(rcpt.mailbox):
            yield Entry(Subject.RCPT, pattern)


def parse_entry(line: str) -> Entry:
    """A line of a list without its comment. Raises ValueError and AddressError."""
    word, *rest = line.split(maxsplit=1)
    if word not in set(Subject) or not rest:
        raise ValueError(f"{line[:80]!a} is not one of {', '.join(Subject)} with what it is about behind it")
    subject, text = Subject(word), rest[0]
    match subject:
        case Subject.CLIENT:
            return Entry(subject, str(ip_network(text)))
        case Subject.HELO:
            # whatever clients say is no domain only sometimes
            return Entry(subject, text.lower())
        case Subject.SENDER | Subject.RCPT:
            return Entry(subject, _address_pattern(text))


def _address_pattern(text: str) -> str:
    if text == "<>":
        return text
    if "@" in text:
        return _folded(parse_forward_path(f"<{text}>", smtputf8=True))
    return f".{Domain(text[1:])}" if text.startswith(".") else str(Domain(text))


def _of_mailbox(mailbox: Mailbox) -> Iterator[str]:
    yield _folded(mailbox)
    if isinstance(mailbox.domain, Domain):
        yield from _with_parents(mailbox.domain)


def _folded(mailbox: Mailbox) -> str:
    return f"{mailbox.local_value.lower()}@{mailbox.domain}"


def _with_parents(domain: str) -> Iterator[str]:
    """A name, and ".parent" for each name that it is below of; RFC 1035 2.3.4 leaves 127 of them."""
    yield domain
    for _ in range(127):
        _, dot, domain = domain.partition(".")
        if not domain:
            return
        yield dot + domain
