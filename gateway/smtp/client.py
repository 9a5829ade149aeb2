"""The sending side of SMTP: replies of a downstream, what it offers, our commands, and the dialogue of one transaction.

RFC 5321 4.2 (replies), 4.5.2 (transparency), 1870 (SIZE), 2920 (PIPELINING), 3461 (DSN), 6152 (8BITMIME), 6531.

Pure: bytes and replies in, bytes and an outcome out; no sockets, no clock. adapters/relay does the I/O:

    step = transfer.begin()
    while isinstance(step, Send):                       # write step.data, wait for step.replies replies
        step = transfer.advance(replies)                # or transfer.interrupted(replies, error)
    if isinstance(step, StartContent):                  # 354 for everybody: write content and dot
        step = final_outcome(replies)                   # or transfer.interrupted(...) where the dot was not written
    # step is an Outcome

Nearly always it is the same: transaction_commands in one write, bytes of which ReplyReader.is_go_ahead is true, content
and dot, final_outcome. Whoever meets anything else goes on with a Transfer and the replies that came.

What a downstream says is as hostile as what a client says: it becomes a ServerReply or DownstreamProtocolError, and
in the end an Outcome whose reply for our client has a class that the rules of DESIGN.md section 6 allow. An Outcome
with `stored` exists only for a 2xx reply that came after the dot.

LMTP will differ in the greeting and in the number of replies after the dot; XCLIENT, XFORWARD in what precedes MAIL.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from gateway.errors import GatewayError
from gateway.session import BodyType, Envelope, Recipient
from gateway.smtp.reply import (
    DOWNSTREAM_TROUBLE,
    FINAL_REPLY_LOST,
    PARTIAL_REFUSAL,
    Reply,
)

# RFC 5321 4.5.3.1.5 allows 512; some servers write longer lines, none as long as this.
MAX_REPLY_LINE = 4096
# A reply of many lines is EHLO's or a refusal with an essay; neither needs more.
MAX_REPLY_BYTES = 64 * 1024
# RFC 1870 3: size-value = 1*20DIGIT
MAX_SIZE_DIGITS = 20
# RFC 5321 4.2: what SMTP gives meaning to begins with 2..5; 1yz is well-formed, and trouble wherever it comes.
_CODES = {b"%d" % code: code for code in range(100, 600)}
_SEPARATORS = (b" ", b"-", b"")
_ENHANCED_HEAD = re.compile(rb"[245]\.\d{1,3}\.\d{1,3} ")
# RFC 5321 4.2, 3.3: 2yz in one line for MAIL and each RCPT, then 354
_GO_AHEAD = re.compile(rb"(?:2\d\d [^\n]{0,1000}\n)++354 [^\n]{0,1000}\n")
_PARAMETER_VALUE = re.compile(r"[^\x00-\x20\x7f]+")

END_OF_CONTENT = b".\r\n"
DATA = b"DATA\r\n"
RSET = b"RSET\r\n"
QUIT = b"QUIT\r\n"
STARTTLS = b"STARTTLS\r\n"


class DownstreamProtocolError(GatewayError):
    """What the downstream sent is no SMTP reply. The message holds nothing of it unescaped.

    `replies` are those that the same bytes completed before: what a downstream promised, it promised.
    """

    replies: tuple[ServerReply, ...] = ()


# --- replies -----------------------------------------------------------------------------------------


class ServerReply(NamedTuple):
    """One reply of the downstream as it came: code 100..599, and the texts of its lines without line ends."""

    code: int
    lines: tuple[bytes, ...]

    @property
    def is_ok(self) -> bool:
        """A 2yz reply: the command was done."""
        return 200 <= self.code < 300

    @property
    def is_refusal(self) -> bool:
        """A 4yz or 5yz reply."""
        return self.code >= 400

    def for_client(self) -> Reply:
        """The same for our client: printable ASCII, one line. Only for 2yz, 4yz and 5yz.

        421 becomes 451: it closes the downstream's connection, not the client's.
        """
        code = 451 if self.code == 421 else self.code  # RFC 5321 3.8: 421 announces the close
        first = self.lines[0]
        if len(self.lines) == 1:
            return Reply.from_downstream(code, first.decode("latin-1"))
        # RFC 2034 4: each line of a reply repeats the enhanced code; the client gets one line, so one code
        repeated = _ENHANCED_HEAD.match(first)
        rest = (line.removeprefix(repeated[0]) if repeated else line for line in self.lines[1:])
        return Reply.from_downstream(code, b" ".join((first, *rest)).decode("latin-1"))


class ReplyReader:
    """Makes replies of bytes. A line may end in a bare LF; what is wrong otherwise is DownstreamProtocolError.

    Wrong are: a line that does not begin with a code 100..599 and one of blank, hyphen, line end; another code in a
    continuation line; a line over 4096 octets; a reply over 64 KiB. After the error the reader is of no use.
    """

    __slots__ = ("_code", "_partial", "_texts", "_total")

    def __init__(self) -> None:
        self._partial = b""
        self._code = b""
        self._texts: list[bytes] = []
        self._total = 0

    @property
    def is_empty(self) -> bool:
        """Nothing of a further reply has come yet."""
        return not self._partial and not self._texts

    def is_go_ahead(self, data: bytes, replies: int) -> bool:
        """These bytes are all of so many replies, each in one line: 2yz, and 354 as the last.

        They must not be fed then. False says nothing but that they are to be fed.
        """
        return not (
            self._partial or self._texts or data.count(b"\n") != replies or _GO_AHEAD.fullmatch(data) is None
        )

    def feed(self, data: bytes) -> list[ServerReply]:
        """The replies that these bytes complete, in order."""
        if self._partial:
            data = self._partial + data
        # Not splitlines(): it knows line ends that SMTP does not.
        lines = data.split(b"\n")
        self._partial = lines.pop()
        replies: list[ServerReply] = []
        try:
            for line in lines:
                reply = self._line(line)
                if reply is not None:
                    replies.append(reply)
            if len(self._partial) > MAX_REPLY_LINE:
                self._line(self._partial)  # raises
        except DownstreamProtocolError as error:
            error.replies = tuple(replies)
            raise
        return replies

    def _line(self, line: bytes) -> ServerReply | None:
        if len(line) > MAX_REPLY_LINE:
            raise DownstreamProtocolError(f"a reply line of more than {MAX_REPLY_LINE} octets")
        text = line[4:].removesuffix(b"\r")
        code, separator = line[:3], line[3:4].removesuffix(b"\r")
        if code not in _CODES or separator not in _SEPARATORS:
            raise DownstreamProtocolError(f"a reply begins with {line[:8]!r}")
        # RFC 5321 4.2.1: the same code in every line
        if self._texts and code != self._code:
            raise DownstreamProtocolError(f"a reply goes on as {code!r} that began as {self._code!r}")
        if separator != b"-" and not self._texts:
            return ServerReply(_CODES[code], (text,))
        self._code = code
        self._texts.append(text)
        self._total += len(line)
        if self._total > MAX_REPLY_BYTES:
            raise DownstreamProtocolError(f"a reply of more than {MAX_REPLY_BYTES} octets")
        if separator == b"-":
            return None
        reply = ServerReply(_CODES[code], tuple(self._texts))
        self._texts, self._total = [], 0
        return reply


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a downstream offered at EHLO. `size` is None without SIZE, 0 for SIZE without a limit (RFC 1870 4)."""

    pipelining: bool = False
    eightbitmime: bool = False
    smtputf8: bool = False
    dsn: bool = False
    starttls: bool = False
    size: int | None = None

    @classmethod
    def parse(cls, reply: ServerReply) -> Capabilities:
        """From a positive reply to EHLO; what is not understood is not offered. HELO's reply offers nothing."""
        offered: dict[str, str] = {}
        # RFC 5321 4.1.1.1: the first line greets, each other one is a keyword with its parameters
        for line in reply.lines[1:]:
            keyword, _, parameters = line.decode("latin-1").strip().partition(" ")
            offered[keyword.upper()] = parameters.strip()
        return cls(
            pipelining="PIPELINING" in offered,
            eightbitmime="8BITMIME" in offered,
            smtputf8="SMTPUTF8" in offered,
            dsn="DSN" in offered,
            starttls="STARTTLS" in offered,
            size=_size(offered["SIZE"]) if "SIZE" in offered else None,
        )


