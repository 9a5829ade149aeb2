"""The receiving side of one SMTP session (RFC 5321) as a state machine: bytes in, calls of a Handler and replies out.

    server.receive(data)                      # calls the handler for what somebody else has to decide or do
    server.answer(reply); server.run()        # an answer that came later: go on with what is buffered
    transport.write(server.take_output())

`greeted`, `auth`, `mail`, `rcpt`, `content_begins`, `content_ends` and `starttls` of the handler need an answer, in
the call or later, and nothing further happens before it; `content`, `reset` and `closing` are told. All else (order,
syntax, NOOP, limits of errors and commands) is answered here. Replies gather until the driver takes them, so that a
pipelined group is answered in one write, in order (RFC 2920 3.2).

Extensions: PIPELINING (RFC 2920), SIZE (1870), 8BITMIME (6152), SMTPUTF8 (6531), ENHANCEDSTATUSCODES (2034),
CHUNKING (3030, without BINARYMIME), DSN (3461), STARTTLS (3207), LIMITS (9422). No socket, no clock: deadlines are
the driver's, by `phase`.

A server for submission (RFC 6409, 8314) wants TLS before all else and AUTH (RFC 4954) before MAIL; every other one does
not know AUTH at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from gateway.smtp import reply
from gateway.smtp.command import (
    BdatCommand,
    Command,
    CommandError,
    Extension,
    MailCommand,
    RcptCommand,
    SimpleCommand,
    Verb,
    parse_command,
)
from gateway.smtp.content import BdatDecoder, DataDecoder, Fault
from gateway.smtp.reply import Reply
from gateway.smtp.sasl import MAX_AUTH_LINE, Challenge, Credentials, Exchange, Mechanism, SaslError

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from gateway.session import Envelope, Recipient

# RFC 5321 4.5.3.1.4, and room for the parameters of MAIL and RCPT (RFC 1870 3, 3461 5, 6531 3.4)
MAX_LINE = 512
MAX_ENVELOPE_LINE = 2048
# RFC 5321 4.5.3.1.8 asks for pipelined RCPTs of any number; the relay asks for at most this many in one write
MAX_BATCH = 8
# What is kept of each recipient that was refused ends here: an honest list of this length comes in several transactions
MAX_REFUSED = 1000
# A message in pieces this small is no message: each costs a command, a reply and a look at all that is buffered
MAX_SMALL_CHUNKS = 1000
# RFC 4954 9 leaves the number to us: who mistypes has two more, who guesses comes again for each three
MAX_AUTH_FAILURES = 3
_SMALL_CHUNK = 512
_CR, _LF = b"\r\n"  # as numbers: `in` then is one memchr, and nothing else


@dataclass(frozen=True, eq=False, slots=True)  # by identity: the greeting is remembered for it
class ServerSettings:
    """What the operator decides about sessions. Sizes in octets; the meaning of each limit is in docs/configure.md."""

    hostname: str
    max_message_bytes: int = 52_428_800
    max_recipients: int = 200
    max_errors: int = 20
    max_commands_without_mail: int = 100
    max_unknown_recipients: int = 20
    max_line_bytes: int = 8192
    has_tls: bool = False
    is_submission: bool = False
    """TLS comes before all else, and AUTH before MAIL; only here there is AUTH."""
    has_recipient_groups: bool = False
    """Not every two recipients may stand in one transaction: those of other routes come in their own."""


@dataclass(frozen=True, eq=False, slots=True)  # likewise
class Extensions:
    """What EHLO announces beyond what is always there. `size` is the largest message in octets (RFC 1870)."""

    size: int
    keywords: frozenset[Extension]


class Phase(IntEnum):
    """What the session waits for; the driver's deadlines hang on it."""

    IDLE = auto()  # the next command
    COMMAND = auto()  # the rest of a command line
    CONTENT = auto()  # more content
    BUSY = auto()  # an answer of ours
    CLOSED = auto()


