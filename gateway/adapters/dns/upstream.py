"""Which name server is asked, for how long, and how often, until there is an answer."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.adapters.dns.reply import FAILURES, Asking, NoReplyError, Reading, Reply, read
from gateway.adapters.dns.stub import Nameserver
from gateway.lookup import NO_DATA, Answer, Found, RRType
from gateway.services import Clock

_MAX_CNAMES = 8
_FAILED = {why: Answer(Found.TEMPORARY_FAILURE, why=why) for why in FAILURES}


class Upstream:
    """The name servers, as one.

    Questions go to them in turn. One that gave no answer last time comes behind those that did, and still gets its
    part of the time, the same for each that is left.
    """

    def __init__(self, servers: Sequence[Nameserver], stub: Asking, clock: Clock, timeout_s: float) -> None:
        self.servers = tuple(servers)
        self.unanswered = 0
        """Questions in sequence that no server has answered."""
        self.failing_since: float | None = None
        """When the first of these was given up, in seconds since the epoch."""
        self._stub = stub
        self._clock = clock
        self._timeout_s = timeout_s
        self._next = 0
        self._down: set[int] = set()

    async def answer(self, name: str, rrtype: RRType) -> tuple[Answer, int]:
        """The answer, and for how many seconds it may be remembered; within the time for one question."""
        last = self._clock.monotonic() + self._timeout_s
        seen: set[str] = set()
        ttl_s, target = 2**31, name
        for _ in range(_MAX_CNAMES + 1):
            try:
                reply = await self._reply(target, rrtype, last)
            except NoReplyError as exc:
                return _FAILED[exc.why], 0
            reading: Reading = read(reply, target, rrtype, seen)
            ttl_s = min(ttl_s, reading.ttl_s)
            if reading.answer is not None:
                return reading.answer, ttl_s
            target = reading.target
        return NO_DATA, ttl_s

    async def _reply(self, name: str, rrtype: RRType, last: float) -> Reply:
        """The first reply of a server. Raises NoReplyError with what the last one said."""
        order = self._order()
        error = NoReplyError("timeout")
        has_heard = False
        for place, server in enumerate(order):
            left_s = last - self._clock.monotonic()
            if left_s <= 0:
                break
            try:
                reply = await self._stub.ask(server, name, rrtype, left_s / (len(order) - place))
            except NoReplyError as exc:
                error = exc
                if exc.why in {"timeout", "network"}:
                    self._down.add(server)
                else:
                    has_heard = True
                continue
            self._down.discard(server)
            self._note(has_heard=True)
            return reply
        self._note(has_heard=has_heard)
        raise error

    def _order(self) -> list[int]:
        count = len(self.servers)
        order = [(self._next + each) % count for each in range(count)]
        self._next = (self._next + 1) % count
        # a stable sort: those that are up, in turn, and then the others
        return sorted(order, key=self._down.__contains__) if self._down else order

    def _note(self, *, has_heard: bool) -> None:
        if has_heard:
            self.unanswered, self.failing_since = 0, None
            return
        self.unanswered += 1
        if self.failing_since is None:
            self.failing_since = self._clock.now()