def _size(digits: str) -> int:
    if digits.isascii() and digits.isdigit() and len(digits) <= MAX_SIZE_DIGITS:
        return int(digits)
    return 0


# --- commands ----------------------------------------------------------------------------------------
# Each raises ValueError rather than build a line with CR, LF or NUL in it, or a parameter with a blank in its value.


def ehlo_command(hostname: str) -> bytes:
    """EHLO with our own name."""
    return _command(f"EHLO {hostname}")


def helo_command(hostname: str) -> bytes:
    """HELO, for a downstream that does not know EHLO (RFC 5321 3.2)."""
    return _command(f"HELO {hostname}")


def mail_command(envelope: Envelope, capabilities: Capabilities, size_bytes: int) -> bytes:
    """MAIL with the parameters that were offered. `size_bytes` 0 is an unknown size.

    A message with 8-bit content goes out unchanged to a downstream without 8BITMIME too, without BODY: converting it
    would break its signatures, and our own EHLO does not announce what a route is known to lack.
    """
    return _command(_mail_line(envelope, capabilities, size_bytes))


def rcpt_command(rcpt: Recipient, capabilities: Capabilities) -> bytes:
    """RCPT, with NOTIFY and ORCPT (RFC 3461 4.1, 4.2) where DSN was offered."""
    return _command(_rcpt_line(rcpt, capabilities))


