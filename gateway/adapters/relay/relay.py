"""SmtpRelay: the two operations of gateway.relaying.Relay over routes, hosts and their pools."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import NoReturn

from gateway.adapters.relay.cache import RecipientCache
from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.opening import NoConnectionError
from gateway.adapters.relay.outgoing import pieces, whole
from gateway.adapters.relay.route import Host, Route, RouteTable
from gateway.adapters.relay.settings import RelaySettings
from gateway.relaying import Content, Delivery, Offer
from gateway.services import Clock, Log, Metrics
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp.address import Mailbox
from gateway.smtp.client import (
    END_OF_CONTENT,
    After,
    Outcome,
    Send,
    ServerReply,
    StartContent,
    Transfer,
    Verification,
    Verified,
    final_outcome,
    mail_command,
    rcpt_command,
    transaction_commands,
)
from gateway.smtp.reply import (
    DOWNSTREAM_TROUBLE,
    INTERNAL,
    RECIPIENT_OK,
    ROUTE_NO_SMTPUTF8,
    ROUTE_TOO_BIG,
    Reply,
)

# DESIGN.md section 6: at most so many RCPTs in one write
_VERIFY_BATCH = 8
# Content up to this size goes out in one write with its dot; DESIGN.md section 8: blocks of at most 64 KiB.
_ONE_WRITE_BYTES = 64 * 1024


class SmtpRelay:
    """Implements gateway.relaying.Relay. Raises RelaySettingsError for settings that cannot be used.

    `start` and `close` belong to the worker's life; between them one task asks the downstreams what they offer until
    each has answered once.
    """

    def __init__(self, settings: RelaySettings, *, clock: Clock, log: Log, metrics: Metrics) -> None:
        self._settings = settings
        self._clock = clock
        self._log = log
        self._table = RouteTable(settings, clock, metrics)
        self._cache = RecipientCache(
            clock,
            positive_s=settings.recipient_cache_s,
            negative_s=settings.recipient_cache_negative_s,
            max_entries=settings.recipient_cache_entries,
        )
        self._probe: asyncio.Task[None] | None = None
        # final replies that nobody waits for any more
        self._orphans: set[asyncio.Future[list[ServerReply]]] = set()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to ask the downstreams what they offer; does not wait for them."""
        self._probe = asyncio.create_task(self._probe_all(), name="relay-probe")
        self._probe.add_done_callback(self._probe_ended)

    async def close(self) -> None:
        """End everything; waits at most `drain_timeout_s` for replies to dots whose clients are gone."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait((self._probe,))
            self._probe = None
        for host in self._table.hosts():
            host.pool.close()
        if self._orphans:
            await asyncio.wait(self._orphans, timeout=self._settings.drain_timeout_s)
        for host in self._table.hosts():
            host.pool.abort()
        # the loop closes the sockets in its next turn
        await asyncio.sleep(0)

    def _probe_ended(self, probe: asyncio.Task[None]) -> None:
        if not probe.cancelled() and (defect := probe.exception()) is not None:
            # Mail goes on; what is offered stays cautious until a delivery's connection tells more.
            self._log.error("relay.failed", step="probe", error="internal", detail=repr(defect))

    async def _probe_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for route in self._table.routes.values():
                for host in route.hosts:
                    group.create_task(self._probe_until_answered(route, host))

    async def _probe_until_answered(self, route: Route, host: Host) -> None:
        pause_s = self._settings.probe_min_s
        while host.capabilities is None:
            try:
                connection = await host.pool.acquire(self._loop.time() + self._settings.verify_timeout_s)
            except NoConnectionError as trouble:
                self._failed(route, "probe", trouble.error, detail=str(trouble))
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._settings.probe_max_s)
            else:
                host.pool.release(connection)

    # --- what is known without asking ------------------------------------------------------------

    def offer(self) -> Offer:
        return self._table.offer

    def route(self, mailbox: Mailbox) -> str | None:
        route = self._table.of_domain[mailbox.domain]
        return None if route is None else route.name

    def refusal(self, route: str, envelope: Envelope) -> Reply | None:
        offer = self._table.routes[route].offer
        if offer is None:
            return None
        if envelope.smtputf8 and not offer.smtputf8:
            return ROUTE_NO_SMTPUTF8
        if 0 < offer.size < envelope.size_hint:
            return ROUTE_TOO_BIG
        return None

    # --- verify ----------------------------------------------------------------------------------

    async def verify(
        self, session: Session, envelope: Envelope, rcpts: Sequence[Recipient]
    ) -> Sequence[Reply]:
        if not rcpts:
            return ()
        route = self._table.of_domain[rcpts[0].mailbox.domain] or _no_route(rcpts[0])
        if not route.verify_recipients:
            return (RECIPIENT_OK,) * len(rcpts)
        replies: list[Reply] = []
        missing: list[int] = []
        for rcpt in rcpts:
            reply = self._cache.get(route.name, _key(rcpt.mailbox))
            if reply is None:
                missing.append(len(replies))
            replies.append(reply or DOWNSTREAM_TROUBLE)
        if missing:
            # From here on it may suspend.
            asked = await self._ask(route, session, envelope, [rcpts[position] for position in missing])
            for position, answer in zip(missing, asked, strict=True):
                replies[position] = answer
        return replies

    async def _ask(
        self, route: Route, session: Session, envelope: Envelope, rcpts: Sequence[Recipient]
    ) -> Sequence[Reply]:
        started = self._clock.monotonic()
        deadline = self._loop.time() + self._settings.verify_timeout_s
        replies: list[Reply] = []
        try:
            for begin in range(0, len(rcpts), _VERIFY_BATCH):
                batch = rcpts[begin : begin + _VERIFY_BATCH]
                verified = await self._verify_batch(route, envelope, batch, deadline)
                replies += verified.replies
                if verified.error:
                    self._failed(route, "verify", verified.error, session=session.id)
                if not verified.is_mail_refused:
                    for rcpt, reply in zip(batch, verified.replies, strict=True):
                        self._cache.put(route.name, _key(rcpt.mailbox), reply)
        except NoConnectionError as trouble:
            self._failed(route, "verify", trouble.error, detail=str(trouble), session=session.id)
        except ValueError as exc:
            # The envelope cannot be written: what made it is at fault.
            self._failed(route, "verify", "internal", detail=repr(exc), session=session.id)
        route.metrics.verify_s.observe(self._clock.monotonic() - started)
        return (*replies, *[DOWNSTREAM_TROUBLE] * (len(rcpts) - len(replies)))

    async def _verify_batch(
        self, route: Route, envelope: Envelope, rcpts: Sequence[Recipient], deadline: float
    ) -> Verified:
        connection = route.take() or await route.acquire(deadline)
        is_reused = connection.is_reused
        verified = await self._verify_on(connection, envelope, rcpts, deadline)
        if verified.is_used_up and is_reused:
            connection = await route.acquire(deadline, fresh=True)
            verified = await self._verify_on(connection, envelope, rcpts, deadline)
        return verified

    async def _verify_on(
        self, connection: Connection, envelope: Envelope, rcpts: Sequence[Recipient], deadline: float
    ) -> Verified:
        """One dialogue on one connection, which is given back whatever happens."""
        offered = connection.capabilities
        if envelope.smtputf8 and not offered.smtputf8:
            # Its EHLO has just said so: the route is known not to take it.
            connection.pool.release(connection)
            return Verified.all(ROUTE_NO_SMTPUTF8, len(rcpts))
        try:
            dialogue = Verification(
                mail_command(envelope, offered, envelope.size_hint),
                [rcpt_command(rcpt, offered) for rcpt in rcpts],
                pipelining=offered.pipelining,
            )
            step: Send | Verified = dialogue.begin()
            while isinstance(step, Send):
                replies = await connection.exchange(step.data, step.replies, self._reply_deadline(deadline))
                if len(replies) == step.replies:
                    step = dialogue.advance(replies)
                else:
                    step = dialogue.interrupted(replies, connection.trouble)
        except BaseException:
            connection.pool.discard(connection)
            raise
        connection.verifications += 1
        connection.refusals += step.refusals
        connection.pool.give_back(connection, step.after)
        return step

    # --- deliver ---------------------------------------------------------------------------------

    async def deliver(self, tx: Transaction, content: Content) -> Delivery:
        first = tx.envelope.rcpts[0]
        route = self._table.of_domain[first.mailbox.domain] or _no_route(first)
        deadline = self._loop.time() + self._settings.deliver_timeout_s
        try:
            connection = route.take() or await route.acquire(deadline)
            is_reused = connection.is_reused
            outcome = await self._transfer_on(route, connection, tx, content, deadline)
            if outcome.is_used_up and is_reused:
                connection = await route.acquire(deadline, fresh=True)
                outcome = await self._transfer_on(route, connection, tx, content, deadline)
        except NoConnectionError as trouble:
            self._failed(
                route, "deliver", trouble.error, detail=str(trouble), tx=tx.id, session=tx.session.id
            )
            return Delivery(DOWNSTREAM_TROUBLE, stored=False, error=trouble.error)
        except (OSError, ValueError) as exc:
            # The content could not be read, or the envelope cannot be written.
            self._failed(route, "deliver", "internal", detail=repr(exc), tx=tx.id, session=tx.session.id)
            return Delivery(INTERNAL, stored=False, error="internal")
        if outcome.error:
            self._note(route, tx, outcome)
        return Delivery(outcome.reply, outcome.stored, outcome.error)

    async def _transfer_on(
        self, route: Route, connection: Connection, tx: Transaction, content: Content, deadline: float
    ) -> Outcome:
        """One attempt on one connection, which is given back whatever happens."""
        clock, final_s = self._clock, self._settings.final_timeout_s
        started = clock.monotonic()
        envelope, offered = tx.envelope, connection.capabilities
        if envelope.smtputf8 and not offered.smtputf8:
            # It was offered at RCPT. Now it is known to be gone, and the client's next attempt will be refused there.
            connection.pool.release(connection)
            return Outcome(DOWNSTREAM_TROUBLE, error="smtputf8")
        connection.dot_at = 0.0
        replies: list[ServerReply] | None = None
        try:
            size_bytes = content.size_bytes
            if offered.pipelining and size_bytes <= _ONE_WRITE_BYTES:
                replies = await connection.transact(
                    transaction_commands(envelope, offered, size_bytes),
                    len(envelope.rcpts) + 2,
                    whole(content),
                    self._reply_deadline(deadline),
                    final_s=final_s,
                    clock=clock,
                )
            if not connection.dot_at or replies is None:
                step = await self._up_to_the_dot(connection, envelope, content, replies, deadline)
                if isinstance(step, Outcome):
                    connection.pool.give_back(connection, step.after)
                    return step
                # From here to the write nothing waits, and behind it nothing is taken back.
                replies = await connection.end_content(step, final_s=final_s, clock=clock)
        except BaseException:
            if connection.dot_at:
                self._adopt(route, connection, tx, started)
            else:
                # No dot was written, so nothing was delivered, and nothing will be.
                connection.pool.discard(connection)
            raise
        route.metrics.final_s.observe(clock.monotonic() - connection.dot_at)
        return self._ended(route, connection, replies, started)

    async def _up_to_the_dot(
        self,
        connection: Connection,
        envelope: Envelope,
        content: Content,
        early: list[ServerReply] | None,
        deadline: float,
    ) -> Outcome | bytes:
        """Any dialogue up to the last write of the content, whose bytes with the dot are returned.

        `early` are the replies to the pipelined commands where these were sent already.
        """
        offered, size_bytes = connection.capabilities, content.size_bytes
        transfer = Transfer(
            mail_command(envelope, offered, size_bytes),
            [rcpt_command(rcpt, offered) for rcpt in envelope.rcpts],
            pipelining=offered.pipelining,
        )
        step: Send | StartContent | Outcome = transfer.begin()
        while isinstance(step, Send):
            if early is None:
                early = await connection.exchange(step.data, step.replies, self._reply_deadline(deadline))
            if len(early) == step.replies:
                step = transfer.advance(early)
            else:
                step = transfer.interrupted(early, connection.trouble)
            early = None
        if isinstance(step, Outcome):
            return step
        last, unasked = END_OF_CONTENT, list[ServerReply]()
        if size_bytes <= _ONE_WRITE_BYTES:
            last = whole(content)
        else:
            unasked = await self._stream(connection, content, deadline)
        return transfer.interrupted(unasked, connection.trouble) if connection.trouble else last

    def _ended(
        self, route: Route, connection: Connection, replies: list[ServerReply], started: float
    ) -> Outcome:
        """The outcome of what followed the dot; the connection is given back."""
        route.metrics.deliver_s.observe(connection.dot_at - started)
        connection.transactions += 1
        outcome = final_outcome(replies)
        if outcome.after is After.REUSE:
            connection.pool.release(connection)
        else:
            connection.pool.discard(connection)
        return outcome

    async def _stream(self, connection: Connection, content: Content, deadline: float) -> list[ServerReply]:
        """Write large content; the dot is not part of it. Returns what the downstream said meanwhile: trouble."""
        settings = self._settings
        return await connection.stream(
            pieces(content),
            deadline=deadline,
            stall_s=settings.reply_timeout_s,
            last_deadline=deadline - settings.deliver_timeout_s + settings.deliver_moving_timeout_s,
        )

    # --- a delivery whose client is gone -----------------------------------------------------------

    def _adopt(self, route: Route, connection: Connection, tx: Transaction, started: float) -> None:
        """Wait for the final reply in the caller's place.

        The downstream may be storing the message; cutting the connection meanwhile helps nobody (RFC 5321 4.1.1.10).
        """
        future = connection.adopt()
        self._orphans.add(future)

        def ended(future: asyncio.Future[list[ServerReply]]) -> None:
            self._orphans.discard(future)
            outcome = self._ended(route, connection, future.result(), started)
            self._note(route, tx, outcome)
            if outcome.stored:
                route.metrics.errors["orphan"].inc()
            self._log.info(
                "relay.orphaned",
                route=route.name,
                session=tx.session.id,
                tx=tx.id,
                code=outcome.reply.code,
                enhanced=outcome.reply.enhanced,
            )

        future.add_done_callback(ended)

    # --- reporting -------------------------------------------------------------------------------

    def _note(self, route: Route, tx: Transaction, outcome: Outcome) -> None:
        """What an outcome teaches: the cache forgets who was refused; trouble is counted and logged, refusals not."""
        for refused in outcome.refused:
            # Late refusals (DESIGN.md section 6, the Store for 24 h) will be remembered here as well.
            self._cache.forget(route.name, _key(tx.envelope.rcpts[refused.position].mailbox))
        if outcome.error and outcome.error != "refused":
            self._failed(route, "deliver", outcome.error, tx=tx.id, session=tx.session.id)

    def _failed(self, route: Route, step: str, error: str, **keys: str) -> None:
        route.metrics.errors[error].inc()
        self._log.warning("relay.failed", route=route.name, step=step, error=error, **keys)

    def _reply_deadline(self, deadline: float) -> float:
        return min(deadline, self._loop.time() + self._settings.reply_timeout_s)


def _no_route(rcpt: Recipient) -> NoReturn:
    raise LookupError(f"no route takes {rcpt.mailbox}")


def _key(mailbox: Mailbox) -> Hashable:
    """What the cache knows a mailbox by; its own hash and str are calls that take longer."""
    return mailbox.local, mailbox.domain
