"""sender_login: who has authenticated writes as itself only; the reverse-path and every author belong to the user.

A user owns the address that equals the login name, and what a file says:

    info@example.org    ann@example.org bob@example.org      # these two, and nobody else
    @example.net        ann@example.org                      # every address of the domain that has no line of its own

Names and addresses are compared without case, domains as A-labels. The null reverse-path is everybody's: answers of
mail programs (RFC 3798) have it. Sessions that have not authenticated are none of its business. The file is read again
when it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gateway.api import (
    AddressError,
    AuthorError,
    Domain,
    ListFile,
    Mailbox,
    Policy,
    Reply,
    Services,
    Transaction,
    Verdict,
    authors,
    parse_forward_path,
    proceed,
    reject,
)

# RFC 6409 6.1: the user may not use this reverse-path
NOT_OWN_SENDER = Reply(553, "5.7.1", "This sender address does not belong to the authenticated user")
NOT_OWN_AUTHOR = Reply(550, "5.7.1", "The From address does not belong to the authenticated user")
NO_AUTHOR = Reply(
    550, "5.6.0", "The message needs one From field, with addresses that can be read in one way"
)


@dataclass(frozen=True, slots=True)
class SenderLoginSettings:
    """The table [submission.policy.sender_login.settings]."""

    map_file: Path | None = field(
        default=None, metadata={"doc": "file with addresses and the users who own them, one address a line"}
    )
    default_domain: str = field(
        default="", metadata={"doc": "domain of the address of a user whose login name has none"}
    )
    check_from: bool = field(default=True, metadata={"doc": "the authors (From) must be the user's too"})

    def __post_init__(self) -> None:
        try:
            Domain.parse(self.default_domain or "example.org")
        except AddressError as exc:
            raise ValueError(f"default_domain: {exc}") from None


class Entry(NamedTuple):
    """One line of the file: an address in the form in which it is looked up, or "@" and a domain; its owners."""

    address: str
    users: frozenset[str]


class SenderLogin(Policy[SenderLoginSettings]):
    """Asks for the reverse-path at MAIL, for the authors at EOM."""

    name = "sender_login"
    Settings = SenderLoginSettings

    def __init__(self, settings: SenderLoginSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._file = ListFile(settings.map_file, _entry, services)
        self._owners: Mapping[str, frozenset[str]] = {}
        self._default_domain = Domain.parse(settings.default_domain) if settings.default_domain else None

    async def start(self) -> None:
        """Raises OSError or ListError when the file cannot be read now."""
        self._file.load()
        self._take_owners()

    async def on_mail(self, tx: Transaction) -> Verdict:
        """The reverse-path."""
        user, mail_from = tx.session.user, tx.envelope.mail_from
        if user is None or mail_from is None:
            return proceed()
        if self._file.refresh():
            self._take_owners()
        if self._owns(user, _folded(mail_from.local_value, mail_from.domain)):
            return proceed()
        return reject("not_own_sender", NOT_OWN_SENDER)

    async def on_eom(self, tx: Transaction) -> Verdict:
        """The authors."""
        user = tx.session.user
        if user is None or not self.settings.check_from:
            return proceed()
        assert tx.message is not None  # the engine's word: on_eom has one
        try:
            found = authors(tx.message.header)
        except AuthorError as exc:
            return reject(exc.fault, NO_AUTHOR)
        if all(self._owns(user, _folded(each.local, each.domain)) for each in found):
            return proceed()
        return reject("not_own_author", NOT_OWN_AUTHOR)

    def _owns(self, user: str, address: str) -> bool:
        name = user.lower()
        if (owners := self._owners.get(address)) is not None:
            return name in owners
        if address == self._own_address(user):
            return True
        return name in self._owners.get(address[address.rindex("@") :], ())

    def _own_address(self, user: str) -> str:
        if "@" not in user and self._default_domain is not None:
            return _folded(user, self._default_domain)
        try:
            mailbox = parse_forward_path(f"<{user}>", smtputf8=True)
        except AddressError:
            return ""  # a name that is no address
        return _folded(mailbox.local_value, mailbox.domain)

    def _take_owners(self) -> None:
        owners: dict[str, frozenset[str]] = {}
        for address, users in self._file.entries:
            owners[address] = owners.get(address, frozenset()) | users
        self._owners = owners


def _entry(line: str) -> Entry:
    address, *users = line.split()
    if not users:
        raise ValueError(f"{address} has no user behind it")
    if address.startswith("@"):
        pattern = f"@{Domain.parse(address[1:])}"
    else:
        mailbox: Mailbox = parse_forward_path(f"<{address}>", smtputf8=True)
        pattern = _folded(mailbox.local_value, mailbox.domain)
    return Entry(pattern, frozenset(user.lower() for user in users))


def _folded(local: str, domain: object) -> str:
    # not casefold(): with it "weiss" is also who has a sharp s in the name
    return f"{local.lower()}@{domain}"
