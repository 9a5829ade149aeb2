"""What downstreams said about recipients, remembered for a short time.

Only what is about the recipient alone: 2yz, and refusals with an enhanced code that says so. Other refusals may be
about the sender or the moment. Bounded: the oldest entry goes when it is full.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from gateway.services import Clock
from gateway.smtp.reply import Reply

# RFC 3463 3.2: bad destination mailbox (1), destination mailbox has moved (6); RFC 7505 4.2: null MX (10)
_ABOUT_THE_RECIPIENT = frozenset({"5.1.1", "5.1.6", "5.1.10"})
# Positive replies are few different texts, so their Reply objects are shared.
_MAX_SHARED = 256


class RecipientCache:
    """Replies by (route, recipient), whatever identifies a recipient. A lifetime of 0 turns that half off."""

    def __init__(self, clock: Clock, *, positive_s: float, negative_s: float, max_entries: int) -> None:
        self._clock = clock
        self._positive_s = positive_s
        self._negative_s = negative_s
        self._max_entries = max_entries
        self._entries: OrderedDict[tuple[str, Hashable], tuple[float, Reply]] = OrderedDict()
        self._shared: dict[Reply, Reply] = {}

    def get(self, route: str, mailbox: Hashable) -> Reply | None:
        """The reply that is still valid, None when there is none."""
        entry = self._entries.get((route, mailbox))
        if entry is None:
            return None
        if self._clock.monotonic() < entry[0]:
            return entry[1]
        del self._entries[route, mailbox]
        return None

    def put(self, route: str, mailbox: Hashable, reply: Reply) -> None:
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
        # the newest go last, so the first is the oldest
        self._entries.pop((route, mailbox), None)
        self._entries[route, mailbox] = (self._clock.monotonic() + lifetime_s, reply)
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def forget(self, route: str, mailbox: Hashable) -> None:
        """The downstream has changed its mind about this recipient."""
        self._entries.pop((route, mailbox), None)
