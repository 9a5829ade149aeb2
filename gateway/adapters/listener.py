"""The listener: an asyncio.Protocol for each connection around smtp.server, driving one gatekeeper Conversation.

It owns what the pure core does not know: sockets, TLS, the clock, limits of connections, back-pressure and the end
of a session. A command's coroutine is stepped once and becomes a task only if it suspends; replies of a batch leave
in one write. One sweep a second serves the deadlines of all sessions, so a short session costs no timer.

An exception in a session is a defect of ours: it is logged, the client gets a 4xx, nobody else notices.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import traceback
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from gateway.session import TlsInfo, client_address
from gateway.smtp import reply
from gateway.smtp.server import Phase, Server, ServerSettings
from gateway.stepping import step

if TYPE_CHECKING:
    from gateway.gatekeeper import Answer, Conversation, Gatekeeper, RcptAnswers
    from gateway.services import Counter, Counters, Services
    from gateway.session import Envelope, Recipient
    from gateway.smtp.content import Fault

T = TypeVar("T")

BACKLOG = 511
# Input that piles up while an answer is awaited: a few pipelined groups, then reading pauses
_MAX_UNREAD_BYTES = 64 * 1024
_TLS_HANDSHAKE_S = 30.0
# A sender this slow for this long is not worth a session (SECURITY.md 1.8)
_MIN_RATE_BYTES_S = 100
_MIN_RATE_AFTER_S = 60
# Drain: content that is still arriving is waited for this long (DESIGN.md section 8)
_DRAIN_CONTENT_S = 30
_SWEEP_S = 1.0
# A session that we ended is read and not listened to for this long, so that our last reply arrives
_LINGER_S = 3.0
_CLOSE_AT_ONCE = frozenset({"quit", "timeout", "drain", "tls"})
# What a client that does not read leaves unsent is dropped after this long: its session must not stay for ever
_UNSENT_S = 30.0


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """What the operator decides about connections; durations in seconds, see docs/configure.md."""

    max_connections: int = 2000
    max_connections_per_client: int = 50
    greeting_delay_s: float = 0.0
    command_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    data_timeout_s: float = 180.0
    session_timeout_s: float = 1200.0
    allow_bare_lf_from: tuple[IPv4Network | IPv6Network, ...] = ()


# The barrier around a session: what it raises ends that session only. It cannot be cancelled from outside while it is
# stepped, so a CancelledError out of it is a defect like any other.
_OWN_DEFECTS = (Exception, asyncio.CancelledError)


# A member that is asked of its class costs ten times what a name of the module does.
_CONTENT, _BUSY = Phase.CONTENT, Phase.BUSY


class _Bound(dict[object, "Counter"]):
    """Counters of one label, bound when a value is first seen; the values come from closed sets."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def __missing__(self, value: object) -> Counter:
        counter = self[value] = self._counters.labels(str(value))
        return counter


class TlsSource(Protocol):
    """The server's certificate: a context for handshakes, and a look whether its files changed (adapters/tls.py)."""

    @property
    def context(self) -> ssl.SSLContext: ...

    def refresh(self) -> None: ...


