"""Which name server is asked, for how long, and how often, until there is an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.adapters.dns.names import can_exist
from gateway.adapters.dns.reply import FAILURES, Reply, read
from gateway.adapters.dns.stub import Done, Nameserver
from gateway.lookup import NO_DATA, Answer, Found, RRType
from gateway.services import Instruments

_MAX_CNAMES = 8
_FAILED = {why: Answer(Found.TEMPORARY_FAILURE, why=why) for why in FAILURES}

Answered = Callable[[Answer, int], None]
"""Is told the answer, and for how many seconds it may be remembered."""


class Asking(Protocol):
    """Speaks with name servers, which are known by their number: gateway.adapters.dns.stub.Stub."""

    def ask(self, server: int, name: str, rrtype: RRType, timeout_s: float, done: Done) -> None:
        """Ask one server."""


class Upstream:
    """The name servers, as one.

    Questions go to them in turn. One that gave no answer last time comes behind those that did, and still gets its
    part of the time, the same for each that is left.
    """

    def __init__(
        self, servers: Sequence[Nameserver], stub: Asking, instruments: Instruments, timeout_s: float
    ) -> None:
        self.servers = tuple(servers)
        self.stub = stub
        self.clock = instruments.clock
        self.log = instruments.log
        self.down: set[int] = set()
        """Those that gave no answer last time."""
        self.unanswered = 0
        """Questions in sequence that no server has answered."""
        self.failing_since: float | None = None
        """When the first of these was given up, in seconds since the epoch."""
        self._timeout_s = timeout_s
        self._next = 0

    def answer(self, name: str, rrtype: RRType, done: Answered) -> None:
        """Ask, within the time for one question. `done` is called once, maybe at once, unless the stub closes."""
        _Pursuit(self, name, rrtype, self.clock.monotonic() + self._timeout_s, done).begin()

    def order(self) -> list[int]:
        """The servers for the next question."""
        count = len(self.servers)
        if count == 1:
            return [0]
        order = [(self._next + each) % count for each in range(count)]
        self._next = (self._next + 1) % count
        # a stable sort: those that are up, in turn, and then the others
        return sorted(order, key=self.down.__contains__) if self.down else order

    def note(self, *, has_heard: bool) -> None:
        """Count a question, which some server has answered, or none."""
        if has_heard:
            self.unanswered, self.failing_since = 0, None
            return
        self.unanswered += 1
        if self.failing_since is None:
            self.failing_since = self.clock.now()


class _Pursuit:
    """A question on its way from server to server, and from alias to alias."""

    __slots__ = (
        "_aliases",
        "_done",
        "_has_heard",
        "_last",
        "_name",
        "_order",
        "_rrtype",
        "_seen",
        "_server",
        "_ttl_s",
        "_upstream",
        "_why",
    )

    def __init__(self, upstream: Upstream, name: str, rrtype: RRType, last: float, done: Answered) -> None:
        self._upstream = upstream
        self._name = name
        self._rrtype = rrtype
        self._last = last
        self._done = done
        self._aliases = 0
        self._seen: set[str] = set()
        self._ttl_s = 2**31

    def begin(self) -> None:
        """Ask for a name."""
        self._order = self._upstream.order()
        self._has_heard = False
        self._why = "timeout"
        self._go_on()

    def _go_on(self) -> None:
        """Ask the next server; without one, the last one's failure is the answer."""
        upstream, order = self._upstream, self._order
        left_s = self._last - upstream.clock.monotonic()
        if order and left_s > 0:
            share_s = left_s / len(order)
            self._server = order.pop(0)
            upstream.stub.ask(self._server, self._name, self._rrtype, share_s, self._hear)
            return
        upstream.note(has_heard=self._has_heard)
        self._done(_FAILED[self._why], 0)

    def _hear(self, heard: Reply | str) -> None:
        try:
            self._judge(heard)
        except Exception as exc:  # noqa: BLE001  # a defect of ours: whoever waits hears of a failure, and not never
            self._upstream.log.error("dns.failed", question=f"{self._rrtype} {self._name}", error=repr(exc))
            self._done(_FAILED["failed"], 0)

    def _judge(self, heard: Reply | str) -> None:
        upstream = self._upstream
        if isinstance(heard, str):
            self._why = heard
            if heard in {"timeout", "network"}:
                upstream.down.add(self._server)
            else:
                self._has_heard = True
            self._go_on()
            return
        if upstream.down or upstream.unanswered:
            upstream.down.discard(self._server)
            upstream.note(has_heard=True)
        answer, ttl_s, target = read(heard, self._name, self._rrtype, self._seen)
        self._ttl_s = min(self._ttl_s, ttl_s)
        if answer is None and self._aliases < _MAX_CNAMES and can_exist(target):
            self._aliases += 1
            self._name = target
            self.begin()
            return
        self._done(answer or NO_DATA, self._ttl_s)
