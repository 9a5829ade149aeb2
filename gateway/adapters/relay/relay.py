"""SmtpRelay: the two operations of gateway.relaying.Relay over routes, hosts and their pools."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import NoReturn

from gateway.adapters.relay.cache import LateRefusals, RecipientCache
from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.dialogue import Dialogues
from gateway.adapters.relay.host import Host
from gateway.adapters.relay.opening import NoConnectionError
from gateway.adapters.relay.pool import refusals_left
from gateway.adapters.relay.route import Retry, Route, RouteTable
from gateway.adapters.relay.settings import RelaySettings
from gateway.relaying import Content, Delivery, Offer
from gateway.services import Clock, Instruments, Log, Metrics
from gateway.session import Envelope, Recipient, Session, Transaction
from gateway.smtp.address import Mailbox
from gateway.smtp.client import Outcome, Verified
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
# Some hundred octets each.
_MAX_LATE_REFUSALS = 10_000


class SmtpRelay:
    """Implements gateway.relaying.Relay. Raises RelaySettingsError for settings that cannot be used.

    `start` and `close` belong to the worker's life; between them the downstreams are asked what they offer, until each
    has answered once, and probed when they are not well.
    """

    def __init__(self, settings: RelaySettings, *, clock: Clock, log: Log, metrics: Metrics) -> None:
        self._settings = settings
        self._clock = clock
        self._log = log
        self._table = RouteTable(settings, Instruments(clock, log, metrics))
        self._dialogues = Dialogues(settings, clock, self._orphaned)
        self._cache = RecipientCache(
            clock,
            positive_s=settings.recipient_cache_s,
            negative_s=settings.recipient_cache_negative_s,
            max_entries=settings.recipient_cache_entries,
        )
        self._late = LateRefusals(clock, _MAX_LATE_REFUSALS)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to ask the downstreams what they offer; does not wait for them."""
        for host in self._table.hosts():
            host.start()

    async def close(self) -> None:
        """End everything; waits at most `drain_timeout_s` for replies to dots whose clients are gone."""
        for host in self._table.hosts():
            await host.stop()
        await self._dialogues.drain()
        for host in self._table.hosts():
            host.pool.abort()
        # the loop closes the sockets in its next turn
        await asyncio.sleep(0)

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

    def max_recipients(self, route: str) -> int:
        return self._table.routes[route].max_recipients

    def state(self) -> Mapping[str, object]:
        return {"routes": [route.state() for route in self._table.routes.values()]}

    # --- verify ----------------------------------------------------------------------------------

    async def verify(
        self, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], last: float = math.inf
    ) -> Sequence[Reply]:
        if not rcpts:
            return ()
        route = self._table.of_domain[rcpts[0].mailbox.domain] or _no_route(rcpts[0])
        replies: list[Reply] = []
        missing: list[int] = []
        # nearly always there are none
        late = self._late if self._late.entries else None
        for rcpt in rcpts:
            reply = None if late is None else late.of(session, envelope, rcpt)
            if reply is None:
                reply = (
                    self._cache.get(_key(route, session, rcpt)) if route.verify_recipients else RECIPIENT_OK
                )
            if reply is None:
                missing.append(len(replies))
            replies.append(reply or DOWNSTREAM_TROUBLE)
        if missing:
            # From here on it may suspend.
            now = self._loop.time()
            if last <= now:
                # no connection is taken, and perhaps broken, for what cannot be done any more
                return replies
            deadline = min(last, now + self._settings.verify_timeout_s)
            unknown = [rcpts[position] for position in missing]
            asked = await self._ask(route, session, envelope, unknown, deadline)
            for position, answer in zip(missing, asked, strict=True):
                replies[position] = answer
        return replies

    async def _ask(
        self, route: Route, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], deadline: float
    ) -> Sequence[Reply]:
        replies: list[Reply] = []
        try:
            while len(replies) < len(rcpts):
                rest = rcpts[len(replies) :]
                verified = await self._verify_some(route, session, envelope, rest, deadline)
                replies += verified.replies
                if verified.max_recipients:
                    route.teach(verified.max_recipients)
                if not verified.is_mail_refused:
                    for rcpt, reply in zip(rest, verified.replies, strict=False):
                        self._cache.put(_key(route, session, rcpt), reply)
        except NoConnectionError as trouble:
            self._not_connected(route, trouble, "verify", session=session.id)
        return (*replies, *[DOWNSTREAM_TROUBLE] * (len(rcpts) - len(replies)))

    async def _verify_some(
        self, route: Route, session: Session, envelope: Envelope, rcpts: Sequence[Recipient], deadline: float
    ) -> Verified:
        """Ask about the first of these, as many as a connection can be asked about."""
        started = self._clock.monotonic()
        verify = self._dialogues.verify
        connection = route.take(session) or await route.acquire(session, deadline)
        rcpts = rcpts[: min(_VERIFY_BATCH, refusals_left(connection))]
        try:
            verified = await verify(connection, session, envelope, rcpts, deadline)
            retry = Retry(route)
            while verified.is_used_up and retry.allows(connection):
                self._used_up(connection, verified.error, "verify", session=session.id)
                connection = await route.acquire(session, deadline, fresh=True, without=retry.without)
                verified = await verify(connection, session, envelope, rcpts, deadline)
        except ValueError as exc:
            # The envelope cannot be written: what made it is at fault.
            self._failed(connection.host, "verify", "internal", detail=repr(exc), session=session.id)
            return Verified.all(DOWNSTREAM_TROUBLE, len(rcpts))
        if verified.error:
            self._failed(connection.host, "verify", verified.error, session=session.id)
        connection.host.metrics.verify_s.observe(self._clock.monotonic() - started, session.id)
        return verified

    # --- deliver ---------------------------------------------------------------------------------

    async def deliver(self, tx: Transaction, content: Content, route: str = "") -> Delivery:
        if route:
            return await self._deliver(tx, content, self._table.routes[route], learn=False)
        first = tx.envelope.rcpts[0]
        own = self._table.of_domain[first.mailbox.domain] or _no_route(first)
        return await self._deliver(tx, content, own, learn=True)

    async def _deliver(self, tx: Transaction, content: Content, route: Route, *, learn: bool) -> Delivery:
        if route.is_lmtp and len(tx.envelope.rcpts) > 1:
            # RFC 2033 4.2: each would get a reply of its own behind the dot. `max_recipients` says so beforehand.
            self._failed(
                route.hosts[0], "deliver", "internal", detail="several recipients for LMTP", tx=tx.id
            )
            return Delivery(INTERNAL, stored=False, error="internal")
        size_bytes = content.size_bytes
        if size_bytes > route.max_size:
            # Its last EHLO has said so.
            return Delivery(ROUTE_TOO_BIG, stored=False, error="refused")
        deadline = self._loop.time() + self._settings.deliver_timeout_s
        try:
            connection = route.take(tx.session) or await route.acquire(tx.session, deadline)
        except NoConnectionError as trouble:
            return self._undelivered(route, trouble, tx)
        try:
            outcome = await self._dialogues.transfer(connection, tx, content, size_bytes, deadline)
            if outcome.is_used_up:
                connection, outcome = await self._transfer_again(
                    route, connection, outcome, tx, content, deadline
                )
        except NoConnectionError as trouble:
            return self._undelivered(route, trouble, tx)
        except (OSError, ValueError) as exc:
            # The content could not be read, or the envelope cannot be written.
            self._failed(
                connection.host, "deliver", "internal", detail=repr(exc), tx=tx.id, session=tx.session.id
            )
            return Delivery(INTERNAL, stored=False, error="internal")
        if outcome.error:
            self._note(connection, tx, outcome, learn=learn)
        return Delivery(outcome.reply, outcome.stored, outcome.error)

    async def _transfer_again(
        self,
        route: Route,
        connection: Connection,
        outcome: Outcome,
        tx: Transaction,
        content: Content,
        deadline: float,
    ) -> tuple[Connection, Outcome]:
        """The connection was used up before anything of the content was sent: others, while there are some to try."""
        retry = Retry(route)
        while outcome.is_used_up and retry.allows(connection):
            self._used_up(connection, outcome.error, "deliver", tx=tx.id, session=tx.session.id)
            connection = await route.acquire(tx.session, deadline, fresh=True, without=retry.without)
            outcome = await self._dialogues.transfer(connection, tx, content, content.size_bytes, deadline)
        return connection, outcome

    # --- what outcomes teach, and reports ----------------------------------------------------------

    def _note(self, connection: Connection, tx: Transaction, outcome: Outcome, *, learn: bool) -> None:
        """Late refusals are remembered, but for those of a route that is not the recipients' own.

        Trouble is counted and logged, refusals not.
        """
        route = self._table.routes[connection.host.route]
        if outcome.max_recipients:
            route.teach(outcome.max_recipients)
        # 421 is about the connection, whatever command it came to.
        for refused in outcome.refused if learn and not outcome.is_used_up else ():
            rcpt = tx.envelope.rcpts[refused.position]
            self._cache.forget(_key(route, tx.session, rcpt))
            # Where all are refused the client is told so, and nobody waits for anybody else.
            if outcome.error == "partial":
                self._late.add(tx.session, tx.envelope, rcpt, refused.reply)
        if outcome.error and outcome.error != "refused":
            self._failed(connection.host, "deliver", outcome.error, tx=tx.id, session=tx.session.id)

    def _orphaned(self, connection: Connection, tx: Transaction, outcome: Outcome) -> None:
        host = connection.host
        own = self._table.of_domain[tx.envelope.rcpts[0].mailbox.domain]
        self._note(connection, tx, outcome, learn=own is not None and own.name == host.route)
        if outcome.stored:
            host.metrics.errors["orphan"].inc()
        self._log.info(
            "relay.orphaned",
            route=host.route,
            host=host.name,
            session=tx.session.id,
            tx=tx.id,
            code=outcome.reply.code,
            enhanced=outcome.reply.enhanced,
        )

    def _undelivered(self, route: Route, trouble: NoConnectionError, tx: Transaction) -> Delivery:
        self._not_connected(route, trouble, "deliver", tx=tx.id, session=tx.session.id)
        return Delivery(DOWNSTREAM_TROUBLE, stored=False, error=trouble.error)

    def _used_up(self, connection: Connection, error: str, step: str, **keys: str) -> None:
        """Another connection takes the place of this one. That an idle one has ended is the course of things."""
        if connection.trouble == "timeout":
            self._failed(connection.host, step, "timeout", **keys)
        elif error and error != "refused" and not connection.is_reused:
            self._failed(connection.host, step, error, **keys)

    def _failed(self, host: Host, step: str, error: str, **keys: str) -> None:
        host.met(error)
        self._log.warning("relay.failed", route=host.route, host=host.name, step=step, error=error, **keys)

    def _not_connected(self, route: Route, trouble: NoConnectionError, step: str, **keys: str) -> None:
        """The hosts have counted it."""
        self._log.warning(
            "relay.failed",
            route=route.name,
            host=trouble.host,
            step=step,
            error=trouble.error,
            detail=str(trouble),
            **keys,
        )


def _no_route(rcpt: Recipient) -> NoReturn:
    raise LookupError(f"no route takes {rcpt.mailbox}")


def _key(route: Route, session: Session, rcpt: Recipient) -> Hashable:
    """What the cache knows a recipient by."""
    mailbox = rcpt.mailbox
    if route.is_personal:
        return route.name, mailbox.local, mailbox.domain, session.client, session.user
    return route.name, mailbox.local, mailbox.domain