class Listener:
    """All sessions of a worker on its listening sockets."""

    def __init__(
        self,
        settings: ListenerSettings,
        server_settings: ServerSettings,
        gatekeeper: Gatekeeper,
        services: Services,
        tls: TlsSource | None,
    ) -> None:
        self.settings = settings
        self.server_settings = server_settings
        self.gatekeeper = gatekeeper
        self.services = services
        self.tls = tls
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()  # as of the last sweep
        self.sessions: set[Connection] = set()
        self.by_client: dict[int, int] = {}
        self.draining_since: float | None = None
        self.background: set[asyncio.Task[Any]] = set()
        self._servers: list[asyncio.Server] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()
        metrics = services.metrics
        connections = metrics.counters(
            "mxgate_connections_total", "Connections by how they began", ("outcome",)
        )
        self.connections = {o: connections.labels(o) for o in ("served", "limit", "client_limit")}
        self.open_connections = metrics.gauges(
            "mxgate_open_connections", "Connections that are open"
        ).labels()
        self.replies = _Bound(
            metrics.counters("mxgate_replies_total", "Replies to clients by code", ("code",))
        )
        # counted here, and told once a second: there are several for each message
        self.codes: defaultdict[int, int] = defaultdict(int)
        self.closed = _Bound(
            metrics.counters("mxgate_closed_sessions_total", "Sessions by what ended them", ("reason",))
        )
        handshakes = metrics.counters(
            "mxgate_tls_handshakes_total", "TLS handshakes by outcome", ("outcome",)
        )
        self.handshakes = {o: handshakes.labels(o) for o in ("done", "failed")}

    async def start(self, sockets: Sequence[socket.socket], tls_sockets: Sequence[socket.socket]) -> None:
        """Accept connections on sockets that are bound already; those of `tls_sockets` begin with a handshake."""
        for sock in sockets:
            self._servers.append(
                await self.loop.create_server(lambda: Connection(self), sock=sock, backlog=BACKLOG)
            )
        for sock in tls_sockets:
            assert self.tls is not None
            self._servers.append(
                await self.loop.create_server(
                    lambda: Connection(self, implicit_tls=True),
                    sock=sock,
                    backlog=BACKLOG,
                    ssl=self.tls.context,
                    ssl_handshake_timeout=_TLS_HANDSHAKE_S,
                )
            )
        self._schedule_sweep()

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, let messages that are under way end, close the rest; returns when no session is left.

        What is still open after `timeout_s` is cut: its message was not confirmed to anybody.
        """
        self.draining_since = self.now = self.loop.time()
        for accepting in self._servers:
            accepting.close()
        for connection in list(self.sessions):
            connection.drain()
        try:
            async with asyncio.timeout(timeout_s):
                while self.sessions or self.background:
                    self._drained.clear()
                    await self._drained.wait()
        except TimeoutError:
            self.services.log.warning("drain.timeout", sessions=len(self.sessions))
        for connection in list(self.sessions):
            connection.abort("drain")
        if self._sweep is not None:
            self._sweep.cancel()
        self._count_replies()

    def _count_replies(self) -> None:
        for code, count in self.codes.items():
            self.replies[code].inc(count)
        self.codes.clear()

    def count_closed(self, reason: str) -> None:
        """Account for the end of a session."""
        self.closed[reason].inc()

    def run_behind(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run what no client waits for; drain waits for it."""
        task = step(coro, self.loop)
        if isinstance(task, asyncio.Task):
            self.background.add(task)
            task.add_done_callback(self._behind_done)

    def session_ended(self) -> None:
        """Somebody left: drain may be done."""
        self._drained.set()

    def _behind_done(self, task: asyncio.Task[None]) -> None:
        self.background.discard(task)
        self._drained.set()
        if not task.cancelled() and (exc := task.exception()) is not None:
            self.services.log.error("session.failed", error=repr(exc))

    def _schedule_sweep(self) -> None:
        self._sweep = self.loop.call_later(_SWEEP_S, self._run_sweep)

    def _run_sweep(self) -> None:
        self.now = self.loop.time()
        for connection in list(self.sessions):
            connection.check_deadlines()
        self._count_replies()
        if self.tls is not None:
            self.tls.refresh()
        self._schedule_sweep()


