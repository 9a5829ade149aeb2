"""One SMTP session as an object: connect, ehlo, mail, rcpt, content, eom -> what to answer; drives pipeline and relay.

No sockets here, and no protocol: the listener owns both and calls these methods in the order of the dialogue. What
is refused is answered with a reply of the table in smtp/reply.py, of a policy's verdict, or of the downstream.

The promises kept here: 250 for content only as the downstream's own 2xx; trouble of ours is 4xx; a verdict of
CONNECT, EHLO or MAIL is held and given at each RCPT, so that the log has the recipient; one INFO line for each
finished transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, NamedTuple

from gateway.decision import Decision, RcptAnswer
from gateway.lookup import TRAIL
from gateway.mail.authres import forged, format_results, own_ids
from gateway.mail.body import Body, Spool, SpoolError
from gateway.mail.digest import BodyDigests
from gateway.mail.message import (
    EditedContent,
    HeaderError,
    HeaderReader,
    Message,
    apply_edits,
    edited_header,
    split_edits,
)
from gateway.mail.trace import missing_fields, received, with_protocol
from gateway.pipeline import POLICY_FAILED, PROCEED, Decided
from gateway.policy import Outcome
from gateway.session import (
    AddressSource,
    Envelope,
    Recipient,
    Role,
    Session,
    TlsInfo,
    Transaction,
    Trust,
    unmapped,
)
from gateway.smtp import reply
from gateway.smtp.command import Extension
from gateway.smtp.content import Fault
from gateway.smtp.reply import Reply
from gateway.smtp.server import Extensions
from gateway.verdict import Action, AddField, AuthResult, HeaderEdit, Result, Stage, Verdict

if TYPE_CHECKING:
    from gateway.authentication import Authenticator
    from gateway.decision import DecisionRing
    from gateway.pipeline import Group, Pipeline, Trail
    from gateway.relaying import Delivery, Offer, Relay
    from gateway.services import Counter, Counters, Services
    from gateway.smtp.sasl import Credentials
    from gateway.watching import Watching

# Of the 20 s of the RCPT stage (DESIGN.md section 8)
_VERIFY_RESERVE_S = 5.0
# What the log shows of a transaction's recipients; the count is always complete
_LOGGED_RCPTS = 5
# RFC 3463 3.2: the mailbox does not exist (bad mailbox, mailbox moved, null MX)
UNKNOWN_RECIPIENT = frozenset({"5.1.1", "5.1.6", "5.1.10"})


@dataclass(frozen=True, slots=True)
class GatekeeperSettings:
    """What the operator decides about messages; sizes in octets, see docs/configure.md.

    `quarantine_header` is the field that a quarantined message gets, and no other one keeps; `quarantine_route` the
    route that it goes to, "" for its recipients' own. `authserv_id` "" is the host name; Authentication-Results of it
    and of its aliases are removed where they come in.

    `role` submission: the mail of users who have authenticated. It gets no Authentication-Results, which would tell the
    world what is ours only, and with `adds_missing_fields` a Date and a Message-ID where it has none (RFC 6409 8).
    """

    hostname: str
    max_message_bytes: int = 52_428_800
    max_header_bytes: int = 262_144
    max_header_fields: int = 1000
    max_received: int = 100
    trusted_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    delay_reject: bool = True
    quarantine_header: str = "X-Mxgate-Quarantine"
    quarantine_route: str = ""
    authserv_id: str = ""
    authserv_id_aliases: tuple[str, ...] = ()
    role: Role = Role.MX
    adds_missing_fields: bool = False


class Answer(NamedTuple):
    """A reply, and whether the connection ends behind it."""

    reply: Reply
    close: bool = False


class RcptAnswers(NamedTuple):
    """One reply for each recipient; `unknown` of them do not exist."""

    replies: tuple[Reply, ...]
    unknown: int = 0
    close: bool = False


# A member that is asked of its class costs ten times what a name of the module does.
_CONTINUE, _QUARANTINE = Action.CONTINUE, Action.QUARANTINE
_UNTRUSTED, _SOCKET = Trust.UNTRUSTED, AddressSource.SOCKET
_RCPT, _EOM = Stage.RCPT, Stage.EOM
_MX = Role.MX
_SENDER_OK = Answer(reply.SENDER_OK)
_DONE = {
    Action.CONTINUE: "accepted",
    Action.QUARANTINE: "quarantined",
    Action.DEFER: "deferred",
    Action.REJECT: "rejected",
}
# A policy chooses its reasons: one that makes them up would fill the memory of who counts them.
_MAX_REASONS = 500
_SIZES = tuple(1024 * 4**power for power in range(9))  # 1 KiB to 64 MiB
# Labels of mxgate_auth_results_total
_METHODS, _OTHER = ("spf", "dkim", "arc", "dmarc"), "other"


class _ByReason(dict[tuple[str, str, str], "Counter"]):
    """Counters by action, policy and reason, bound when first seen; too many reasons are counted together."""

    def __init__(self, counters: Counters, role: Role) -> None:
        self._counters = counters
        self._role = role

    def __missing__(self, key: tuple[str, str, str]) -> Counter:
        if len(self) < _MAX_REASONS:
            counter = self[key] = self._counters.labels(*key, self._role)
            return counter
        action, policy, _ = key
        return self._counters.labels(action, policy, _OTHER, self._role)


class Gatekeeper:
    """What all sessions of a worker share; makes a Conversation for each of them.

    `decisions` gets a record of each finished transaction. `new_digests` makes those of a message: a replay, which has
    no body, brings recorded ones. `authenticator` is there where the role is submission.
    """

    def __init__(
        self,
        settings: GatekeeperSettings,
        pipeline: Pipeline,
        relay: Relay,
        spool: Spool,
        services: Services,
        new_id: Callable[[], str],
        decisions: DecisionRing | None = None,
        authenticator: Authenticator | None = None,
    ) -> None:
        self.authenticator = authenticator
        self.settings = settings
        self.pipeline = pipeline
        self.relay = relay
        self.spool = spool
        self.services = services
        self.new_id = new_id
        self.decisions = decisions
        self.new_digests: Callable[[], BodyDigests] = BodyDigests
        self.authserv_id = settings.authserv_id or settings.hostname
        self.own_ids = own_ids(self.authserv_id, *settings.authserv_id_aliases)
        # fields that nobody but us may have written
        ours = (settings.quarantine_header.lower().encode("ascii"), b"received-spf")
        self.removed = pipeline.own_fields.union(ours)
        self.transactions = _ByReason(
            services.metrics.counters(
                "mxgate_transactions_total",
                "Finished transactions by what became of the message, and who decided it and why; aborted: the "
                "client gave it up; one whose recipients were all refused is what the last of them was answered",
                ("action", "policy", "reason", "role"),
            ),
            settings.role,
        )
        self.recipients = _ByReason(
            services.metrics.counters(
                "mxgate_recipients_total",
                "Recipients by what they were answered, and who decided it and why",
                ("action", "policy", "reason", "role"),
            ),
            settings.role,
        )
        # there from the start: most mail is like this, and who waits for a first failure must see it come
        self.transactions["accepted", "", ""].inc(0)
        self.transactions["deferred", "", "spool"].inc(0)
        self.transactions["aborted", "", "client"].inc(0)
        self.recipients["accepted", "", "downstream"].inc(0)
        self.content_bytes = services.metrics.counters(
            "mxgate_content_bytes_total", "Octets of content that was delivered"
        ).labels()
        self.size = services.metrics.histograms(
            "mxgate_message_size_bytes", "Octets of each message that was delivered", (), _SIZES
        ).labels()
        durations = services.metrics.histograms(
            "mxgate_transaction_duration_seconds",
            "Seconds from MAIL to the final reply, by what became of the message",
            ("action",),
        )
        self.duration = {a: durations.labels(a) for a in _DONE.values()}
        found = services.metrics.counters(
            "mxgate_auth_results_total",
            "Authentication results of transactions, as Authentication-Results has them; each signature counts",
            ("method", "result"),
        )
        self.auth_results = {m: {r: found.labels(m, r) for r in Result} for m in (*_METHODS, _OTHER)}

        self._offer = relay.offer()
        self._extensions = self._announce(self._offer)

    def open(
        self,
        client: IPv4Address | IPv6Address,
        port: int,
        tls: TlsInfo | None = None,
        source: AddressSource = _SOCKET,
    ) -> Conversation:
        """A new session of this client, whose address became known by `source`."""
        client = unmapped(client)
        networks = self.settings.trusted_networks
        trusted = networks and any(client in network for network in networks)
        trust = Trust.TRUSTED if trusted else _UNTRUSTED
        role = self.settings.role
        return Conversation(
            self, Session(self.new_id(), client, port, "", False, tls, trust, source, None, role)
        )

    def extensions(self) -> Extensions:
        """What EHLO may announce now: DSN and SMTPUTF8 only when every downstream offers them (DESIGN.md section 6)."""
        offer = self.relay.offer()
        if offer is self._offer:
            return self._extensions
        self._offer, self._extensions = offer, self._announce(offer)
        return self._extensions

    def _announce(self, offer: Offer) -> Extensions:
        keywords = {Extension.SIZE}
        if offer.eightbitmime:
            keywords.add(Extension.EIGHT_BIT_MIME)
        if offer.smtputf8:
            keywords.add(Extension.SMTPUTF8)
        if offer.dsn:
            keywords.add(Extension.DSN)
        size = self.settings.max_message_bytes
        return Extensions(min(size, offer.size) if offer.size else size, frozenset(keywords))


@dataclass(slots=True)
class _Word:
    """What one recipient is answered, and why."""

    reply: Reply
    reason: str
    policy: str = ""
    close: bool = False


@dataclass(slots=True)
class _Open:
    """The open transaction as it grows."""

    tx: Transaction
    begun: float
    trail: Trail | None = None  # what policies said, where it is recorded
    answers: list[RcptAnswer] | None = None  # the same of all recipients
    route: str | None = None
    group: Group | None = None  # with the route, of the first accepted recipient
    accepted: list[Recipient] = field(default_factory=list)
    refused: list[tuple[Recipient, _Word]] = field(default_factory=list)
    edits: list[HeaderEdit] = field(default_factory=list)  # of the stages before EOM
    body: Body | None = None
    reader: HeaderReader | None = None
    watching: Watching | None = None
    trouble: Reply | None = None  # what the end of the content will be answered
    reason: str = ""
    error: str = ""
    is_behind: bool = False  # `tx` does not have all that was learnt
    message: Message | None = None
    judged_at: float = 0.0  # the clock when the header was complete
    timings: tuple[tuple[str, float], ...] = ()

    def current(self) -> Transaction:
        """The transaction with everything that is known now: accepted recipients, the message."""
        tx = self.tx
        if self.is_behind:
            old = tx.envelope
            envelope = Envelope(
                old.mail_from,
                tuple(self.accepted),
                old.body_type,
                old.smtputf8,
                old.size_hint,
                old.dsn_ret,
                old.dsn_envid,
            )
            tx = self.tx = Transaction(tx.id, tx.session, envelope, self.message, tx.results, tx.notes)
            self.is_behind = False
        return tx


class Conversation:
    """One session. The listener calls one method at a time and gives the answer to the client."""

    __slots__ = ("_found", "_gate", "_held", "_open", "_outcome", "_trails", "_transactions", "session")

    def __init__(self, gate: Gatekeeper, session: Session) -> None:
        self._gate = gate
        self.session = session
        self._open: _Open | None = None
        self._held: dict[Stage, Decided] = {}
        self._found: dict[Stage, Verdict] = {}  # results and edits of CONNECT and EHLO, for each transaction
        self._trails: dict[Stage, Trail] = {}  # the same for the record of decisions
        self._outcome: tuple[Transaction, Outcome, Group] | None = None
        self._transactions = 0

    async def connect(self) -> Answer | None:
        """CONNECT: None to greet the client."""
        trail = self._new_trail(Stage.CONNECT)
        return self._hold(Stage.CONNECT, await self._gate.pipeline.connect(self.session, trail))

    async def ehlo(self, domain: str, *, esmtp: bool) -> Answer | None:
        """EHLO or HELO: None to go on."""
        self.greeted(domain, esmtp=esmtp)
        trail = self._new_trail(Stage.EHLO)
        return self._hold(Stage.EHLO, await self._gate.pipeline.ehlo(self.session, trail))

    def _new_trail(self, stage: Stage) -> Trail | None:
        if self._gate.decisions is None:
            return None
        trail = self._trails[stage] = []
        return trail

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        """`ehlo` where no policy is planned for it: nothing to wait for, nothing that could be refused."""
        old = self.session
        self.session = Session(
            old.id,
            old.client,
            old.port,
            domain,
            esmtp,
            old.tls,
            old.trust,
            old.address_source,
            old.user,
            old.role,
        )

    def tls_started(self, tls: TlsInfo) -> None:
        """The session continues under TLS; what was said before is forgotten (RFC 3207 4.2)."""
        self.session = replace(self.session, tls=tls, helo="", esmtp=False)
        self._held.pop(Stage.EHLO, None)
        self._found.pop(Stage.EHLO, None)
        self._trails.pop(Stage.EHLO, None)

    async def authenticate(self, credentials: Credentials) -> Answer:
        """AUTH: 235 when the client is who it says, which it is from then on."""
        gate = self._gate
        assert gate.authenticator is not None
        judged = await gate.authenticator.judge(credentials, self.session)
        if judged.user is not None:
            self.session = replace(self.session, trust=Trust.AUTHENTICATED, user=judged.user)
            # what was held against a stranger by those who say nothing about users
            for stage, decided in list(self._held.items()):
                left = [each for each in decided.refusals if each[0] not in gate.pipeline.spare_users]
                if left:
                    self._held[stage] = replace(decided, refusals=tuple(left))
                else:
                    del self._held[stage]
        return Answer(judged.reply, judged.close)

    async def mail(self, envelope: Envelope) -> Answer:
        """MAIL: the transaction is born."""
        open_ = self.begin(envelope)
        tx = open_.tx
        decided = await self._gate.pipeline.mail(tx, open_.trail)
        verdict = decided.verdict
        if verdict.results:
            open_.tx = tx.with_results(_settled(tx.results + verdict.results))
        open_.edits += verdict.edits
        refusal = self._hold(Stage.MAIL, decided)
        if refusal is None:
            return _SENDER_OK
        self._open = None
        word = _Word(refusal.reply, verdict.reason, decided.policy, refusal.close)
        return self._finish(open_, word, stage=Stage.MAIL)

    def begin(self, envelope: Envelope) -> _Open:
        """`mail` where no policy is planned for it."""
        self._transactions += 1
        # RFC 5321 4.4: the id in Received is an Atom, which has no dot
        tx_id = f"{self.session.id}-{self._transactions}"
        begun = self._gate.services.clock.monotonic()
        if not self._found:
            self._open = open_ = _Open(Transaction(tx_id, self.session, envelope), begun)
        else:
            found = self._found.values()
            results = _settled(tuple([result for verdict in found for result in verdict.results]))
            tx = Transaction(tx_id, self.session, envelope, results=results)
            edits = [edit for verdict in found for edit in verdict.edits]
            self._open = open_ = _Open(tx, begun, edits=edits)
        if self._gate.decisions is not None:
            open_.trail = [judged for said in self._trails.values() for judged in said]
            open_.answers = []
        return open_

    async def rcpt(self, rcpts: Sequence[Recipient]) -> RcptAnswers:
        """RCPTs that came together: policies, the downstream's word on those that are left, policies again."""
        open_ = self._open
        assert open_ is not None
        gate = self._gate
        asked: list[Recipient] = []
        words: list[_Word | None] = []
        last = gate.pipeline.rcpt_deadline()
        # a policy that hangs takes no time from the downstream's own word
        last_before = last - _VERIFY_RESERVE_S
        for rcpt in rcpts:
            word = await self._before(open_, rcpt, len(asked), last_before)
            words.append(word)
            if word is None:
                asked.append(rcpt)
        verify, envelope = gate.relay.verify, open_.tx.envelope
        downstream = iter(await verify(self.session, envelope, asked, last) if asked else ())
        replies = []
        unknown = 0
        close = False
        for rcpt, word in zip(rcpts, words, strict=True):
            if word is None:
                word = await self._after(open_, rcpt, next(downstream), last)  # noqa: PLW2901  # all said of this one
            answer = word.reply
            replies.append(answer)
            if open_.answers is not None:
                open_.answers.append(RcptAnswer(rcpt, answer, word.policy, word.reason))
            close = close or word.close
            if answer.is_positive:
                open_.accepted.append(rcpt)
                open_.is_behind = True
                gate.recipients["accepted", word.policy, word.reason].inc()
            else:
                open_.refused.append((rcpt, word))
                action = "deferred" if answer.is_transient else "rejected"
                gate.recipients[action, word.policy, word.reason].inc()
                unknown += answer.enhanced in UNKNOWN_RECIPIENT
        if not open_.accepted:
            open_.route = None  # only an accepted recipient binds the others to its route and group
        return RcptAnswers(tuple(replies), unknown, close)

    async def _before(self, open_: _Open, rcpt: Recipient, asked: int, last: float) -> _Word | None:
        """What is said of a recipient before the downstream is asked; None: it is to be asked, with `asked` others."""
        pipeline = self._gate.pipeline
        group = pipeline.group_of(rcpt.mailbox.domain)
        decided = self._held_refusal(group) if self._held else None
        if decided is None:
            decided = await pipeline.rcpt_before(open_.current(), rcpt, group, last, open_.trail)
        verdict = decided.verdict
        if verdict.reply is not None:
            return _Word(verdict.reply, verdict.reason, decided.policy, verdict.close)
        relay = self._gate.relay
        route = relay.route(rcpt.mailbox)
        if route is None:
            return _Word(reply.INTERNAL, "no_route")
        refusal = relay.refusal(route, open_.tx.envelope)
        if refusal is not None:
            return _Word(refusal, "route")
        if open_.route is None or open_.group is None:
            open_.route, open_.group = route, group
        elif route != open_.route:
            return _Word(reply.TOO_MANY_RECIPIENTS, "other_route")
        elif group.binds != open_.group.binds:
            return _Word(reply.TOO_MANY_RECIPIENTS, "other_group")
        most = relay.max_recipients(route)
        if apart := self._gate.settings.quarantine_route:
            # nobody knows yet whether the message goes there, and then it goes there as a whole
            most = min(filter(None, (most, relay.max_recipients(apart))), default=0)
        if 0 < most <= len(open_.accepted) + asked:
            return _Word(reply.TOO_MANY_RECIPIENTS, "route_recipients")
        return None

    async def _after(self, open_: _Open, rcpt: Recipient, answer: Reply, last: float) -> _Word:
        """What is said of a recipient after the downstream was asked."""
        pipeline = self._gate.pipeline
        if answer.is_positive and pipeline.plans_after_recipient:
            group = pipeline.group_of(rcpt.mailbox.domain)
            decided = await pipeline.rcpt_after(open_.current(), rcpt, group, last, open_.trail)
            verdict = decided.verdict
            if verdict.reply is not None:
                return _Word(verdict.reply, verdict.reason, decided.policy, verdict.close)
        return _Word(answer, "downstream")

    def begin_content(self, *, is_stuffed: bool) -> None:
        """DATA or the first BDAT."""
        open_ = self._open
        assert open_ is not None
        settings = self._gate.settings
        open_.body = self._gate.spool.new(is_stuffed=is_stuffed)
        open_.reader = HeaderReader(
            is_stuffed=is_stuffed, max_bytes=settings.max_header_bytes, max_fields=settings.max_header_fields
        )

    def content(self, block: bytes) -> None:
        """One block of content. What cannot be kept is dropped, and the end of the content is answered for it."""
        open_ = self._open
        assert open_ is not None
        if open_.trouble is not None:
            return
        body, reader = open_.body, open_.reader
        assert body is not None
        try:
            body.append(block)
            if reader is None:
                if open_.watching is not None:
                    open_.watching.feed(block)
            elif reader.feed(block):
                open_.reader = None
                self._header_complete(open_, reader)
        except SpoolError as exc:
            self._gate.services.log.error("spool.failed", tx=open_.tx.id, error=str(exc))
            self._drop_content(open_, reply.NO_SPACE, "spool", exc)
        except HeaderError as exc:
            self._drop_content(open_, reply.BAD_HEADER, "header", exc)

    def _header_complete(self, open_: _Open, reader: HeaderReader) -> None:
        assert open_.body is not None
        header = reader.finish()
        open_.message = Message(header, open_.body, self._gate.new_digests())
        open_.judged_at = self._gate.services.clock.now()
        open_.is_behind = True
        # RFC 5321 6.3: a message that passed so many hosts goes in a circle
        if header.has_more(b"received", self._gate.settings.max_received):
            self._drop_content(open_, reply.TOO_MANY_HOPS, "hops")
        elif self._gate.pipeline.plans_watches:
            self._watch(open_, open_.body, header.wire_bytes + len(b"\r\n"))

    def _watch(self, open_: _Open, body: Body, start: int) -> None:
        """Have the policies watch the body, which begins at octet `start` of the content."""
        pipeline = self._gate.pipeline
        watching = pipeline.watch(open_.current(), open_.group or pipeline.base, is_stuffed=body.is_stuffed)
        if watching is not None:
            for block in body.blocks(start) if start < body.size_bytes else ():
                watching.feed(block)
            open_.watching = watching

    @staticmethod
    def _drop_content(open_: _Open, answer: Reply, reason: str, error: object = "") -> None:
        assert open_.body is not None
        open_.trouble, open_.reason, open_.error = answer, reason, str(error)
        open_.watching = None
        open_.body.close()

    async def eom(self, fault: Fault | None) -> Answer:
        """The end of the content: judge the message, deliver it, answer. The transaction is over behind it."""
        open_ = self._open
        assert open_ is not None
        assert open_.body is not None
        try:
            answer = await self._eom(open_, fault)
        finally:
            open_.body.close()
        # it stays open when this was cancelled, since the client is gone: reset() accounts for it
        self._open = None
        return answer

    async def _eom(self, open_: _Open, fault: Fault | None) -> Answer:
        gate = self._gate
        if fault is not None:
            return self._finish(open_, _Word(fault.reply, fault.name.lower(), close=fault.closes))
        if open_.trouble is None and open_.reader is not None:
            try:
                self._header_complete(open_, open_.reader)
            except HeaderError as exc:
                self._drop_content(open_, reply.BAD_HEADER, "header", exc)
        if open_.trouble is not None:
            return self._finish(open_, _Word(open_.trouble, open_.reason))
        decided = await self._judge(open_) if gate.pipeline.plans_eom else PROCEED
        verdict = decided.verdict
        if verdict.reply is not None:
            return self._finish(open_, _Word(verdict.reply, verdict.reason, decided.policy, verdict.close))
        route = gate.settings.quarantine_route if verdict.action is _QUARANTINE else ""
        tx = open_.current()
        content = self._edited(tx, open_.edits, verdict)
        if gate.pipeline.plans_send:
            assert tx.message is not None
            signed = await gate.pipeline.send(
                tx, edited_header(tx.message, content), open_.group, open_.trail
            )
            last = signed.verdict
            if last.reply is not None:
                return self._finish(open_, _Word(last.reply, last.reason, signed.policy, last.close))
            content = content.below(split_edits(last.edits, smtputf8=tx.envelope.smtputf8)[0])
        begun = gate.services.clock.monotonic()
        try:
            delivery = await gate.relay.deliver(tx, content, route)
        except SpoolError as exc:  # the content cannot be read back; nothing was delivered
            gate.services.log.error("spool.failed", tx=tx.id, error=str(exc))
            open_.error = str(exc)
            return self._finish(open_, _Word(reply.INTERNAL, "spool"))
        open_.timings = (*open_.timings, ("delivery", gate.services.clock.monotonic() - begun))
        return self._delivered(open_, decided, delivery, route)

    async def _judge(self, open_: _Open) -> Decided:
        """The policies' word on the whole message."""
        gate, tx = self._gate, open_.current()
        clock = gate.services.clock
        begun = clock.monotonic()
        failed = None
        if open_.watching is not None:
            open_.watching.end()
            failed = open_.watching.failures
        group = open_.group or gate.pipeline.base
        decided = await gate.pipeline.eom(tx, group, open_.trail, failed)
        open_.timings = (("policies", clock.monotonic() - begun),)
        if decided.verdict.results:
            open_.tx = tx.with_results(_settled(tx.results + decided.verdict.results))
        return decided

    def _edited(self, tx: Transaction, early: Sequence[HeaderEdit], verdict: Verdict) -> EditedContent:
        """The message as it leaves: with our Authentication-Results, the edits of all stages and Received."""
        gate = self._gate
        assert tx.message is not None
        edits = (*early, *verdict.edits)
        added, removed = split_edits(edits, smtputf8=tx.envelope.smtputf8) if edits else ([], set())
        if verdict.action is _QUARANTINE:
            added.insert(0, AddField(gate.settings.quarantine_header, verdict.reason))
        above, now = b"", gate.services.clock.now()
        if gate.settings.role is _MX:
            results = format_results(gate.authserv_id, tx.results, smtputf8=tx.envelope.smtputf8)
            # RFC 8601 4, 5: the first of all, so that it stands above whatever anybody else says
            above = f"Authentication-Results: {results}\r\n".encode()
        trace = received(tx, gate.settings.hostname, now)
        if gate.settings.adds_missing_fields:
            trace += missing_fields(tx, gate.settings.hostname, now)
        return apply_edits(
            tx.message,
            added,
            removed | gate.removed,
            forged=forged(tx.message.header, gate.own_ids),
            above=above,
            trace=trace,
        )

    def _delivered(self, open_: _Open, decided: Decided, delivery: Delivery, route: str) -> Answer:
        """What the client is told of a delivery; `route` is that of the quarantine where it went there."""
        gate, verdict = self._gate, decided.verdict
        open_.route = route or open_.route
        if not delivery.stored:
            if route:
                # The sender's mail is not refused because the quarantine is, nor is the sender told of one.
                open_.error = f"{delivery.error}: {delivery.reply}"
                return self._finish(open_, _Word(reply.INTERNAL, "quarantine", decided.policy))
            # DESIGN.md section 1: 250 exists only as the downstream's; a relay that says otherwise is a defect
            answer = reply.INTERNAL if delivery.reply.is_positive else delivery.reply
            return self._finish(open_, _Word(answer, delivery.error))
        assert open_.body is not None
        gate.content_bytes.inc(open_.body.size_bytes)
        gate.size.observe(open_.body.size_bytes, open_.tx.id)
        # what a policy says that let the message pass is no reason of the whole; it stands with that policy's verdict
        reason = verdict.reason if decided.policy else ""
        return self._finish(
            open_,
            _Word(delivery.reply, reason, decided.policy),
            action=verdict.action,
            delivered=True,
        )

    def reset(self) -> None:
        """RSET, EHLO or the end of the session: the open transaction is given up."""
        open_, self._open = self._open, None
        if open_ is None:
            return
        if open_.body is not None:
            open_.body.close()
        gate = self._gate
        elapsed_s = gate.services.clock.monotonic() - open_.begun
        word, action = None, "aborted"
        if open_.refused and open_.body is None:
            # the client went away after refusals: they are the outcome, where nobody was accepted
            word = open_.refused[-1][1]
            if not open_.accepted:
                action = "deferred" if word.reply.is_transient else "rejected"
        gate.transactions[action, word.policy if word else "", word.reason if word else "client"].inc()
        if word is not None:
            self._log(open_, "transaction.refused", action, Stage.RCPT, word, elapsed_s)
        else:
            stage = Stage.EOM if open_.body is not None else _RCPT if open_.accepted else Stage.MAIL
            self._log(open_, "transaction.aborted", action, stage, None, elapsed_s)

    def outcome(self) -> Coroutine[None, None, None] | None:
        """What is to run after the last reply was written, None when nothing is: policies that want to know it."""
        told, self._outcome = self._outcome, None
        return self._gate.pipeline.outcome(*told) if told is not None else None

    def _hold(self, stage: Stage, decided: Decided) -> Answer | None:
        """Keep a refusal of an early stage for the recipients; an answer only where it is given at once."""
        answer = decided.verdict.reply
        if stage is not Stage.MAIL:
            self._found[stage] = decided.verdict
        if answer is None:
            self._held.pop(stage, None)
            return None
        if self._gate.settings.delay_reject and not decided.verdict.close:
            self._held[stage] = decided
            return None
        return Answer(answer, decided.verdict.close)

    def _held_refusal(self, group: Group) -> Decided | None:
        """The strictest refusal of an earlier stage, of those whose policy is enforced for this group."""
        held = [
            Decided(verdict, policy)
            for decided in self._held.values()
            for policy, verdict in decided.refusals
            if policy in group.enforced
        ]
        return max(held, key=lambda decided: decided.verdict.action) if held else None

    def _finish(
        self,
        open_: _Open,
        word: _Word,
        *,
        stage: Stage = Stage.EOM,
        action: Action = Action.CONTINUE,
        delivered: bool = False,
    ) -> Answer:
        """Account for the end of a transaction and log its one line."""
        gate, answer = self._gate, word.reply
        if not answer.is_positive:
            action = Action.DEFER if answer.is_transient else Action.REJECT
        done = _DONE[action]
        if gate.pipeline.plans_outcome:
            group = open_.group or gate.pipeline.base
            self._outcome = (open_.current(), Outcome(answer, delivered), group)
        gate.transactions[done, word.policy, word.reason].inc()
        elapsed_s = gate.services.clock.monotonic() - open_.begun
        gate.duration[done].observe(elapsed_s, open_.tx.id)
        self._log(open_, f"message.{done}", done, stage, word, elapsed_s, delivered=delivered)
        return Answer(answer, word.close)

    def _log(
        self,
        open_: _Open,
        event: str,
        action: str,
        stage: Stage,
        word: _Word | None,
        elapsed_s: float,
        *,
        delivered: bool = False,
    ) -> None:
        """The one line of a transaction, and its record; `word` is what decided it, None when the client went away."""
        if self._gate.decisions is not None:
            self._record(self._gate.decisions, open_, action, stage, word, elapsed_s, delivered=delivered)
        tx, session = open_.tx, self.session
        for each in tx.results:
            self._gate.auth_results.get(each.method, self._gate.auth_results[_OTHER])[each.result].inc()
        mail_from = tx.envelope.mail_from
        rcpts = open_.accepted or [rcpt for rcpt, _ in open_.refused]
        spent_s = dict(open_.timings)
        self._gate.services.log.info(
            event,
            session=session.id,
            tx=tx.id,
            stage=stage,
            policy=word.policy if word else "",
            action=action,
            reason=word.reason if word else "client",
            code=word.reply.code if word else 0,
            enhanced=word.reply.enhanced if word else "",
            text=word.reply.text if word else "",
            auth=" ".join([f"{each.method}={each.result}" for each in tx.results]),
            client=str(session.client),
            user=session.user or "",
            role=session.role,
            helo=session.helo,
            proto=with_protocol(session, tx.envelope),
            tls=session.tls.version if session.tls else "",
            trust=session.trust.value,
            mail_from=mail_from.text if mail_from is not None else "",
            rcpts=[rcpt.mailbox.text for rcpt in rcpts[:_LOGGED_RCPTS]],
            rcpt_count=len(open_.accepted),
            refused=[_refusal(rcpt, word) for rcpt, word in open_.refused[-_LOGGED_RCPTS:]],
            refused_count=len(open_.refused),
            observed=_observed(open_.trail) if open_.trail else "",
            route=open_.route or "",
            delivered=delivered,
            size_bytes=open_.body.size_bytes if open_.body is not None else 0,
            policies_ms=round(spent_s.get("policies", 0.0) * 1000, 1),
            delivery_ms=round(spent_s.get("delivery", 0.0) * 1000, 1),
            duration_ms=round(elapsed_s * 1000, 1),
            error=open_.error,
        )

    def _record(
        self,
        ring: DecisionRing,
        open_: _Open,
        action: str,
        stage: Stage,
        word: _Word | None,
        elapsed_s: float,
        *,
        delivered: bool,
    ) -> None:
        tx, message = open_.current(), open_.message
        now = self._gate.services.clock.now()
        ring.add(
            Decision(
                id=tx.id,
                time=now,
                session=tx.session,
                envelope=tx.envelope,
                rcpts=open_.answers or (),
                action=action,
                stage=stage,
                reply=word.reply if word else None,
                policy=word.policy if word else "",
                reason=word.reason if word else "client",
                duration_s=elapsed_s,
                judged=open_.trail or (),
                results=tx.results,
                delivered=delivered,
                error=open_.error,
                route=open_.route or "",
                header=message.header.octets if message else b"",
                size_bytes=open_.body.size_bytes if open_.body is not None else 0,
                digests=message.digests.finished if message else {},
                timings=open_.timings,
                dns=tuple(TRAIL.get(tx) or ()),  # what is still on its way for nobody comes too late
                judged_at=open_.judged_at or now,
                authserv_id=self._gate.authserv_id,
            )
        )


def _refusal(rcpt: Recipient, word: _Word) -> str:
    """What one recipient was answered and why, for the log; the address is last, since it may hold blanks."""
    answer = word.reply
    return f"{answer.code} {answer.enhanced} {word.policy or '-'} {word.reason} {rcpt.mailbox.text}"


def _observed(trail: Trail) -> str:
    """The strictest verdict of observed policies, where it is not to go on: policy, action, reason."""
    strictest = None
    for judged in trail:
        would_be = judged.would_be
        if would_be is not None and would_be.action > (strictest[1].action if strictest else _CONTINUE):
            strictest = judged.policy, would_be
    return f"{strictest[0]} {strictest[1].action.label} {strictest[1].reason}" if strictest else ""


def _settled(results: tuple[AuthResult, ...]) -> tuple[AuthResult, ...]:
    """A policy that failed has one result, and none for its failure where the check was made all the same."""
    if POLICY_FAILED not in [each.reason for each in results]:
        return results
    found = {each.method for each in results if each.reason is not POLICY_FAILED}
    return tuple(
        dict.fromkeys(
            [each for each in results if each.reason is not POLICY_FAILED or each.method not in found]
        )
    )
