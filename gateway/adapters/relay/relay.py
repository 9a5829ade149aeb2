"""SmtpRelay: the two operations of gateway.relaying.Relay over routes, hosts and their pools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.adapters.relay.cache import RecipientCache
from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.opening import NoConnectionError
from gateway.adapters.relay.outgoing import pieces, whole
from gateway.adapters.relay.route import Host, Lease, Route, RouteTable
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
    mail_command,
    rcpt_command,
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
        loop = asyncio.get_running_loop()
        pause_s = self._settings.probe_min_s
        while host.capabilities is None:
            try:
                connection = await host.pool.acquire(loop.time() + self._settings.verify_timeout_s)
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
        return self._table.find(mailbox)

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
        route = self._table.of(rcpts[0])
        if not route.verify_recipients:
            return (RECIPIENT_OK,) * len(rcpts)
        replies = [self._cache.get(route.name, str(rcpt.mailbox)) for rcpt in rcpts]
        missing = [rcpt for rcpt, reply in zip(rcpts, replies, strict=True) if reply is None]
        if missing:
            # From here on it may suspend.
            asked = iter(await self._ask(route, session, envelope, missing))
            return [reply or next(asked) for reply in replies]
        return [reply for reply in replies if reply is not None]

    async def _ask(
        self, route: Route, session: Session, envelope: Envelope, rcpts: Sequence[Recipient]
    ) -> Sequence[Reply]:
        started = self._clock.monotonic()
        deadline = asyncio.get_running_loop().time() + self._settings.verify_timeout_s
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
                        self._cache.put(route.name, str(rcpt.mailbox), reply)
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
        lease = route.idle() or await route.lease(deadline)
        is_reused = lease.connection.is_reused
        verified = await self._verify_on(lease, envelope, rcpts, deadline)
        if verified.is_used_up and is_reused:
            verified = await self._verify_on(
                await route.lease(deadline, fresh=True), envelope, rcpts, deadline
            )
        return verified

    async def _verify_on(
        self, lease: Lease, envelope: Envelope, rcpts: Sequence[Recipient], deadline: float
    ) -> Verified:
        """One dialogue on one connection, which is given back whatever happens."""
        connection = lease.connection
        offered = connection.capabilities
        if envelope.smtputf8 and not offered.smtputf8:
            # Its EHLO has just said so: the route is known not to take it.
            lease.give_back(After.REUSE)
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
            lease.give_back(After.CLOSE)
            raise
        connection.verifications += 1
        connection.refusals += step.refusals
        lease.give_back(step.after)
        return step

    # --- deliver ---------------------------------------------------------------------------------

    async def deliver(self, tx: Transaction, content: Content) -> Delivery:
        route = self._table.of(tx.envelope.rcpts[0])
        deadline = asyncio.get_running_loop().time() + self._settings.deliver_timeout_s
        try:
            lease = route.idle() or await route.lease(deadline)
            is_reused = lease.connection.is_reused
            outcome = await self._transfer_on(lease, tx, content, deadline)
            if outcome.is_used_up and is_reused:
                lease = await route.lease(deadline, fresh=True)
                outcome = await self._transfer_on(lease, tx, content, deadline)
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

    async def _transfer_on(self, lease: Lease, tx: Transaction, content: Content, deadline: float) -> Outcome:
        """One attempt on one connection, which is given back whatever happens."""
        started = self._clock.monotonic()
        connection = lease.connection
        offered = connection.capabilities
        if tx.envelope.smtputf8 and not offered.smtputf8:
            # It was offered at RCPT. Now it is known to be gone, and the client's next attempt will be refused there.
            lease.give_back(After.REUSE)
            return Outcome(DOWNSTREAM_TROUBLE, error="smtputf8")
        try:
            transfer = Transfer(
                mail_command(tx.envelope, offered, content.size_bytes),
                [rcpt_command(rcpt, offered) for rcpt in tx.envelope.rcpts],
                pipelining=offered.pipelining,
            )
            step: Send | StartContent | Outcome = transfer.begin()
            while isinstance(step, Send):
                replies = await connection.exchange(step.data, step.replies, self._reply_deadline(deadline))
                if len(replies) == step.replies:
                    step = transfer.advance(replies)
                else:
                    step = transfer.interrupted(replies, connection.trouble)
            last, early = END_OF_CONTENT, list[ServerReply]()
            if step is StartContent.NOW:
                if content.size_bytes <= _ONE_WRITE_BYTES:
                    last = whole(content)
                else:
                    early = await self._stream(connection, content, deadline)
                if connection.trouble:
                    step = transfer.interrupted(early, connection.trouble)
        except BaseException:
            # No dot was written, so nothing was delivered, and nothing will be.
            lease.give_back(After.CLOSE)
            raise
        if isinstance(step, Outcome):
            lease.give_back(step.after)
            return step
        # From here to the write nothing waits, and behind it nothing is taken back.
        dot_at = self._clock.monotonic()
        lease.route.metrics.deliver_s.observe(dot_at - started)
        connection.transactions += 1
        transfer.dot_sent()
        final_deadline = asyncio.get_running_loop().time() + self._settings.final_timeout_s
        try:
            replies = await connection.exchange(last, 1, final_deadline)
        except asyncio.CancelledError:
            self._adopt(lease, transfer, tx)
            raise
        outcome = _final(lease, transfer, replies)
        lease.route.metrics.final_s.observe(self._clock.monotonic() - dot_at)
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

    def _adopt(self, lease: Lease, transfer: Transfer, tx: Transaction) -> None:
        """Wait for the final reply in the caller's place.

        The downstream may be storing the message; cutting the connection meanwhile helps nobody (RFC 5321 4.1.1.10).
        """
        future = lease.connection.adopt()
        self._orphans.add(future)

        def ended(future: asyncio.Future[list[ServerReply]]) -> None:
            self._orphans.discard(future)
            outcome = _final(lease, transfer, future.result())
            self._note(lease.route, tx, outcome)
            if outcome.stored:
                lease.route.metrics.errors["orphan"].inc()
            self._log.info(
                "relay.orphaned",
                route=lease.route.name,
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
            self._cache.forget(route.name, str(tx.envelope.rcpts[refused.position].mailbox))
        if outcome.error and outcome.error != "refused":
            self._failed(route, "deliver", outcome.error, tx=tx.id, session=tx.session.id)

    def _failed(self, route: Route, step: str, error: str, **keys: str) -> None:
        route.metrics.errors[error].inc()
        self._log.warning("relay.failed", route=route.name, step=step, error=error, **keys)

    def _reply_deadline(self, deadline: float) -> float:
        reply_deadline = asyncio.get_running_loop().time() + self._settings.reply_timeout_s
        return min(deadline, reply_deadline)


def _final(lease: Lease, transfer: Transfer, replies: list[ServerReply]) -> Outcome:
    """The outcome of what followed the dot; the connection is given back."""
    step = transfer.advance(replies) if replies else transfer.interrupted(replies, lease.connection.trouble)
    assert isinstance(step, Outcome)
    lease.give_back(step.after)
    return step
