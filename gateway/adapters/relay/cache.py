"""What downstreams said about recipients: remembered for a short time, or until the sender comes again.

RecipientCache has answers to questions, and only what is about the recipient alone: 2yz, and refusals with an enhanced
code that says so; others may be about the sender or the moment. LateRefusals has refusals that came at delivery, for
the sender whose mail it was. Both are bounded: the oldest entry goes when one is full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from gateway.services import Clock
from gateway.session import Envelope, Recipient, Session
from gateway.smtp.address import Mailbox
from gateway.smtp.reply import Reply

# RFC 3463 3.2: bad destination mailbox (1), destination mailbox has moved (6); RFC 7505 4.2: null MX (10)
_ABOUT_THE_RECIPIENT = frozenset({"5.1.1", "5.1.6", "5.1.10"})
# RFC 3463 3.6: too many recipients; 452 without a code has the same meaning (RFC 5321 4.5.3.1.10)
_ABOUT_THE_NUMBER = frozenset({"4.5.3", "4.0.0"})
# Positive replies are few different texts, so their Reply objects are shared.
_MAX_SHARED = 256
# DESIGN.md section 6. A temporary state must not block anybody for a day.
_PERMANENT_S = 24 * 3600.0
_TRANSIENT_S = 3600.0


class _Memory:
    """Replies that count for some time; `entries` are all that are kept."""

    def __init__(self, clock: Clock, max_entries: int) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self.entries: OrderedDict[Hashable, tuple[float, Reply]] = OrderedDict()

    def get(self, key: Hashable) -> Reply | None:
        """The reply that is still valid, None when there is none."""
        entry = self.entries.get(key)
        if entry is None:
            return None
        if self._clock.monotonic() < entry[0]:
            return entry[1]
        del self.entries[key]
        return None

    def forget(self, key: Hashable) -> None:
        """It is not true any more."""
        self.entries.pop(key, None)

    def _keep(self, key: Hashable, reply: Reply, lifetime_s: float) -> None:
        # the newest go last, so the first is the oldest
        self.entries.pop(key, None)
        self.entries[key] = (self._clock.monotonic() + lifetime_s, reply)
        if len(self.entries) > self._max_entries:
            self.entries.popitem(last=False)


class RecipientCache(_Memory):
    """Replies by whatever identifies a recipient and who asks for it. A lifetime of 0 turns that half off."""

    def __init__(self, clock: Clock, *, positive_s: float, negative_s: float, max_entries: int) -> None:
        super().__init__(clock, max_entries)
        self._positive_s = positive_s
        self._negative_s = negative_s
        self._shared: dict[Reply, Reply] = {}

    def put(self, key: Hashable, reply: Reply) -> None:
        """Remember a reply to RCPT, if it is of a kind that is remembered."""
        if reply.is_positive:
            lifetime_s = self._positive_s
        elif reply.enhanced in _ABOUT_THE_RECIPIENT:
            lifetime_s = self._negative_s
        else:
            lifetime_s = 0
        if lifetime_s <= 0:
            return
        if reply.is_positive:
            if len(self._shared) >= _MAX_SHARED:
                self._shared.clear()
            reply = self._shared.setdefault(reply, reply)
        self._keep(key, reply, lifetime_s)


class LateRefusals(_Memory):
    """Recipients that alone of several were refused at delivery, by sender, recipient and client network.

    The others did not get the message for their sake, so the sender's next attempt is answered at RCPT instead of
    failing again as a whole: for 24 h with a 5yz; once, and within 1 h, with a 4yz, whose cause may be gone already.
    """

    def of(self, session: Session, envelope: Envelope, rcpt: Recipient) -> Reply | None:
        """What this recipient is to be answered in this transaction, None when nothing is known."""
        case = _case(session, envelope, rcpt)
        reply = self.get(case)
        if reply is not None and reply.is_transient:
            del self.entries[case]
        return reply

    def add(self, session: Session, envelope: Envelope, rcpt: Recipient, reply: Reply) -> None:
        """It was refused, for a reason that is not the number of recipients."""
        if reply.code != 452 or reply.enhanced not in _ABOUT_THE_NUMBER:
            lifetime_s = _TRANSIENT_S if reply.is_transient else _PERMANENT_S
            self._keep(_case(session, envelope, rcpt), reply, lifetime_s)


def _case(session: Session, envelope: Envelope, rcpt: Recipient) -> Hashable:
    client, sender = session.client, envelope.mail_from
    # A sender comes again from another machine of the same network: IPv4 /24, IPv6 /64.
    network = int(client) >> (8 if client.version == 4 else 64)
    return sender and _parts(sender), _parts(rcpt.mailbox), client.version, network


def _parts(mailbox: Mailbox) -> Hashable:
    # a Mailbox's own hash takes longer
    return mailbox.local, mailbox.domain
