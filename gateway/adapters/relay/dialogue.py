"""The two dialogues on one connection: asking about recipients, and a whole transaction.

What is said is gateway.smtp.client's matter; here is how long it may take, which bytes leave together, and that the
connection is given back whatever happens. A delivery whose caller is cancelled behind the dot goes on as an orphan.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import cached_property

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.outgoing import pieces, whole
from gateway.adapters.relay.settings import RelaySettings
from gateway.relaying import Content
from gateway.services import Clock
from gateway.session import Envelope, Recipient, Session, Transaction
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
    xforward_commands,
)
from gateway.smtp.reply import DOWNSTREAM_TROUBLE, ROUTE_NO_SMTPUTF8

# Content up to this size goes out in one write with its dot; DESIGN.md section 8: blocks of at most 64 KiB.
_ONE_WRITE_BYTES = 64 * 1024


class Dialogues:
    """Runs them. `orphaned` is called with the outcome of a delivery whose caller has gone.

    Where nothing came back on a connection that had been idle, the outcome is used up, and `Connection.trouble` says
    whether it had ended ("closed") or hung ("timeout").
    """

    def __init__(
        self,
        settings: RelaySettings,
        clock: Clock,
        orphaned: Callable[[Connection, Transaction, Outcome], None],
    ) -> None:
        self._connect_timeout_s = settings.connect_timeout_s
        self._reply_timeout_s = settings.reply_timeout_s
        self._final_timeout_s = settings.final_timeout_s
        self._drain_timeout_s = settings.drain_timeout_s
        # how much longer than the deadline content may take that keeps moving
        self._moving_s = settings.deliver_moving_timeout_s - settings.deliver_timeout_s
        self._clock = clock
        self._orphaned = orphaned
        # final replies that nobody waits for any more
        self._orphans: set[asyncio.Future[list[ServerReply]]] = set()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The one loop that it serves, asked for once: to find it takes a system call each time."""
        return asyncio.get_running_loop()

    async def drain(self) -> None:
        """Wait for the orphans, at most `drain_timeout_s`."""
        if self._orphans:
            await asyncio.wait(self._orphans, timeout=self._drain_timeout_s)

    # --- asking ----------------------------------------------------------------------------------

    async def verify(
        self,
        connection: Connection,
        session: Session,
        envelope: Envelope,
        rcpts: Sequence[Recipient],
        deadline: float,
    ) -> Verified:
        """Ask about these recipients in one transaction. Raises ValueError for an envelope that cannot be written."""
        host, offered = connection.host, connection.capabilities
        if envelope.smtputf8 and not offered.smtputf8:
            # Its EHLO has just said so: the route is known not to take it.
            host.pool.release(connection)
            return Verified.all(ROUTE_NO_SMTPUTF8, len(rcpts))
        try:
            dialogue = Verification(
                mail_command(envelope, offered, envelope.size_hint),
                [rcpt_command(rcpt, offered) for rcpt in rcpts],
                pipelining=offered.pipelining,
                before=xforward_commands(session, session.id, offered.xforward) if host.is_forwarding else (),
            )
            step: Send | Verified = dialogue.begin()
            is_first = True
            while isinstance(step, Send):
                replies = await self._exchange(connection, step, deadline, is_first=is_first)
                if len(replies) == step.replies:
                    step = dialogue.advance(replies)
                else:
                    step = dialogue.interrupted(replies, _trouble(connection, replies, is_first=is_first))
                is_first = False
        except BaseException:
            host.pool.discard(connection)
            raise
        connection.verifications += 1
        connection.refusals += step.refusals
        host.pool.give_back(connection, step.after)
        return step

    # --- a transaction ---------------------------------------------------------------------------

    async def transfer(
        self, connection: Connection, tx: Transaction, content: Content, size_bytes: int, deadline: float
    ) -> Outcome:
        """Hand the transaction over. Raises OSError and ValueError for what cannot be read or written."""
        clock = self._clock
        started = clock.monotonic()
        envelope, host, offered = tx.envelope, connection.host, connection.capabilities
        if envelope.smtputf8 and not offered.smtputf8:
            # It was offered at RCPT. Now it is known to be gone, and the client's next attempt will be refused there.
            host.pool.release(connection)
            return Outcome(DOWNSTREAM_TROUBLE, error="smtputf8")
        connection.dot_at = 0.0
        before: Sequence[bytes] = ()
        replies: list[ServerReply] | None = None
        try:
            if host.is_forwarding:
                before = xforward_commands(tx.session, tx.id, offered.xforward)
            if offered.pipelining and size_bytes <= _ONE_WRITE_BYTES:
                first, patient = self._reply_deadlines(connection.is_reused, deadline)
                replies = await connection.transact(
                    transaction_commands(envelope, offered, size_bytes, b"".join(before)),
                    len(before) + len(envelope.rcpts) + 2,
                    whole(content),
                    first,
                    patient,
                    final_s=self._final_timeout_s,
                    clock=clock,
                )
            if not connection.dot_at or replies is None:
                dialogue = Transfer(
                    mail_command(envelope, offered, size_bytes),
                    [rcpt_command(rcpt, offered) for rcpt in envelope.rcpts],
                    pipelining=offered.pipelining,
                    before=before,
                )
                step = await self._up_to_the_dot(
                    connection, dialogue, len(before), content, size_bytes, replies, deadline
                )
                if isinstance(step, Outcome):
                    host.pool.give_back(connection, step.after)
                    return step
                # From here to the write nothing waits, and behind it nothing is taken back.
                replies = await connection.end_content(step, final_s=self._final_timeout_s, clock=clock)
        except BaseException:
            if connection.dot_at:
                self._adopt(connection, tx, started)
            else:
                # No dot was written, so nothing was delivered, and nothing will be.
                host.pool.discard(connection)
            raise
        host.metrics.final_s.observe(clock.monotonic() - connection.dot_at, tx.id)
        return _ended(connection, replies, started, tx.id)

    async def _up_to_the_dot(
        self,
        connection: Connection,
        dialogue: Transfer,
        mail_at: int,
        content: Content,
        size_bytes: int,
        early: list[ServerReply] | None,
        deadline: float,
    ) -> Outcome | bytes:
        """Any dialogue up to the last write of the content, whose bytes with the dot are returned.

        `early` are the replies to the pipelined commands where these were sent already; the reply to MAIL is that with
        the number `mail_at`.
        """
        known: list[ServerReply] = []
        step: Send | StartContent | Outcome = dialogue.begin()
        while isinstance(step, Send):
            is_first = not known
            replies = early
            if replies is None:
                replies = await self._exchange(connection, step, deadline, is_first=is_first)
            early = None
            known += replies
            if len(replies) == step.replies:
                step = dialogue.advance(replies)
            else:
                step = dialogue.interrupted(replies, _trouble(connection, replies, is_first=is_first))
        if isinstance(step, Outcome):
            connection.refusals += sum(reply.is_refusal for reply in known)
            if len(known) > mail_at and known[mail_at].is_refusal:
                # Where the sender is refused, so is everybody behind it (503), and nobody for his own sake.
                return step._replace(refused=())
            return step
        last, unasked = END_OF_CONTENT, list[ServerReply]()
        if size_bytes <= _ONE_WRITE_BYTES:
            last = whole(content)
        else:
            unasked = await self._stream(connection, content, deadline)
        return dialogue.interrupted(unasked, connection.trouble) if connection.trouble else last

    async def _stream(self, connection: Connection, content: Content, deadline: float) -> list[ServerReply]:
        """Write large content; the dot is not part of it. Returns what the downstream said meanwhile: trouble."""
        return await connection.stream(
            pieces(content),
            deadline=deadline,
            stall_s=self._reply_timeout_s,
            last_deadline=deadline + self._moving_s,
        )

    def _adopt(self, connection: Connection, tx: Transaction, started: float) -> None:
        """Wait for the final reply in the caller's place.

        The downstream may be storing the message; cutting the connection meanwhile helps nobody (RFC 5321 4.1.1.10).
        """
        future = connection.adopt()
        self._orphans.add(future)

        def ended(future: asyncio.Future[list[ServerReply]]) -> None:
            self._orphans.discard(future)
            self._orphaned(connection, tx, _ended(connection, future.result(), started, tx.id))

        future.add_done_callback(ended)

    # --- both ------------------------------------------------------------------------------------

    def _exchange(
        self, connection: Connection, step: Send, deadline: float, *, is_first: bool
    ) -> asyncio.Future[list[ServerReply]]:
        first, patient = self._reply_deadlines(is_first and connection.is_reused, deadline)
        return connection.exchange(step.data, step.replies, first, patient)

    def _reply_deadlines(self, is_reused: bool, deadline: float) -> tuple[float, float]:  # noqa: FBT001  # hot path
        """When the first reply is due, and when all of them are.

        On a connection that had been idle the first one comes soon, or never.
        """
        now = self._loop.time()
        patient = min(deadline, now + self._reply_timeout_s)
        return min(patient, now + self._connect_timeout_s) if is_reused else patient, patient


def _trouble(connection: Connection, replies: Sequence[ServerReply], *, is_first: bool) -> str:
    """What a dialogue that was interrupted is told: a connection that hung when it was reused had as good as ended."""
    is_dead = is_first and not replies and connection.is_reused and connection.trouble == "timeout"
    return "closed" if is_dead else connection.trouble


def _ended(connection: Connection, replies: list[ServerReply], started: float, tx_id: str) -> Outcome:
    """The outcome of what followed the dot; the connection is given back."""
    host = connection.host
    host.metrics.deliver_s.observe(connection.dot_at - started, tx_id)
    connection.transactions += 1
    outcome = final_outcome(replies)
    if outcome.after is After.REUSE:
        host.pool.release(connection)
    else:
        host.pool.discard(connection)
    return outcome