class Handler(Protocol):
    """Who decides about a session, and owns its socket.

    `content`, `reset` and `closing` are told and ask nothing: they must not answer, nor close the session.
    """

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        """EHLO or HELO. Answer with `greet`, or with `answer` to refuse."""

    def auth(self, credentials: Credentials) -> None:
        """The end of an exchange of AUTH. Answer with `answer_auth`: 235 when the client is who it says."""

    def mail(self, envelope: Envelope) -> None:
        """MAIL: a transaction wants to begin. Answer with `answer`."""

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        """RCPTs that arrived together, at most 8. Answer with `answer_rcpts`, one reply for each."""

    def content_begins(self, *, is_stuffed: bool) -> None:
        """DATA, or the first BDAT: content will come. Answer with `accept_content`, or with `answer` to refuse."""

    def content(self, block: bytes) -> None:
        """A piece of content in wire form that broke no rule so far."""

    def content_ends(self, fault: Fault | None) -> None:
        """The end of the content; `fault` says which rule it broke, if any. Answer with `answer`."""

    def starttls(self) -> None:
        """STARTTLS was accepted and its 220 is in the output. Answer with `tls_started` after the handshake."""

    def reset(self) -> None:
        """The open transaction was given up by the client."""

    def closing(self, reason: str) -> None:
        """The session is over: write the output and close. `reason` is a token for log and metric."""


class _Due(IntEnum):
    """The answer that is awaited."""

    NOTHING = 0
    GREETED = auto()
    AUTH = auto()
    MAIL = auto()
    RCPT = auto()
    CONTENT_BEGINS = auto()
    CONTENT_ENDS = auto()
    STARTTLS = auto()


class _State(IntEnum):  # an IntEnum hashes in C
    NEW = auto()  # the banner was not sent
    START = auto()  # no EHLO yet
    READY = auto()  # EHLO was given
    AUTH = auto()  # the client's next line is its response to a challenge
    MAIL = auto()
    RCPT = auto()  # at least one recipient is accepted
    DATA = auto()
    BDAT = auto()  # between chunks
    CHUNK = auto()  # within one
    SKIP = auto()  # within one that was refused
    TLS = auto()
    CLOSED = auto()


# To ask a class for its member costs ten times what a name of the module does, and these are asked for all the time.
(
    _STATE_NEW,
    _STATE_START,
    _STATE_READY,
    _STATE_AUTH,
    _STATE_MAIL,
    _STATE_RCPT,
    _STATE_DATA,
    _STATE_BDAT,
    _STATE_CHUNK,
    _STATE_SKIP,
    _STATE_TLS,
    _STATE_CLOSED,
) = _State
(
    _DUE_NOTHING,
    _DUE_GREETED,
    _DUE_AUTH,
    _DUE_MAIL,
    _DUE_RCPT,
    _DUE_CONTENT_BEGINS,
    _DUE_CONTENT_ENDS,
    _DUE_STARTTLS,
) = _Due
(_PHASE_IDLE, _PHASE_COMMAND, _PHASE_CONTENT, _PHASE_BUSY, _PHASE_CLOSED) = Phase
_VERB_EHLO, _VERB_HELO, _VERB_DATA, _VERB_QUIT = Verb.EHLO, Verb.HELO, Verb.DATA, Verb.QUIT
_VERB_RCPT = Verb.RCPT
_SENDER_OK = reply.SENDER_OK.wire

INVALID = "invalid"
"""What is counted for a line that is no command, or no good one."""

_CONTENT_STATES = frozenset({_STATE_DATA, _STATE_CHUNK, _STATE_SKIP})
_TRANSACTION_STATES = frozenset({_STATE_MAIL, _STATE_RCPT, _STATE_DATA, _STATE_BDAT, _STATE_CHUNK})
_COMMAND_STATES = frozenset({_STATE_START, _STATE_READY, _STATE_AUTH, _STATE_MAIL, _STATE_RCPT, _STATE_BDAT})
_SILENT_STATES = frozenset({_STATE_NEW, _STATE_TLS, _STATE_CLOSED})

