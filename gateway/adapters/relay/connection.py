"""One connection to a downstream: writes commands and content, gathers replies, keeps time.

An asyncio.Protocol without tasks: each exchange is one write and one future, and all deadlines of a connection share
one timer, which is set anew only when it fires. Trouble is not raised: `trouble` says what it is ("timeout",
"closed", "protocol"), and the exchange under way ends with the replies that came.

Opening is opening.py's matter, reuse is pool.py's, the meaning of replies is gateway.smtp.client's.
"""

from __future__ import annotations

import asyncio
import math
import select
import ssl
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, cast

from gateway.services import Clock
from gateway.smtp.client import QUIT, Capabilities, DownstreamProtocolError, ReplyReader, ServerReply

if TYPE_CHECKING:
    from gateway.adapters.relay.host import Host

# Timers of uvloop may fire up to one turn of its clock (1 ms) early.
_EARLY_S = 0.002


class Connection(asyncio.Protocol):
    """One connection. It belongs to one user at a time, and to its pool while it is idle.

    `on_idle_end` is called once when an idle connection ends: it idled too long, the peer closed it or spoke.
    The counters are for the pool's rules on how long a connection may be used. `host` and `address` say whose it is,
    `owner` for whose mail alone it is (None: everybody's); `dot_at` is the clock's time at which content and its dot
    were written (`transact`), 0 before.
    """

    host: Host
    address: str

    def __init__(self, loop: asyncio.AbstractEventLoop, on_idle_end: Callable[[Connection], None]) -> None:
        self.capabilities = Capabilities()
        self.trouble = ""
        self.opened_at = loop.time()
        self.transactions = 0
        self.verifications = 0
        self.refusals = 0
        # it has served before: the peer may be about to end it, or have ended it without our knowing
        self.is_reused = False
        self.owner: Hashable = None
        self.dot_at = 0.0
        self.loop = loop
        self._on_idle_end = on_idle_end
        self._transport: asyncio.Transport = _NO_TRANSPORT
        self._poll = select.poll()
        self._reader = ReplyReader()
        self._replies: list[ServerReply] = []
        # The banner may come before anybody asks, so its exchange begins here.
        self._waiter: asyncio.Future[list[ServerReply]] | None = loop.create_future()
        self._expected = 1
        self._result: list[ServerReply] | None = None
        # what follows when the replies say so, how long its reply may take, and who tells the time
        self._content: bytes | None = None
        self._final_s = 0.0
        self._clock: Clock
        self._is_idle = False
        self._is_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._deadline = math.inf
        # what takes its place once a reply has come
        self._patient = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf

    # --- asking ----------------------------------------------------------------------------------

    def preface(self, data: bytes) -> None:
        """Write what goes in front of everything, and what nobody answers."""
        self._transport.write(data)

    def banner(self, deadline: float) -> asyncio.Future[list[ServerReply]]:
        """The banner as a list of one reply, or an empty one and trouble. To be asked first and once."""
        self._arm(deadline)
        return self._waiter or self.adopt()

    def exchange(
        self, data: bytes, replies: int, deadline: float, patient: float = 0.0
    ) -> asyncio.Future[list[ServerReply]]:
        """Write `data` and wait for so many replies until `deadline` (the loop's time).

        A first reply in time makes the deadline of the others `patient`, if that is later. When fewer are in the
        result there is `trouble`; replies that nobody asked for are trouble too, which the next exchange meets. After
        trouble nothing is written.
        """
        future: asyncio.Future[list[ServerReply]] = self.loop.create_future()
        if self.trouble:
            future.set_result([])
            return future
        self._expected = replies
        self._result = None
        self._waiter = future
        self._deadline = deadline
        self._patient = patient
        if deadline < self._timer_at:
            self._arm(deadline)
        self._transport.write(data)
        return future

    def transact(
        self,
        commands: bytes,
        replies: int,
        content: bytes,
        deadline: float,
        patient: float,
        *,
        final_s: float,
        clock: Clock,
    ) -> asyncio.Future[list[ServerReply]]:
        """An exchange, and when its replies say go ahead (ReplyReader.is_go_ahead), `content` and one more reply.

        When `dot_at` is set, the result is that final reply, if it came within `final_s`. Otherwise it is the replies
        to the commands, and nothing of the content was or will be written; so also when the caller was cancelled.
        """
        self.dot_at = 0.0
        self._content = content
        self._final_s = final_s
        self._clock = clock
        return self.exchange(commands, replies, deadline, patient)

    def end_content(self, last: bytes, *, final_s: float, clock: Clock) -> asyncio.Future[list[ServerReply]]:
        """Write the rest of the content with its dot, and wait for the final reply; sets `dot_at`."""
        self.dot_at = clock.monotonic()
        return self.exchange(last, 1, self.loop.time() + final_s)

    def adopt(self) -> asyncio.Future[list[ServerReply]]:
        """The exchange whose waiting caller was cancelled, for somebody else to wait for; its deadline stands."""
        future: asyncio.Future[list[ServerReply]] = self.loop.create_future()
        if self._result is not None:
            future.set_result(self._result)
        else:
            self._waiter = future
        return future

    async def stream(
        self, blocks: Iterable[bytes], *, deadline: float, stall_s: float, last_deadline: float
    ) -> list[ServerReply]:
        """Write content block by block, as fast as the peer takes it; stops at trouble.

        Until `deadline` nothing else matters; then the peer must take what was written within `stall_s` each time,
        and `last_deadline` ends it in any case. Returns the replies that came although none was due: with `trouble`.
        """
        for block in blocks:
            if self.trouble:
                break
            self._transport.write(block)
            now = self.loop.time()
            if now >= last_deadline:
                self._break("timeout")
            elif self._is_paused:
                await self._drain(min(max(deadline, now + stall_s), last_deadline))
            else:
                # a turn for the others: a fast peer and a large message would never wait
                await asyncio.sleep(0)
        return self._replies

    async def _drain(self, deadline: float) -> None:
        if not self.trouble:
            self._drained = self.loop.create_future()
            self._arm(deadline)
            await self._drained

    # --- the pool's side -------------------------------------------------------------------------

    def rest(self, deadline: float) -> None:
        """Nobody uses it from here; `on_idle_end` is called at `deadline` or when the peer stirs."""
        self._is_idle = True
        self._deadline = deadline
        if deadline < self._timer_at:
            self._arm(deadline)

    def wake(self) -> bool:
        """Take it out of its rest. False: it is of no use any more; what the loop has not read yet counts too."""
        self._is_idle = False
        self._deadline = math.inf
        return not (self.trouble or self._transport.is_closing() or self._poll.poll(0))

    def quit(self) -> None:
        """End it in good manners, without waiting for the reply (RFC 5321 4.1.1.10 lets the client not wait)."""
        if self.trouble:
            self.abort()
            return
        self._transport.write(QUIT)
        self._end()
        self._transport.close()

    def abort(self) -> None:
        """Close it at once; what was written but not sent is dropped. No dot ever follows content that was cut."""
        self._end()
        self._transport.abort()

    def _end(self) -> None:
        self._is_idle = False
        self._break("closed")
        self._disarm()

    # --- TLS -------------------------------------------------------------------------------------

    @property
    def is_silent(self) -> bool:
        """Nothing has come yet, not even an end."""
        return self._waiter is not None and not self._waiter.done() and self._reader.is_empty

    async def start_tls(self, context: ssl.SSLContext, server_name: str, timeout_s: float) -> None:
        """TLS on this connection from here. Raises OSError (ssl.SSLError is one) and ValueError."""
        # RFC 3207 4.2: nothing that was said before counts. To be done before the handshake: the banner of implicit
        # TLS may come before this coroutine goes on.
        self.capabilities = Capabilities()
        self._reader = ReplyReader()
        transport = await self.loop.start_tls(
            self._transport,
            self,
            context,
            server_hostname=server_name,
            ssl_handshake_timeout=timeout_s,
        )
        if transport is None:
            raise ConnectionError("closed during the TLS handshake")
        self._transport = transport

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's
        self._transport = cast("asyncio.Transport", transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        if self.trouble:
            return
        waiter, content = self._waiter, self._content
        if content is not None:
            self._content = None
            if waiter and not waiter.done() and self._reader.is_go_ahead(data, self._expected):
                self._expected = 1
                self.dot_at = self._clock.monotonic()
                self._transport.write(content)
                self._deadline = deadline = self.loop.time() + self._final_s
                if deadline < self._timer_at:
                    self._arm(deadline)
                return
        try:
            self._replies += self._reader.feed(data)
        except DownstreamProtocolError as error:
            self._replies += error.replies
            self._break("protocol")
            return
        got = len(self._replies)
        if waiter is None:
            # RFC 5321 3.8: 421 is all that may come unasked; in the middle of content a refusal does
            if got or self._is_idle:
                self._break("protocol")
        elif got >= self._expected:
            if got > self._expected or not self._reader.is_empty:
                self.trouble = "protocol"
            self._complete(waiter)

    def eof_received(self) -> None:
        self._break("closed")

    def connection_lost(self, exc: Exception | None) -> None:
        self._break("closed")
        self._disarm()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._drained is not None and not self._drained.done():
            self._deadline = math.inf
            self._drained.set_result(None)

    # --- how exchanges end -----------------------------------------------------------------------

    def _complete(self, waiter: asyncio.Future[list[ServerReply]]) -> None:
        # Kept also when the caller was cancelled in the meantime: adopt() may ask for it.
        self._result = self._replies[: self._expected]
        self._replies = []
        self._content = None
        self._waiter = None
        self._deadline = math.inf
        if not waiter.done():
            waiter.set_result(self._result)

    def _break(self, trouble: str) -> None:
        """The first trouble is the one that counts."""
        if not self.trouble:
            self.trouble = trouble
        if self._waiter is not None:
            self._complete(self._waiter)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._is_idle:
            self._is_idle = False
            self._on_idle_end(self)

    # --- the timer -------------------------------------------------------------------------------

    def _arm(self, deadline: float) -> None:
        """A timer that fires too early sets itself anew; only one that would be too late is replaced."""
        self._deadline = deadline
        if deadline < self._timer_at:
            self._disarm()
            self._timer = self.loop.call_at(deadline, self._on_timer)
            self._timer_at = deadline

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = math.inf

    def _on_timer(self) -> None:
        self._disarm()
        if self._deadline == math.inf:
            return
        if self.loop.time() + _EARLY_S < self._deadline:
            self._arm(self._deadline)
        elif self._is_idle:
            self._is_idle = False
            self._on_idle_end(self)
        elif self._waiter is not None and self._replies and self._deadline < self._patient:
            self._arm(self._patient)
        else:
            self._break("timeout")


# Stands in until connection_made; a closed state without a socket.
_NO_TRANSPORT = asyncio.Transport()
