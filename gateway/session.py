"""Session, Envelope and Transaction: what is known about a client and its message.

They are immutable to policies. The gatekeeper makes them; nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Generic, TypeVar

from gateway.frozen import frozen

if TYPE_CHECKING:
    from gateway.mail.message import Message
    from gateway.smtp.address import Mailbox
    from gateway.verdict import AuthResult

T = TypeVar("T")


def client_address(text: str) -> IPv4Address | IPv6Address:
    """A client's address from its text form: without a zone, and IPv4 where it is IPv4-mapped. Raises ValueError."""
    return unmapped(ip_address(text.partition("%")[0]))


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address of one that is IPv4-mapped (RFC 4291 2.5.5.2), any other as it is."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


class Trust(StrEnum):
    """How far a client is trusted; what follows from it is each policy's matter."""

    UNTRUSTED = "untrusted"
    TRUSTED = "trusted"  # its address is in relay.trusted_networks
    AUTHENTICATED = "authenticated"  # it proved who it is


class Role(StrEnum):
    """What a listener is for, and with it whose mail comes in there."""

    MX = "mx"  # mail from anybody, for our domains
    SUBMISSION = "submission"  # mail of our users, who authenticate, for anybody (RFC 6409)


class AddressSource(StrEnum):
    """How the client's address became known."""

    SOCKET = "socket"
    PROXY = "proxy"  # a balancer said so (PROXY protocol)
    HIDDEN = "hidden"  # it is a balancer's that hides its clients: what depends on the address does not apply


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """The TLS layer of a session: version and cipher as OpenSSL names them, e.g. "TLSv1.3"."""

    version: str
    cipher: str


@frozen
class Session:
    """One SMTP connection as it stands now.

    `helo` is the argument of the last EHLO or HELO as the client gave it, "" before; it is not authenticated.
    `client` is an IPv4 address also when it arrived IPv4-mapped. `user` is who it proved to be (RFC 4954), in the form
    that the back-end gave; never "", and None where nobody did: it is set exactly where `trust` is authenticated.
    """

    id: str
    client: IPv4Address | IPv6Address
    port: int
    helo: str = ""
    esmtp: bool = False
    tls: TlsInfo | None = None
    trust: Trust = Trust.UNTRUSTED
    address_source: AddressSource = AddressSource.SOCKET
    user: str | None = None
    role: Role = Role.MX


class BodyType(StrEnum):
    """RFC 6152: the BODY parameter of MAIL; 7BIT also when it was not given."""

    SEVEN_BIT = "7BIT"
    EIGHT_BIT = "8BITMIME"


@frozen
class Recipient:
    """One forward-path with its DSN parameters (RFC 3461 4.1, 4.2) as the client gave them, "" where not given."""

    mailbox: Mailbox
    notify: str = ""
    orcpt: str = ""


@frozen
class Envelope:
    """RFC 5321 2.3.1: the reverse-path (None is the null one), the accepted recipients, the parameters of MAIL.

    `size_hint` is the SIZE parameter in octets (RFC 1870), 0 when it was not given. `dsn_ret` and `dsn_envid`
    are RET and ENVID (RFC 3461 4.3, 4.4), "" when not given.
    """

    mail_from: Mailbox | None
    rcpts: tuple[Recipient, ...] = ()
    body_type: BodyType = BodyType.SEVEN_BIT
    smtputf8: bool = False
    size_hint: int = 0
    dsn_ret: str = ""
    dsn_envid: str = ""


@dataclass(frozen=True, eq=False)  # by identity: two policies may choose one name
class Slot(Generic[T]):
    """A typed place for a policy's own notes on a transaction: `SEEN: Slot[bool] = Slot("seen")`."""

    name: str

    def get(self, tx: Transaction) -> T | None:
        """What was put there for this transaction, None when nothing was."""
        return tx.notes.get(self)  # type: ignore[return-value]  # put() is the only writer and takes a T

    def put(self, tx: Transaction, value: T) -> None:
        """Keep a value until the transaction ends."""
        tx.notes[self] = value


@frozen
class Transaction:
    """One mail transaction (RFC 5321 3.3): from MAIL to the reply after the end of the content.

    `message` is None before the content has arrived. `results` are the authentication results so far.
    The `id` is short, unique over workers and restarts, and stands in Received and in every log line.
    """

    id: str
    session: Session
    envelope: Envelope
    message: Message | None = None
    results: tuple[AuthResult, ...] = ()
    notes: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    def with_results(self, results: tuple[AuthResult, ...]) -> Transaction:
        """The same transaction, with these for its results; a quarter of what dataclasses.replace() takes."""
        return Transaction(self.id, self.session, self.envelope, self.message, results, self.notes)