# RFC 3207 4: what a server that requires TLS obeys before; HELO, the older EHLO, leads nowhere either
_BEFORE_TLS = frozenset({Verb.EHLO, Verb.HELO, Verb.NOOP, Verb.QUIT, Verb.STARTTLS})
# RFC 4954 4, 6: what wants authentication first
_BEHIND_AUTH = frozenset({Verb.MAIL, Verb.RCPT, Verb.DATA, Verb.BDAT})
_MECHANISMS = {mechanism.encode(): mechanism for mechanism in Mechanism}

_NOT_READY_FOR_CONTENT = {
    _STATE_START: reply.HELLO_FIRST,
    _STATE_READY: reply.MAIL_FIRST,
    _STATE_MAIL: reply.NO_RECIPIENTS,
}


class Server:
    """One session. `allow_bare_lf`: bare LF in this client's content become CRLF (the operator listed it).

    In `codes` each reply's code is counted, and in `commands` each command's verb, INVALID for what is no command; one
    that is not there yet has to count as 0.
    """

    __slots__ = (
        "_after_skip",
        "_allow_bare_lf",
        "_auth_failures",
        "_buffer",
        "_chunk_bytes",
        "_codes",
        "_commands",
        "_content",
        "_counted",
        "_due",
        "_errors",
        "_exchange",
        "_handler",
        "_is_last_chunk",
        "_is_locked",
        "_long_lines",
        "_offered",
        "_output",
        "_recipients",
        "_refused",
        "_settings",
        "_skip_reply",
        "_skipping_line",
        "_small_chunks",
        "_smtputf8",
        "_state",
        "_tls_active",
        "_unknown",
    )

    def __init__(
        self,
        settings: ServerSettings,
        handler: Handler,
        codes: MutableMapping[int, int],
        commands: MutableMapping[str, int],
        *,
        tls_active: bool = False,
        allow_bare_lf: bool = False,
    ) -> None:
        self._settings = settings
        self._handler = handler
        self._tls_active = tls_active
        self._allow_bare_lf = allow_bare_lf
        self._state = _STATE_NEW
        self._buffer = b""
        self._output = b""
        self._due = _DUE_NOTHING
        self._offered: frozenset[Extension] = frozenset()
        self._smtputf8 = False  # of the open transaction
        self._recipients = 0  # of the open transaction, accepted
        self._refused = 0  # of the open transaction
        self._content: DataDecoder | BdatDecoder | None = None
        self._chunk_bytes = 0
        self._small_chunks = 0  # of the open transaction
        self._is_last_chunk = False
        self._after_skip = _STATE_START
        self._skip_reply = reply.NO_RECIPIENTS
        self._is_locked = settings.is_submission  # until the client has authenticated
        self._exchange: Exchange | None = None
        self._auth_failures = 0
        self._errors = 0
        self._unknown = 0
        self._commands = 0
        self._long_lines = 0
        self._skipping_line = False
        self._codes = codes
        self._counted = commands

    # --- the driver's side ----------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the session waits for now."""
        if self._state is _STATE_CLOSED:
            return _PHASE_CLOSED
        if self._due or self._state in _SILENT_STATES:
            return _PHASE_BUSY
        if self._state in _CONTENT_STATES:
            return _PHASE_CONTENT
        return _PHASE_COMMAND if self._buffer or self._skipping_line else _PHASE_IDLE

    def receive(self, data: bytes) -> None:
        """Take what the client sent, and go on as far as that allows."""
        if self._state is not _STATE_CLOSED:
            self._buffer = self._buffer + data if self._buffer else data
            self.run()

    @property
    def buffered_bytes(self) -> int:
        """Octets that were received and not looked at: the driver stops reading when they become many."""
        return len(self._buffer)

    def take_output(self) -> bytes:
        """What is to be written now; empty when nothing is."""
        # RFC 2920 3.2: of one group the reply to MAIL may wait for that to RCPT, while more of it is in the buffer
        if self._due is _DUE_RCPT and self._buffer and self._output == _SENDER_OK:
            return b""
        output, self._output = self._output, b""
        return output

    def open(self, refusal: Reply | None = None) -> None:
        """Greet the client, or refuse it with this reply and close (RFC 5321 3.1)."""
        if refusal is not None:
            self.close("refused", refusal)
        elif self._buffer:
            # RFC 5321 3.1: a client waits for the greeting
            self.close("early_talker", reply.EARLY_TALKER)
        else:
            self._say(_banner(self._settings.hostname))
            self._state = _STATE_START

    def close(self, reason: str, final: Reply | None = None) -> None:
        """End the session, whatever is pending; `final` is said before. Later input is not looked at."""
        if self._state is _STATE_CLOSED:
            return
        if final is not None:
            self._say(final)
        self._state = _STATE_CLOSED
        self._buffer = b""
        self._due = _DUE_NOTHING
        self._handler.closing(reason)

    # --- answers --------------------------------------------------------------------------------------

    def greet(self, extensions: Extensions | None) -> None:
        """Answer `greeted`: go on, announcing this; None after HELO, where nothing can be (RFC 5321 4.1.1.1)."""
        assert self._due is _DUE_GREETED
        self._due = _DUE_NOTHING
        self._state = _STATE_READY
        self._codes[250] += 1
        if extensions is None:
            self._offered = frozenset()
            self._output += f"250 {self._settings.hostname}\r\n".encode("ascii")
        else:
            self._offered = extensions.keywords
            if self._settings.is_submission and self._tls_active:
                self._offered |= _AUTH
            self._output += _announcement(self._settings, extensions, tls_active=self._tls_active)
        if self._buffer:
            # RFC 2920 3.1: EHLO is the last of a group
            self.close("pipelining", reply.EARLY_TALKER)

    def answer(self, answer: Reply, *, close: bool = False) -> None:
        """Answer `mail` or `content_ends`, or refuse `greeted` or `content_begins`; `close`: and end the session."""
        due, self._due = self._due, _DUE_NOTHING
        if due is _DUE_MAIL:
            if answer.is_positive:
                self._state = _STATE_MAIL
                self._recipients = 0
                self._refused = 0
                self._small_chunks = 0
        elif due is _DUE_CONTENT_BEGINS:
            if self._state is _STATE_CHUNK:
                # RFC 3030 2: the octets are on their way whatever the reply is
                self._skip_chunk(answer, _STATE_RCPT)
                return
        elif due is _DUE_CONTENT_ENDS:
            self._state = _STATE_READY
            self._content = None
            if answer.is_positive:
                self._commands = 0
        else:
            assert due is _DUE_GREETED, due
        self._say(answer)
        if close:
            self.close("refused")
        elif answer.code >= 500 and due is not _DUE_CONTENT_ENDS:
            self._count_errors(1)

    def answer_auth(self, answer: Reply, *, close: bool = False) -> None:
        """Answer `auth`: 235 when the client is who it says; `close`: and end the session."""
        assert self._due is _DUE_AUTH
        self._due = _DUE_NOTHING
        if answer.is_positive:
            self._is_locked = False
        self._auth_failures += answer.is_permanent
        if close:
            self.close("auth_failures", answer)
        elif self._auth_failures >= MAX_AUTH_FAILURES:
            self._say(answer)
            self.close("auth_failures", reply.TOO_MANY_AUTH_FAILURES)
        else:
            self._refuse(answer)

    def answer_rcpts(self, answers: Sequence[Reply], *, unknown: int = 0, close: bool = False) -> None:
        """Answer `rcpt`; `unknown` of the recipients do not exist (they count towards a limit of their own)."""
        assert self._due is _DUE_RCPT
        self._due = _DUE_NOTHING
        errors = 0
        for answer in answers:
            if answer.code < 400:
                self._recipients += 1
                self._state = _STATE_RCPT
            else:
                self._refused += 1
                errors += answer.code >= 500
            self._say(answer)
        self._unknown += unknown
        if close:
            self.close("refused")
        elif self._unknown >= self._settings.max_unknown_recipients:
            self.close("unknown_recipients", reply.TOO_MANY_UNKNOWN)
        elif errors:
            self._count_errors(errors)

    def accept_content(self) -> None:
        """Answer `content_begins`: go on (RFC 5321 3.3)."""
        assert self._due is _DUE_CONTENT_BEGINS
        self._due = _DUE_NOTHING
        if self._state is _STATE_CHUNK:
            return
        self._content = DataDecoder(
            max_bytes=self._settings.max_message_bytes,
            max_line_bytes=self._settings.max_line_bytes,
            allow_bare_lf=self._allow_bare_lf,
        )
        self._state = _STATE_DATA
        if self._buffer:
            # RFC 2920 3.1: the content waits for 354
            self.close("pipelining", reply.EARLY_TALKER)
        else:
            self._say(reply.START_CONTENT)

    def tls_started(self) -> None:
        """Answer `starttls`: the handshake is done and nothing said before it counts (RFC 3207 4.2)."""
        assert self._due is _DUE_STARTTLS
        self._due = _DUE_NOTHING
        self._tls_active = True
        self._state = _STATE_START
        self._offered = frozenset()

    # --- the machine ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Go on with what is buffered, until more input or an answer is awaited."""
        while not self._due:
            if self._state in _COMMAND_STATES:
                if not self._buffer:
                    return
                line, crlf, rest = self._buffer.partition(b"\r\n")
                # the usual line at once: complete and of a usual length
                if crlf and len(line) <= MAX_LINE - 2 and not self._skipping_line:
                    self._buffer = rest
                    self._obey(line)
                elif (unusual := self._unusual_line()) is not None:
                    self._obey(unusual)
                else:
                    return
            elif self._state in _SILENT_STATES or not self._take_content():
                return

    def _take_content(self) -> bool:
        """Look at what is buffered as content; False when more is needed."""
        if self._state is _STATE_SKIP:
            count = min(len(self._buffer), self._chunk_bytes)
            self._buffer = self._buffer[count:]
            self._chunk_bytes -= count
            if self._chunk_bytes:
                return False
            self._state = self._after_skip
            self._refuse(self._skip_reply)
            return True
        content = self._content
        assert content is not None
        if not self._buffer and not content.is_complete:
            return False
        data, self._buffer = self._buffer, b""
        block, rest = content.feed(data)
        if block:
            self._handler.content(block)
        if rest is not None:
            self._buffer = rest
            self._end_content(content)
        elif content.is_hopeless:
            assert content.fault is not None
            self.close("content", content.fault.reply)
        return True

    def _end_content(self, content: DataDecoder | BdatDecoder) -> None:
        if isinstance(content, BdatDecoder):
            if not self._is_last_chunk and content.fault is None:
                self._say(Reply(250, "2.0.0", f"{self._chunk_bytes} octets received"))
                self._state = _STATE_BDAT
                return
            if end := content.finish():
                self._handler.content(end)
        self._due = _DUE_CONTENT_ENDS
        self._handler.content_ends(content.fault)

    def _unusual_line(self) -> bytes | None:
        """One command line without its CRLF; None while it is incomplete, or when the session was closed for it."""
        while True:
            buffer = self._buffer
            end = buffer.find(b"\n")
            if end < 0:
                if self._skipping_line:
                    self._buffer = buffer[-1:]  # it may be the CR of the end
                elif len(buffer) > MAX_ENVELOPE_LINE and (
                    len(buffer) >= MAX_AUTH_LINE or not self._is_of_auth(buffer)
                ):
                    self._buffer = buffer[-1:]
                    self._skipping_line = True
                    self._too_long()
                return None
            line = buffer[:end]
            self._buffer = buffer[end + 1 :]
            if line[-1:] != b"\r":
                self.close("line_end", reply.LINE_END)
                return None
            if self._skipping_line:
                self._skipping_line = False
                continue
            if self._is_of_auth(line):
                most = MAX_AUTH_LINE
            else:
                most = MAX_ENVELOPE_LINE if line[:4].upper() in (b"MAIL", b"RCPT") else MAX_LINE
            if end > most - 1:
                self._too_long()
                if self._state is _STATE_CLOSED:
                    return None
                continue
            return line[:-1]

    def _is_of_auth(self, line: bytes) -> bool:
        """Whether a line, or the beginning of one, is a response or the command AUTH: these may be long."""
        if not self._is_locked:
            return False
        return self._state is _STATE_AUTH or line[:5].upper() == b"AUTH "

    def _too_long(self) -> None:
        self._long_lines += 1
        if self._state is _STATE_AUTH:
            self._end_exchange()
            self._refuse(reply.AUTH_LINE_TOO_LONG)
        elif self._long_lines > 1:
            self.close("line_too_long", reply.LINE_TOO_LONG)
        else:
            self._refuse(reply.LINE_TOO_LONG)

    def _obey(self, line: bytes) -> None:
        if self._settings.is_submission and self._obey_auth(line):
            return
        try:
            command = parse_command(line, self._offered, self._smtputf8)
        except CommandError as exc:
            self._counted[INVALID] += 1
            # no command holds either; RFC 5321 2.3.8: only CRLF ends a line, and neither of them stands alone
            if _CR in line or _LF in line:
                self.close("line_end", reply.LINE_END)
            elif exc.close:
                self.close("protocol", exc.reply)
            else:
                self._refuse(exc.reply)
            return
        self._counted[command.verb] += 1
        if self._is_locked and (refusal := self._locked(command.verb)) is not None:
            if isinstance(command, BdatCommand):
                # RFC 3030 2: the octets are on their way whatever the reply is
                self._chunk_bytes = command.size_bytes
                self._skip_chunk(refusal, self._state)
            else:
                self._refuse(refusal)
            return
        _OBEY[type(command)](self, command)

    def _locked(self, verb: Verb) -> Reply | None:
        """The refusal of a command for which it is too early, None for others."""
        if not self._tls_active:
            return None if verb in _BEFORE_TLS else reply.STARTTLS_FIRST
        # without EHLO there is no AUTH either
        return reply.AUTH_FIRST if verb in _BEHIND_AUTH and self._state is _STATE_READY else None

    # --- AUTH: no line of it is remembered anywhere, nor in an error -------------------------------------

    def _obey_auth(self, line: bytes) -> bool:
        """Whether the line is a part of an exchange or begins one; then it was dealt with."""
        if self._state is _STATE_AUTH:
            assert self._exchange is not None
            self._advance(self._exchange.respond, line)
        elif line[:4].upper() == b"AUTH" and line[4:5] in (b"", b" "):
            self._auth(line[5:])
        else:
            return False
        return True

    def _auth(self, argument: bytes) -> None:
        """RFC 4954 4."""
        if self._is_only_talking():
            return
        word, space, initial = argument.rstrip(b" ").partition(b" ")
        mechanism = _MECHANISMS.get(word.upper())
        if not self._tls_active:
            self._refuse(reply.AUTH_NEEDS_TLS)
        elif not self._is_locked:
            self._refuse(reply.AUTH_ALREADY)
        elif Extension.AUTH not in self._offered:
            self._refuse(reply.EHLO_FIRST)
        elif mechanism is None:
            self._refuse(reply.AUTH_MECHANISM if word else reply.SYNTAX)
        else:
            self._exchange = exchange = Exchange(mechanism)
            self._advance(exchange.begin, initial if space else None)

    def _advance(self, take: Callable[[Any], Challenge | Credentials], said: bytes | None) -> None:
        """The next step of the exchange, with what the client said."""
        if self._buffer:
            # RFC 2920 3.1: a command of an extension is the last of a group, where that does not say otherwise
            self.close("pipelining", reply.EARLY_TALKER)
            return
        try:
            step = take(said)
        except SaslError as exc:
            self._end_exchange()
            self._refuse(exc.reply)
            return
        if isinstance(step, Challenge):
            self._state = _STATE_AUTH
            self._codes[334] += 1
            self._output += step.wire
            return
        self._end_exchange()
        self._due = _DUE_AUTH
        self._handler.auth(step)

    def _end_exchange(self) -> None:
        self._exchange = None
        self._state = _STATE_READY

    def _simple(self, command: SimpleCommand) -> None:
        verb = command.verb
        if verb is _VERB_DATA:
            self._data()
            return
        if self._is_only_talking():
            return
        if verb is _VERB_EHLO or verb is _VERB_HELO:
            self._greeting(command.argument, is_esmtp=verb is _VERB_EHLO)
        elif verb is _VERB_QUIT:
            self.close("quit", reply.BYE)
        elif verb is Verb.STARTTLS:
            self._starttls()
        elif verb is Verb.RSET:
            self._reset()
            self._say(reply.OK)
        elif verb is Verb.VRFY:
            self._say(reply.VRFY)
        elif verb is Verb.HELP:
            self._say(reply.HELP)
        else:
            self._say(reply.OK)

    def _greeting(self, domain: str, *, is_esmtp: bool) -> None:
        if self._buffer:
            # RFC 2920 3.1: EHLO is the last of a group
            self.close("pipelining", reply.EARLY_TALKER)
            return
        # RFC 5321 4.1.4: EHLO in a session clears the state as RSET does
        self._reset()
        self._due = _DUE_GREETED
        self._handler.greeted(domain, esmtp=is_esmtp)

    def _mail(self, command: MailCommand) -> None:
        if self._is_only_talking():
            return
        if self._state is _STATE_START:
            self._refuse(reply.HELLO_FIRST)
        elif self._state is not _STATE_READY:
            self._refuse(reply.NESTED_MAIL)
        elif command.envelope.size_hint > self._settings.max_message_bytes:
            # RFC 1870 6.1: what is announced as too big is refused before it is sent
            self._refuse(reply.TOO_BIG)
        else:
            self._smtputf8 = command.envelope.smtputf8
            self._due = _DUE_MAIL
            self._handler.mail(command.envelope)

    def _rcpt(self, command: RcptCommand) -> None:
        if self._state in (_STATE_START, _STATE_READY):
            self._refuse(reply.MAIL_FIRST)
            return
        if self._state is _STATE_BDAT:
            self._refuse(reply.RCPT_AFTER_BDAT)
            return
        room = self._settings.max_recipients - self._recipients
        if room <= 0 or self._refused >= MAX_REFUSED:
            # RFC 5321 4.5.3.1.10: the client sends to the others in another transaction
            if not self._is_only_talking():
                self._say(reply.TOO_MANY_RECIPIENTS)
            return
        rcpts = [command.rcpt]
        if self._buffer:
            self._gather_rcpts(rcpts, min(room, MAX_BATCH))
            self._counted[_VERB_RCPT] += len(rcpts) - 1
        self._due = _DUE_RCPT
        self._handler.rcpt(tuple(rcpts))

    def _gather_rcpts(self, rcpts: list[Recipient], most: int) -> None:
        """Add the well-formed RCPTs that stand next in the buffer; whatever else stands there is left for its turn."""
        while len(rcpts) < most and self._buffer[:5].upper() == b"RCPT ":
            end = self._buffer.find(b"\n")
            line = self._buffer[: end - 1]
            if not 0 < end < MAX_ENVELOPE_LINE or self._buffer[end - 1] != _CR:
                return
            try:
                command = parse_command(line, self._offered, self._smtputf8)
            except CommandError:
                return
            assert isinstance(command, RcptCommand)
            rcpts.append(command.rcpt)
            self._buffer = self._buffer[end + 1 :]

    def _data(self) -> None:
        if (refusal := _NOT_READY_FOR_CONTENT.get(self._state)) is not None:
            self._refuse(refusal)
        elif self._state is _STATE_BDAT:
            # RFC 3030 2: BDAT and DATA cannot be used in one transaction
            self._refuse(reply.DATA_AFTER_BDAT)
        elif self._buffer:
            # RFC 2920 3.1: DATA is the last of a group; the content waits for 354
            self.close("pipelining", reply.EARLY_TALKER)
        else:
            self._due = _DUE_CONTENT_BEGINS
            self._handler.content_begins(is_stuffed=True)

    def _bdat(self, command: BdatCommand) -> None:
        self._chunk_bytes = command.size_bytes
        self._is_last_chunk = command.last
        if (refusal := _NOT_READY_FOR_CONTENT.get(self._state)) is not None:
            self._skip_chunk(refusal, self._state)
            return
        self._small_chunks += command.size_bytes < _SMALL_CHUNK
        if self._small_chunks > MAX_SMALL_CHUNKS:
            self.close("commands", reply.TOO_MANY_COMMANDS)
            return
        is_first = self._state is not _STATE_BDAT
        if is_first:
            self._content = BdatDecoder(
                max_bytes=self._settings.max_message_bytes, max_line_bytes=self._settings.max_line_bytes
            )
        assert isinstance(self._content, BdatDecoder)
        self._content.begin_chunk(command.size_bytes)
        self._state = _STATE_CHUNK
        if is_first:
            self._due = _DUE_CONTENT_BEGINS
            self._handler.content_begins(is_stuffed=False)

    def _skip_chunk(self, answer: Reply, after: _State) -> None:
        """RFC 3030 2: the octets of a refused chunk come all the same; they are dropped and then `answer` is said."""
        if self._chunk_bytes > self._settings.max_message_bytes:
            # nobody waits for the end of what nobody may send
            self.close("content", answer)
            return
        self._skip_reply, self._after_skip = answer, after
        self._state = _STATE_SKIP
        self._content = None

    def _starttls(self) -> None:
        if self._tls_active:
            self._refuse(reply.TLS_ALREADY)
        elif not self._settings.has_tls:
            self._refuse(reply.TLS_NOT_AVAILABLE)
        elif self._state in _TRANSACTION_STATES:
            self._refuse(reply.TLS_IN_TRANSACTION)
        elif self._buffer:
            # RFC 3207 4.2, CVE-2011-0411: nothing said before TLS may count after it
            self.close("plaintext_behind_starttls")
        else:
            self._say(reply.READY_FOR_TLS)
            self._state = _STATE_TLS
            self._due = _DUE_STARTTLS
            self._handler.starttls()

    def _reset(self) -> None:
        if self._state in _TRANSACTION_STATES:
            self._state = _STATE_READY
            self._content = None
            self._handler.reset()

    def _is_only_talking(self) -> bool:
        """Count a command that brings no mail nearer; a session of nothing else is a probe and is closed."""
        self._commands += 1
        if self._commands <= self._settings.max_commands_without_mail:
            return False
        self.close("commands", reply.TOO_MANY_COMMANDS)
        return True

    def _refuse(self, answer: Reply) -> None:
        self._say(answer)
        if answer.code >= 500:
            self._count_errors(1)

    def _count_errors(self, count: int) -> None:
        self._errors += count
        if self._errors >= self._settings.max_errors:
            self.close("errors", reply.TOO_MANY_ERRORS)

    def _say(self, answer: Reply) -> None:
        self._codes[answer.code] += 1
        self._output += answer.wire


