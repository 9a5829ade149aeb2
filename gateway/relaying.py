"""The relay as the gatekeeper sees it: what it is asked, what it is given to send, what it answers.

Types only: the gatekeeper drives a Relay, adapters/relay implements it, the testing kit fakes it.
The rules behind the two operations are DESIGN.md section 6; the short form:

- `verify` asks a downstream what it thinks of recipients and never holds a connection while a client is slow;
- `deliver` hands over one whole transaction; 250 for the client exists only as the downstream's own 2xx after the dot;
- trouble of the relay is 4xx; 5xx comes only from a downstream's 5xx to MAIL, RCPT, DATA or the dot.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gateway.session import Envelope, Recipient, Session, Transaction
    from gateway.smtp.address import Mailbox
    from gateway.smtp.reply import Reply


@dataclass(frozen=True, slots=True)
class Offer:
    """What every route's downstreams offered at their last EHLO; our own EHLO announces no more than this.

    `size` in octets (RFC 1870) is the largest limit of any route, 0 when some route announced none: what is too big
    for one route only is refused at RCPT (`Relay.refusal`). Of one route it is the smallest of its hosts'.
    """

    eightbitmime: bool
    smtputf8: bool
    dsn: bool
    size: int


class Content(Protocol):
    """The content of one message on its way out. Everything in it ends its lines with CRLF."""

    @property
    def prefix(self) -> bytes:
        """Our own header fields in wire form, already dot-stuffed, sent first."""

    @property
    def size_bytes(self) -> int:
        """The octets of the message as SIZE counts them (RFC 1870 6: after unstuffing), for MAIL."""

    @property
    def is_stuffed(self) -> bool:
        """True: `blocks` are dot-stuffed, as they came after DATA. False: plain, as after BDAT; the relay stuffs."""

    def blocks(self) -> Iterator[bytes]:
        """The rest of the message in blocks of at most 64 KiB, without the terminator.

        The whole content is empty or ends with CRLF. May be called again for another attempt.
        """


class Delivery(NamedTuple):
    """How one delivery ended. `stored` is True only when the downstream said 2xx after the dot.

    `reply` is for the client. `error` says what went wrong, for log and metric; it is one of

    - "": the downstream answered, whatever its answer was
    - "refused": it refused the sender, every recipient, DATA or the message; `reply` is its own
    - "partial": it refused some of the recipients; nothing was sent
    - "smtputf8": it does not offer SMTPUTF8 any more, which the message needs
    - "connect", "tls", "banner", "ehlo": there was no usable connection
    - "busy": no connection became free within the budget
    - "timeout", "closed", "protocol": it hung, went away or said what is not SMTP, before the dot
    - "final_lost": any of these after the dot: the message may have been stored
    - "identity": it does not take the client's identity, which the route wants passed on
    - "internal": something of ours failed
    """

    reply: Reply
    stored: bool
    error: str = ""


class Relay(Protocol):
    """The way to the downstreams."""

    def offer(self) -> Offer:
        """What all downstreams together are known to take; cautious before their first answer."""

    def route(self, mailbox: Mailbox) -> str | None:
        """The name of the route that takes this recipient, None when no route does."""

    def refusal(self, route: str, envelope: Envelope) -> Reply | None:
        """The reply for an envelope that this route is known not to take, judged before any connection is made."""

    def max_recipients(self, route: str) -> int:
        """The most recipients that one transaction of this route may have; 0: no limit is known."""

    def state(self) -> Mapping[str, object]:
        """How the downstreams are, in JSON's types: a detail of /readyz for people."""

    async def verify(
        self, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], last: float = inf
    ) -> Sequence[Reply]:
        """The downstream's word on each recipient, in order, not later than `last` in the loop's time.

        Trouble is 451 for each that has no answer; never raises.

        All `rcpts` belong to one route. What `deliver` found refused after a 2xx here is answered without asking, for
        the same sender and client network (DESIGN.md section 6). Does not suspend when each of them is answered from
        the cache, or when the route does not verify recipients.
        """

    async def deliver(self, tx: Transaction, content: Content, route: str = "") -> Delivery:
        """Hand the transaction to the downstream of its recipients' one route; never raises but CancelledError.

        With `route`, the name of another one, it goes there instead, and nothing is learnt about the recipients.

        Cancelled before the dot it gives up and nothing was delivered. After the dot the delivery goes on without
        the caller, and its outcome is counted as an orphan.
        """