def transaction_commands(envelope: Envelope, capabilities: Capabilities, size_bytes: int) -> bytes:
    """MAIL, each RCPT and DATA as one group (RFC 2920 3.1)."""
    lines = _mail_line(envelope, capabilities, size_bytes)
    for rcpt in envelope.rcpts:
        lines += "\r\n" + _rcpt_line(rcpt, capabilities)
    wire = lines.encode()
    # each RCPT has brought one CRLF, and nothing else may
    count = len(envelope.rcpts)
    if wire.count(b"\r") != count or wire.count(b"\n") != count or b"\0" in wire:
        raise ValueError(f"CR, LF or NUL in the commands {lines!a}")
    return wire + b"\r\n" + DATA


def _mail_line(envelope: Envelope, capabilities: Capabilities, size_bytes: int) -> str:
    line = f"MAIL FROM:<{'' if envelope.mail_from is None else envelope.mail_from!s}>"
    if size_bytes and capabilities.size is not None:
        line += f" SIZE={size_bytes}"
    if capabilities.eightbitmime and envelope.body_type is BodyType.EIGHT_BIT:
        line += " BODY=8BITMIME"
    # RFC 6531 3.4: without SMTPUTF8 such a message cannot be sent at all; the relay has refused it before
    if envelope.smtputf8 and capabilities.smtputf8:
        line += " SMTPUTF8"
    if capabilities.dsn and (envelope.dsn_ret or envelope.dsn_envid):
        # RFC 3461 4.3, 4.4
        line += _parameter("RET", envelope.dsn_ret) + _parameter("ENVID", envelope.dsn_envid)
    return line


def _rcpt_line(rcpt: Recipient, capabilities: Capabilities) -> str:
    line = f"RCPT TO:<{rcpt.mailbox!s}>"
    if capabilities.dsn and (rcpt.notify or rcpt.orcpt):
        line += _parameter("NOTIFY", rcpt.notify) + _parameter("ORCPT", rcpt.orcpt)
    return line


def _parameter(keyword: str, value: str) -> str:
    if not value:
        return ""
    if not _PARAMETER_VALUE.fullmatch(value):
        raise ValueError(f"the value {value!a} of {keyword} cannot be written")
    return f" {keyword}={value}"


def _command(line: str) -> bytes:
    wire = line.encode()
    # three scans by memchr: a pattern takes ten times as long
    if b"\r" in wire or b"\n" in wire or b"\0" in wire:
        raise ValueError(f"CR, LF or NUL in the command {line!a}")
    return wire + b"\r\n"


# --- content -----------------------------------------------------------------------------------------


class DotStuffer:
    """RFC 5321 4.5.2: one more dot before each line that begins with one. Lines end with CRLF only.

    The first block begins a line. Blocks may be cut anywhere, also inside a CRLF.
    """

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\r\n"

    def stuff(self, block: bytes) -> bytes:
        """The next block in wire form."""
        if not block:
            return block
        stuffed = block.replace(b"\r\n.", b"\r\n..")
        # the look-alikes that lie across the border to the block before
        if block[:1] == b"." and self._tail == b"\r\n":
            stuffed = b"." + stuffed
        elif block[:2] == b"\n." and self._tail[-1:] == b"\r":
            stuffed = b"\n." + stuffed[1:]
        self._tail = (self._tail + block[-2:])[-2:]
        return stuffed

    def stuff_all(self, blocks: Iterable[bytes]) -> Iterable[bytes]:
        """Each block in wire form, as it is asked for."""
        return map(self.stuff, blocks)


# --- one transaction ---------------------------------------------------------------------------------


class After(Enum):
    """What may be done with the connection after a dialogue."""

    REUSE = auto()  # the next MAIL may follow
    RESET = auto()  # in step with us, but a transaction may be open: RSET first
    CLOSE = auto()