_OBEY: dict[type[Command], Callable[[Server, Any], None]] = {
    MailCommand: Server._mail,  # noqa: SLF001  # its own
    RcptCommand: Server._rcpt,  # noqa: SLF001
    BdatCommand: Server._bdat,  # noqa: SLF001
    SimpleCommand: Server._simple,  # noqa: SLF001
}


_AUTH = frozenset({Extension.AUTH})


@lru_cache(maxsize=1)
def _banner(hostname: str) -> Reply:
    return Reply(220, "", f"{hostname} ESMTP")


@lru_cache(maxsize=64)
def _announcement(settings: ServerSettings, extensions: Extensions, *, tls_active: bool) -> bytes:
    lines = [settings.hostname, "PIPELINING", f"SIZE {extensions.size}"]
    lines += sorted(extensions.keywords - {Extension.SIZE, Extension.AUTH})
    lines += ["ENHANCEDSTATUSCODES", "CHUNKING"]
    # RFC 9422 3: what a client may know beforehand
    groups = " RCPTDOMAINMAX=1" if settings.has_recipient_groups else ""
    lines.append(f"LIMITS RCPTMAX={settings.max_recipients}{groups}")
    # RFC 4954 4: PLAIN and LOGIN send the password, so only inside TLS
    if settings.is_submission and tls_active:
        lines.append(f"AUTH {' '.join(Mechanism)}")
    # RFC 3207 4.2: not announced inside TLS
    if settings.has_tls and not tls_active:
        lines.append("STARTTLS")
    text = [f"250-{line}\r\n" for line in lines[:-1]] + [f"250 {lines[-1]}\r\n"]
    return "".join(text).encode("ascii")
