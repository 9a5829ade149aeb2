"""relay_guard: mail is taken for our own domains only (RFC 5321 3.6.1, 7.8); the one policy that cannot be absent.

Who may send where: everybody to the domains of `[relay] domains` and `domains_file`; clients of
`trusted_networks` and authenticated ones anywhere, but for an address behind which a balancer hides its clients (4xx).
With a `recipients_file`, only the recipients listed there exist (postmaster always does, RFC 5321 4.5.1).

The final domain is what RFC 5321 parsing gives. Sender-specified routing in the local part (`a%b@ours`, `b!a@ours`,
`"a@b"@ours`, RFC 5321 F.2) is refused from strangers: a downstream that still obeys it would relay on our word.

The files have one entry a line, `#` begins a comment; they are read again when they change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gateway.api import (
    AddressSource,
    Domain,
    ListFile,
    Mailbox,
    OnError,
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

RELAYING_DENIED = Reply(550, "5.7.1", "Relaying denied")
ROUTING_DENIED = Reply(550, "5.7.1", "Sender-specified routing is not accepted")
CLIENT_HIDDEN = Reply(451, "4.7.1", "Relaying is not possible now, the gateway cannot tell its clients apart")
NO_SUCH_RECIPIENT = Reply(550, "5.1.1", "No such recipient here")

_ROUTING_CHARACTERS = frozenset("%!@")
_UNTRUSTED = Trust.UNTRUSTED  # asked for each recipient: of the class it costs ten times as much


@dataclass(frozen=True, slots=True)
class RelayGuardSettings:
    """Filled from the table [relay]."""

    domains: tuple[str, ...] = field(
        default=(), metadata={"doc": 'our domains; ".example.org" stands for its subdomains'}
    )
    domains_file: Path | None = field(default=None, metadata={"doc": "file with more of them, one a line"})
    recipients_file: Path | None = field(
        default=None, metadata={"doc": "file with every recipient that exists, one a line"}
    )


class RelayGuard(Policy[RelayGuardSettings]):
    """Refuses every recipient that is not ours to deliver to. Fails closed: its own trouble is a 4xx."""

    name = "relay_guard"
    Settings = RelayGuardSettings
    on_error = OnError.DEFER

    def __init__(self, settings: RelayGuardSettings, services: Services) -> None:
        super().__init__(settings, services)
        exact, parents = _split(_domain_entry(entry) for entry in settings.domains)
        self._own_exact, self._own_parents = exact, parents
        self._domains = ListFile(settings.domains_file, _domain_entry, services)
        self._recipients = ListFile(settings.recipients_file, _recipient_entry, services)
        self._exact, self._parents = exact, parents

    async def start(self) -> None:
        """Raises OSError or ListError when a file cannot be read now."""
        self._recipients.load()
        self._domains.load()
        self._take_domains()

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        """Refuse what is not ours."""
        mailbox = rcpt.mailbox
        if self._domains.refresh():
            self._take_domains()
        session = tx.session
        is_hidden = False
        if session.trust is not _UNTRUSTED:
            # An address that hides its clients is nobody's: to trust it would be to trust everybody.
            is_hidden = session.trust is Trust.TRUSTED and session.address_source is AddressSource.HIDDEN
            if not is_hidden:
                return proceed()
        # RFC 5321 4.1.1.3: <postmaster> without a domain is ours
        if mailbox.domain is None:
            return proceed()
        if not self.is_ours(mailbox.domain):
            if is_hidden:
                return defer("client_hidden", CLIENT_HIDDEN)
            return reject("relaying_denied", RELAYING_DENIED)
        if not _ROUTING_CHARACTERS.isdisjoint(mailbox.local_value):
            return reject("routing", ROUTING_DENIED)
        if self._recipients.path is not None and mailbox.local_value.lower() != "postmaster":
            self._recipients.refresh()
            if _folded(mailbox) not in self._recipients.entries:
                return reject("unknown_recipient", NO_SUCH_RECIPIENT)
        return proceed()

    def is_ours(self, domain: object) -> bool:
        """Whether mail for this domain is delivered by us; an address literal never is."""
        if not isinstance(domain, Domain):
            return False
        if domain in self._exact:
            return True
        if not self._parents:
            return False
        labels = domain.split(".")
        return any(".".join(labels[at:]) in self._parents for at in range(1, len(labels)))

    def _take_domains(self) -> None:
        exact, parents = _split(self._domains.entries)
        self._exact, self._parents = self._own_exact | exact, self._own_parents | parents


def _domain_entry(text: str) -> str:
    return f".{Domain.parse(text[1:])}" if text.startswith(".") else Domain.parse(text)


def _recipient_entry(text: str) -> str:
    return _folded(parse_forward_path(f"<{text}>", smtputf8=True))


def _folded(mailbox: Mailbox) -> str:
    """How recipients of the list are compared: as nearly all mail systems do, without case in the local part."""
    return f"{mailbox.local_value.lower()}@{mailbox.domain}"


def _split(entries: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Exact names, and the parents of ".example.org" entries."""
    exact: set[str] = set()
    parents: set[str] = set()
    for entry in entries:
        (parents if entry.startswith(".") else exact).add(entry.removeprefix("."))
    return frozenset(exact), frozenset(parents)