class Connection(asyncio.Protocol):
    """One client."""

    __slots__ = (
        "_arrived",
        "_begun",
        "_client_key",
        "_content_begun",
        "_conversation",
        "_implicit_tls",
        "_is_closed",
        "_listener",
        "_phase",
        "_phase_since",
        "_reading_paused",
        "_received_bytes",
        "_server",
        "_task",
        "_transport",
        "_writing_paused",
    )

    _server: Server
    _conversation: Conversation
    _transport: asyncio.Transport

    def __init__(self, listener: Listener, *, implicit_tls: bool = False) -> None:
        self._listener = listener
        self._implicit_tls = implicit_tls
        self._task: asyncio.Task[Any] | None = None
        self._client_key: int | None = None
        self._is_closed = True
        self._reading_paused = False
        self._writing_paused = False
        self._begun = self._phase_since = self._arrived = listener.now
        self._phase = _BUSY
        self._received_bytes = 0  # of the content that is arriving
        self._content_begun = 0.0

    # --- asyncio.Protocol -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected (and finished its handshake, where TLS is implicit)."""
        listener = self._listener
        # uvloop's transports are no subclasses of asyncio's
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        if not peer:  # it has gone already
            self._transport.abort()
            return
        client, key = _client(peer[0])
        settings = listener.settings
        others = listener.by_client.get(key, 0)
        refusal, outcome = None, "served"
        if listener.draining_since is not None:
            refusal = reply.SHUTTING_DOWN
        elif len(listener.sessions) >= settings.max_connections:
            refusal, outcome = reply.TOO_MANY_CONNECTIONS, "limit"
        elif others >= settings.max_connections_per_client:
            refusal, outcome = reply.TOO_MANY_FROM_CLIENT, "client_limit"
        listener.connections[outcome].inc()
        if refusal is not None:
            self._transport.write(refusal.wire)
            self._transport.close()
            return
        self._is_closed = False
        self._client_key = key
        listener.by_client[key] = others + 1
        listener.sessions.add(self)
        listener.open_connections.inc()
        tls = _describe(transport.get_extra_info("ssl_object")) if self._implicit_tls else None
        bare_lf = settings.allow_bare_lf_from
        self._conversation = listener.gatekeeper.open(client, peer[1], tls)
        self._server = Server(
            listener.server_settings,
            self,
            listener.codes,
            tls_active=tls is not None,
            allow_bare_lf=bool(bare_lf) and any(client in network for network in bare_lf),
        )
        if settings.greeting_delay_s:
            listener.loop.call_later(settings.greeting_delay_s, self._connect)
        else:
            self._connect()

    def data_received(self, data: bytes) -> None:
        """The client said something."""
        if self._is_closed:
            return
        self._arrived = self._listener.now
        self._received_bytes += len(data)
        try:
            self._server.receive(data)
        except _OWN_DEFECTS as exc:  # the barrier around a session
            self._fail(exc)
        else:
            self._settle()

    def eof_received(self) -> bool:
        """The client will say no more: what it has not finished is given up."""
        return False

    def pause_writing(self) -> None:
        """The client does not read its replies: it is not listened to either."""
        self._writing_paused = True
        self._balance()

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writing_paused = False
        self._balance()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, from whichever side."""
        if self._client_key is None:
            return
        listener = self._listener
        if not self._is_closed:
            self._is_closed = True
            listener.count_closed("lost")
        key, self._client_key = self._client_key, None
        others = listener.by_client.pop(key) - 1
        if others:
            listener.by_client[key] = others
        listener.sessions.discard(self)
        listener.open_connections.dec()
        if self._task is not None:
            # the relay goes on by itself once the dot is sent
            self._task.cancel()
        else:
            self._conversation.reset()
        listener.session_ended()

    # --- deadlines and drain ----------------------------------------------------------------------------

    def check_deadlines(self) -> None:
        """Once a second: close the session if it waited too long for the client."""
        now, settings = self._listener.now, self._listener.settings
        waited = now - self._phase_since
        if self._is_closed:
            if waited > _UNSENT_S:
                self._transport.abort()
            elif waited > _LINGER_S:
                self._transport.close()
            return
        match self._phase:
            case Phase.CONTENT:
                draining = self._listener.draining_since
                if draining is not None and now - draining > _DRAIN_CONTENT_S:
                    self._server.close("drain", reply.SHUTTING_DOWN)
                    return
                # the client waited for our 354, however long that took
                late = now - max(self._arrived, self._content_begun) > settings.data_timeout_s
                taken = now - self._content_begun
                if taken > _MIN_RATE_AFTER_S and self._received_bytes < taken * _MIN_RATE_BYTES_S:
                    late = True
            case Phase.COMMAND:
                late = waited > settings.command_timeout_s or self._is_over(now)
            case Phase.IDLE:
                late = waited > settings.idle_timeout_s or self._is_over(now)
            case _:
                late = False
        if late:
            self._server.close("timeout", reply.COMMAND_TIMEOUT)

    def _is_over(self, now: float) -> bool:
        """Whether the session has had its time; content that arrives and answers of ours are not cut by it."""
        return now - self._begun > self._listener.settings.session_timeout_s

    def drain(self) -> None:
        """Close now if no message is under way."""
        if self._is_closed:
            self._transport.close()
        elif self._phase in (Phase.IDLE, Phase.COMMAND):
            self._server.close("drain", reply.SHUTTING_DOWN)

    def abort(self, reason: str) -> None:
        """Cut the connection."""
        if not self._is_closed:
            self._is_closed = True
            self._listener.count_closed(reason)
        self._transport.abort()

    # --- the dialogue -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self._is_closed:
            return
        try:
            if self._listener.gatekeeper.pipeline.plans_connect:
                self._await(self._conversation.connect(), self._connected)
            else:
                self._server.open()
        except _OWN_DEFECTS as exc:
            self._fail(exc)
        else:
            self._settle()

    def _connected(self, refusal: Answer | None) -> None:
        self._server.open(refusal.reply if refusal else None)

    def _settle(self) -> None:
        """Write the replies, see what is awaited now."""
        if self._is_closed:
            return
        smtp = self._server
        if output := smtp.take_output():
            self._transport.write(output)
        phase = smtp.phase
        listener = self._listener
        if output or phase is not self._phase:
            if phase is _CONTENT and self._phase is not _CONTENT:
                self._received_bytes = 0
                self._content_begun = listener.now
            self._phase, self._phase_since = phase, listener.now
            if listener.draining_since is not None and phase in (Phase.IDLE, Phase.COMMAND):
                smtp.close("drain", reply.SHUTTING_DOWN)
                return
        if phase is _BUSY or self._reading_paused:
            self._balance()

    def _flush(self) -> None:
        """Write the replies that are due."""
        if output := self._server.take_output():
            self._transport.write(output)

    def _balance(self) -> None:
        """Read only while replies go out and input does not pile up."""
        if self._transport.is_closing():
            return
        pause = not self._is_closed and (
            self._writing_paused or self._server.buffered_bytes > _MAX_UNREAD_BYTES
        )
        if pause != self._reading_paused:
            self._reading_paused = pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _await(self, coro: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        """Run a coroutine of the conversation; `then` gets its result now, or later when it had to wait."""
        stepped = step(coro, self._listener.loop)
        if isinstance(stepped, asyncio.Task):
            self._task = stepped
            stepped.add_done_callback(lambda task: self._resume(task, then))
        else:
            then(stepped)

    def _resume(self, task: asyncio.Task[T], then: Callable[[T], None]) -> None:
        self._task = None
        if self._client_key is None:  # the connection was lost meanwhile
            self._conversation.reset()
            if (told := self._conversation.outcome()) is not None:
                self._listener.run_behind(told)
            if not task.cancelled() and (exc := task.exception()) is not None:
                self._listener.services.log.error("session.failed", error=repr(exc))
            return
        try:
            then(task.result())
            self._server.run()
        except _OWN_DEFECTS as exc:  # the barrier around a session
            self._fail(exc)
        else:
            self._settle()

    def _fail(self, exc: BaseException) -> None:
        """A defect of ours: the client gets a 4xx and the connection ends, since its state is not known any more."""
        self._listener.services.log.error(
            "session.failed",
            session=self._conversation.session.id,
            error="".join(traceback.format_exception(exc)),
        )
        self._server.close("failed", reply.INTERNAL_CLOSING)

    # --- gateway.smtp.server.Handler ------------------------------------------------------------------------

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        """EHLO or HELO."""
        conversation, gatekeeper = self._conversation, self._listener.gatekeeper
        if gatekeeper.pipeline.plans_ehlo:
            self._await(conversation.ehlo(domain, esmtp=esmtp), self._greet)
        else:
            conversation.greeted(domain, esmtp=esmtp)
            self._server.greet(gatekeeper.extensions() if esmtp else None)

    def _greet(self, refusal: Answer | None) -> None:
        if refusal is not None:
            self._server.answer(refusal.reply, close=refusal.close)
        else:
            extensions = self._listener.gatekeeper.extensions()
            self._server.greet(extensions if self._conversation.session.esmtp else None)

    def mail(self, envelope: Envelope) -> None:
        """MAIL."""
        if self._listener.gatekeeper.pipeline.plans_mail:
            self._await(self._conversation.mail(envelope), self._answer)
        else:
            self._conversation.begin(envelope)
            self._server.answer(reply.SENDER_OK)

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        """RCPTs."""
        self._await(self._conversation.rcpt(rcpts), self._answer_rcpts)

    def _answer(self, answer: Answer) -> None:
        self._server.answer(answer.reply, close=answer.close)
        if (told := self._conversation.outcome()) is not None:
            self._flush()
            self._listener.run_behind(told)

    def _answer_rcpts(self, answers: RcptAnswers) -> None:
        self._server.answer_rcpts(answers.replies, unknown=answers.unknown, close=answers.close)

    def content_begins(self, *, is_stuffed: bool) -> None:
        """DATA or the first BDAT."""
        self._conversation.begin_content(is_stuffed=is_stuffed)
        self._server.accept_content()

    def content(self, block: bytes) -> None:
        """A piece of content."""
        self._conversation.content(block)

    def content_ends(self, fault: Fault | None) -> None:
        """The end of the content."""
        self._await(self._conversation.eom(fault), self._answer)

    def reset(self) -> None:
        """The transaction was given up."""
        self._conversation.reset()

    def closing(self, reason: str) -> None:
        """The session is over."""
        self._flush()
        self._is_closed = True
        self._phase_since = self._listener.now
        self._listener.count_closed(reason)
        if reason in _CLOSE_AT_ONCE or not self._transport.can_write_eof():
            self._transport.close()
            return
        # Input that nobody reads would make the kernel send RST, which can overtake our last reply.
        self._transport.write_eof()
        self._balance()

    def starttls(self) -> None:
        """STARTTLS: its 220 is in the output."""
        # the ClientHello must not be read as a command
        self._transport.pause_reading()
        self._flush()
        self._await(self._handshake(), self._handshake_ended)

    async def _handshake(self) -> bool:
        listener = self._listener
        assert listener.tls is not None
        try:
            transport = await listener.loop.start_tls(
                self._transport,
                self,
                listener.tls.context,
                server_side=True,
                ssl_handshake_timeout=_TLS_HANDSHAKE_S,
            )
        except (OSError, ssl.SSLError):
            transport = None
        if transport is None:
            listener.handshakes["failed"].inc()
            return False
        listener.handshakes["done"].inc()
        self._transport = transport
        self._conversation.reset()
        self._conversation.tls_started(_describe(transport.get_extra_info("ssl_object")))
        return True

    def _handshake_ended(self, is_done: bool) -> None:  # noqa: FBT001  # a callback
        if is_done:
            self._server.tls_started()
            return
        self._server.close("tls")
        # asyncio does not tell a protocol of a connection that was lost in the middle of start_tls
        self._transport.abort()
        self.connection_lost(None)


@lru_cache(maxsize=4096)  # most connections of an hour come from few addresses
def _client(host: str) -> tuple[IPv4Address | IPv6Address, int]:
    """A client's address, and what its connections are counted by: IPv6 by /64, which one client has for the asking."""
    client = client_address(host)
    return client, int(client) if isinstance(client, IPv4Address) else -(int(client) >> 64)


def _describe(ssl_object: ssl.SSLObject) -> TlsInfo:
    """Version and cipher of a finished handshake."""
    cipher = ssl_object.cipher()
    return TlsInfo(ssl_object.version() or "", cipher[0] if cipher else "")