class Send(NamedTuple):
    """Write `data` in one write, then wait for this many replies."""

    data: bytes
    replies: int


class StartContent(Enum):
    """Everybody was accepted and 354 is there: write the content and the dot, then wait for one reply."""

    NOW = auto()


class Refused(NamedTuple):
    """A recipient, by its place in the transaction, that the downstream refused."""

    position: int
    reply: Reply


class Outcome(NamedTuple):
    """How a transfer ended. `reply` is for the client, `error` a token of gateway.relaying.Delivery.

    `is_used_up`: the connection had ended before anything was transferred (421, or closed without a reply to MAIL);
    when it was a reused one, another attempt on a fresh one is right. Never true once content was sent.
    `refused` names the refused recipients (late refusals will be remembered from here).
    """

    reply: Reply
    stored: bool = False
    error: str = ""
    after: After = After.CLOSE
    is_used_up: bool = False
    refused: tuple[Refused, ...] = ()


def final_outcome(replies: Sequence[ServerReply]) -> Outcome:
    """The outcome once the dot was sent: of its one reply, or of none when the connection failed."""
    if replies:
        reply = replies[0]
        code = reply.code
        if 200 <= code < 300:
            return Outcome(reply.for_client(), True, "", After.REUSE)
        if code >= 400:
            # RFC 5321 4.1.1.4: the reply after the dot ends the transaction, whatever it is
            return Outcome(reply.for_client(), False, "refused", After.CLOSE if code == 421 else After.REUSE)
    return Outcome(FINAL_REPLY_LOST, error="final_lost")


class Transfer:
    """MAIL, RCPTs (one at least), DATA, and content up to the dot. See the module's docstring for the calls.

    With PIPELINING the commands go out as one group that DATA ends (RFC 2920 3.1), otherwise one by one.
    """

    __slots__ = ("_commands", "_is_in_content", "_pipelining", "_rcpts", "_replies")

    def __init__(self, mail: bytes, rcpts: Sequence[bytes], *, pipelining: bool) -> None:
        self._commands = (mail, *rcpts, DATA)
        self._rcpts = len(rcpts)
        self._pipelining = pipelining
        self._replies: list[ServerReply] = []
        self._is_in_content = False

    def begin(self) -> Send:
        """The first command or the whole group."""
        if self._pipelining:
            return Send(b"".join(self._commands), len(self._commands))
        return Send(self._commands[0], 1)

    def advance(self, replies: Sequence[ServerReply]) -> Send | StartContent | Outcome:
        """Go on with all the replies that were waited for."""
        self._replies += replies
        known = self._replies
        if len(known) < len(self._commands):
            return self._refusal() or Send(self._commands[len(known)], 1)
        # RFC 5321 3.3: nothing but 354 asks for content
        if known[-1].code == 354 and all(reply.is_ok for reply in known[:-1]):
            self._is_in_content = True
            return StartContent.NOW
        return self._refusal() or self._trouble("protocol")

    def interrupted(self, replies: Sequence[ServerReply], error: str) -> Outcome:
        """The connection failed after these replies to what was sent last: "closed", "timeout" or "protocol"."""
        if self._is_in_content:
            # What was not sent cannot be stored, whatever the downstream says.
            # A downstream that refuses in the middle of the content and closes has answered DATA.
            if replies and replies[0].is_refusal:
                return Outcome(replies[0].for_client(), error="refused")
            return self._trouble(error)
        self._replies += replies
        return self._refusal(is_interrupted=True) or self._trouble(error)

    def _refusal(self, *, is_interrupted: bool = False) -> Outcome | None:
        """The outcome when the replies so far refuse the transaction, None when they do not (yet).

        Without PIPELINING it is asked after each reply, so that no command goes out that cannot matter any more.
        """
        mail, rcpts, data = (
            self._replies[:1],
            self._replies[1 : self._rcpts + 1],
            self._replies[self._rcpts + 1 :],
        )
        if not all(reply.is_ok or reply.is_refusal for reply in (*mail, *rcpts)):
            return self._trouble("protocol")
        refused = tuple(
            Refused(index, reply.for_client()) for index, reply in enumerate(rcpts) if reply.is_refusal
        )
        end = next((reply for reply in self._replies if reply.code == 421), None)
        error = "refused"
        if mail and mail[0].is_refusal:
            reply = mail[0].for_client()
        elif len(refused) == self._rcpts:
            # All 5yz: the first is the answer. Otherwise somebody may get it later: the first 4yz.
            reply = next((each.reply for each in refused if each.reply.is_transient), refused[0].reply)
        elif end is not None:
            reply = end.for_client()
        elif refused and len(rcpts) == self._rcpts:
            # RFC 5321 3.3 gives one reply to the content for all recipients, so nobody gets it now.
            reply, error = PARTIAL_REFUSAL, "partial"
        elif data and data[0].is_refusal:
            reply = data[0].for_client()
        else:
            return None
        # In step and not asked for content (354): RSET brings it back. Otherwise only a close without a dot does.
        is_in_step = not is_interrupted and end is None and all(reply.is_refusal for reply in data)
        return Outcome(
            reply,
            error=error,
            after=After.RESET if is_in_step else After.CLOSE,
            is_used_up=end is not None and reply.is_transient,
            refused=refused,
        )

    def _trouble(self, error: str) -> Outcome:
        # RFC 5321 3.8: a server may close an idle connection at any time; then MAIL never gets its reply.
        return Outcome(DOWNSTREAM_TROUBLE, error=error, is_used_up=error == "closed" and not self._replies)


# --- asking about recipients -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """What a downstream said about recipients: a reply for each, in order; DOWNSTREAM_TROUBLE where it said nothing.

    `is_mail_refused`: the replies are about the sender. `refusals` counts what the downstream will have counted as
    errors. `error`, `after` and `is_used_up` are as in Outcome.
    """

    replies: tuple[Reply, ...]
    is_mail_refused: bool
    refusals: int
    error: str
    after: After
    is_used_up: bool = False

    @classmethod
    def all(cls, reply: Reply, count: int) -> Verified:
        """The same reply for each recipient, without having asked."""
        return cls((reply,) * count, is_mail_refused=True, refusals=0, error="", after=After.REUSE)


class Verification:
    """MAIL, RCPTs, RSET: ask about recipients without sending anything. To be driven like a Transfer."""

    __slots__ = ("_commands", "_pipelining", "_replies")

    def __init__(self, mail: bytes, rcpts: Sequence[bytes], *, pipelining: bool) -> None:
        self._commands = (mail, *rcpts, RSET)
        self._pipelining = pipelining
        self._replies: list[ServerReply] = []

    def begin(self) -> Send:
        """The first command or the whole group."""
        if self._pipelining:
            return Send(b"".join(self._commands), len(self._commands))
        return Send(self._commands[0], 1)

    def advance(self, replies: Sequence[ServerReply]) -> Send | Verified:
        """Go on with all the replies that were waited for."""
        self._replies += replies
        known = self._replies
        if len(known) == len(self._commands):
            return self._verified("")
        if known[-1].is_ok or (known[-1].is_refusal and known[-1].code != 421 and len(known) > 1):
            return Send(self._commands[len(known)], 1)
        # Without PIPELINING a refused MAIL needs no RSET; 421 ends the dialogue, and so does what is no answer.
        return self._verified("closed" if known[-1].code == 421 else "")

    def interrupted(self, replies: Sequence[ServerReply], error: str) -> Verified:
        """The connection failed after these replies to what was sent last: "closed", "timeout" or "protocol"."""
        self._replies += replies
        return self._verified(error)

    def _verified(self, error: str) -> Verified:
        known = self._replies
        asked = len(self._commands) - 2
        mail, rcpts, rset = known[:1], known[1 : asked + 1], known[asked + 1 :]
        is_mail_refused = bool(mail) and mail[0].is_refusal
        is_nonsense = not all(reply.is_ok or reply.is_refusal for reply in known)
        if is_nonsense:
            error = error or "protocol"
        if is_mail_refused:
            replies = [mail[0].for_client()] * asked
        elif mail and not mail[0].is_ok:
            replies = []
        else:
            replies = [
                reply.for_client() if reply.is_ok or reply.is_refusal else DOWNSTREAM_TROUBLE
                for reply in rcpts
            ]
        missing = asked - len(replies)
        is_ended = any(reply.code == 421 for reply in known[: asked + 1])
        # A refused MAIL opened nothing; otherwise only an answered RSET lets the next MAIL follow.
        is_clean = rset[0].is_ok if rset else is_mail_refused and not is_ended
        return Verified(
            replies=(*replies, *[DOWNSTREAM_TROUBLE] * missing),
            is_mail_refused=is_mail_refused,
            refusals=sum(reply.is_refusal for reply in known),
            error=error if missing or is_nonsense else "",
            after=After.REUSE if is_clean and not is_ended and not error else After.CLOSE,
            is_used_up=is_ended or (error == "closed" and not known),
        )
