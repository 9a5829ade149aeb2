"""The sending side of SMTP: replies of a downstream, what it offers, our commands, and the dialogue of one transaction.

RFC 5321 4.2 (replies), 4.5.2 (transparency), 1870 (SIZE), 2033 (LMTP), 2920 (PIPELINING), 3461 (DSN), 6152 (8BITMIME),
6531, 9422 (LIMITS); Postfix's XCLIENT_README and XFORWARD_README; the PROXY protocol, version 2, of HAProxy.

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

LMTP differs in its greeting only: a transaction there has one recipient, so one reply follows the dot.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

from gateway.errors import GatewayError
from gateway.session import BodyType, Envelope, Recipient, Session
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
# As numbers: `in` then is one memchr, and nothing else.
_CR, _LF, _NUL = b"\r\n\0"
# Replies to a group of commands up to this size are remembered as they were read.
_MAX_GROUP = 1024
# RFC 5321 4.2: what SMTP gives meaning to begins with 2..5; 1yz is well-formed, and trouble wherever it comes.
_CODES = {b"%d" % code: code for code in range(100, 600)}
_SEPARATORS = (b" ", b"-", b"")
_ENHANCED_HEAD = re.compile(rb"[245]\.\d{1,3}\.\d{1,3} ")
# RFC 5321 4.5.3.1.10 has 452 for "too many recipients", RFC 3463 3.6 X.5.3 for the same
_TOO_MANY_RECIPIENTS = re.compile(rb"4\.5\.3(?:\s|$)|(?![245]\.\d{1,3}\.\d{1,3}(?:\s|$))")
# RFC 5321 4.2, 3.3: 2yz in one line for MAIL and each RCPT, then 354
_GO_AHEAD = re.compile(rb"(?>(?:2\d\d [^\n]{0,1000}\n)+)354 [^\n]{0,1000}\n")
_PARAMETER_VALUE = re.compile(r"[^\x00-\x20\x7f]+")
# RFC 9422: rcptmax-value = %x31-39 0*5DIGIT
_RCPTMAX = re.compile(r"RCPTMAX=([1-9][0-9]{0,5})", re.ASCII | re.IGNORECASE)

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

    @property
    def is_too_many_recipients(self) -> bool:
        """452 4.5.3, or 452 without an enhanced code: the transaction has as many recipients as it may have."""
        return self.code == 452 and _TOO_MANY_RECIPIENTS.match(self.lines[0]) is not None

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
        elif (
            not self._texts and len(data) <= _MAX_GROUP and data.count(b"\n") > 1 and (group := _group(data))
        ):
            return list(group)
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


@lru_cache(maxsize=256)
def _group(data: bytes) -> tuple[ServerReply, ...]:
    """The replies to a pipelined group, where these bytes are whole replies; a downstream gives the same all day."""
    # cut in two, so that it is not asked for again
    head, tail = data[:1], data[1:]
    reader = ReplyReader()
    try:
        replies = (*reader.feed(head), *reader.feed(tail))
    except DownstreamProtocolError:
        return ()
    return replies if reader.is_empty else ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a downstream offered at EHLO or LHLO.

    `size` is None without SIZE, 0 for SIZE without a limit (RFC 1870 4). `max_recipients` is the RCPTMAX of LIMITS
    (RFC 9422), 0 when nothing was said. `xforward` and `xclient` are the names of the attributes that it takes, in
    upper case; empty when the command is not offered.
    """

    pipelining: bool = False
    eightbitmime: bool = False
    smtputf8: bool = False
    dsn: bool = False
    starttls: bool = False
    size: int | None = None
    max_recipients: int = 0
    xforward: frozenset[str] = frozenset()
    xclient: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, reply: ServerReply) -> Capabilities:
        """From a positive reply to EHLO or LHLO; what is not understood is not offered. HELO's reply offers nothing."""
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
            max_recipients=_rcptmax(offered.get("LIMITS", "")),
            xforward=frozenset(offered.get("XFORWARD", "").upper().split()),
            xclient=frozenset(offered.get("XCLIENT", "").upper().split()),
        )


def _rcptmax(limits: str) -> int:
    # RFC 9422: names with values, blanks between; what is not understood is ignored
    found = (_RCPTMAX.fullmatch(limit) for limit in limits.split())
    return min((int(limit[1]) for limit in found if limit), default=0)


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


def lhlo_command(hostname: str) -> bytes:
    """LHLO with our own name, instead of EHLO (RFC 2033 4.1)."""
    return _command(f"LHLO {hostname}")


def mail_command(envelope: Envelope, capabilities: Capabilities, size_bytes: int) -> bytes:
    """MAIL with the parameters that were offered. `size_bytes` 0 is an unknown size.

    A message with 8-bit content goes out unchanged to a downstream without 8BITMIME too, without BODY: converting it
    would break its signatures, and our own EHLO does not announce what a route is known to lack.
    """
    return _command(_mail_line(envelope, capabilities, size_bytes))


def rcpt_command(rcpt: Recipient, capabilities: Capabilities) -> bytes:
    """RCPT, with NOTIFY and ORCPT (RFC 3461 4.1, 4.2) where DSN was offered."""
    return _command(_rcpt_line(rcpt, capabilities))


def transaction_commands(
    envelope: Envelope, capabilities: Capabilities, size_bytes: int, before: bytes = b""
) -> bytes:
    """MAIL, each RCPT and DATA as one group (RFC 2920 3.1), the commands `before` in front."""
    lines = _mail_line(envelope, capabilities, size_bytes)
    for rcpt in envelope.rcpts:
        lines += "\r\n" + _rcpt_line(rcpt, capabilities)
    wire = lines.encode()
    # each RCPT has brought one CRLF, and nothing else may
    count = len(envelope.rcpts)
    if wire.count(b"\r") != count or wire.count(b"\n") != count or _NUL in wire:
        raise ValueError(f"CR, LF or NUL in the commands {lines!a}")
    return before + wire + b"\r\n" + DATA


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
    if _CR in wire or _LF in wire or _NUL in wire:
        raise ValueError(f"CR, LF or NUL in the command {line!a}")
    return wire + b"\r\n"


# --- who the client is ---------------------------------------------------------------------------------
# What the client said of itself, its HELO, is hostile. As an attribute it is xtext (RFC 1891 5) of octets that neither
# a header nor a log takes for more than a name; one that does not fit is left unknown. Client names are never looked up
# for a downstream.

# Postfix, smtpd.c: a longer value is a syntax error
_MAX_ATTRIBUTE = 255
# RFC 5321 4.5.3.1.4, with CRLF
_MAX_COMMAND = 512
_UNAVAILABLE = "[UNAVAILABLE]"
# XFORWARD_README, note 1; the characters are those of Postfix's smtpd.c
_NOT_IN_NAMES = re.compile(r"""[^\x21-\x7e]|[<>()\\";@]""")
# RFC 1891 5: xchar is "!" to "~" without "+" and "="
_NO_XCHAR = re.compile(r"[+=]")


def xclient_command(session: Session, offered: frozenset[str]) -> bytes:
    """XCLIENT in one line with the attributes of a client that are offered; after its 220 EHLO is due again.

    Raises ValueError when ADDR is not offered: without it the downstream would take our address for the client's; and
    when LOGIN is not, or cannot hold the name, and the client has authenticated: it would be a stranger there.
    """
    if "ADDR" not in offered:
        raise ValueError("XCLIENT without ADDR")
    login = {}
    if session.user is not None:
        if "LOGIN" not in offered:
            raise ValueError("XCLIENT without LOGIN, and the client has authenticated")
        login["LOGIN"] = _login(session.user)
    # With NAME alone some versions of Postfix keep what they found for our own address as the REVERSE_NAME.
    attributes = {**_attributes(session), "REVERSE_NAME": _UNAVAILABLE, **login}
    return _attribute_lines("XCLIENT", attributes, offered)[0]


def ehlo_as_client(session: Session, hostname: str) -> bytes:
    """EHLO behind XCLIENT, with the client's name, ours when it gave none: it replaces XCLIENT's HELO (Postfix)."""
    name = _NOT_IN_NAMES.sub("?", session.helo)
    return ehlo_command(name if 0 < len(name) <= _MAX_ATTRIBUTE else hostname)


def xforward_commands(session: Session, tx_id: str, offered: frozenset[str]) -> tuple[bytes, ...]:
    """XFORWARD in as many lines as it takes, for the next transaction; IDENT is `tx_id`. Empty when not offered."""
    attributes = {**_attributes(session), "IDENT": _attribute(tx_id), "SOURCE": "REMOTE"}
    return _attribute_lines("XFORWARD", attributes, offered)


def _attributes(session: Session) -> dict[str, str]:
    """What XCLIENT and XFORWARD have in common: names and values in xtext."""
    client = session.client
    return {
        "NAME": _UNAVAILABLE,
        "ADDR": f"IPV6:{client}" if client.version == 6 else str(client),
        "PORT": str(session.port),
        "PROTO": "ESMTP" if session.esmtp else "SMTP",
        "HELO": _attribute(session.helo),
    }


def _attribute(value: str) -> str:
    name = _NOT_IN_NAMES.sub("?", value)
    xtext = _NO_XCHAR.sub(lambda found: f"+{ord(found[0]):02X}", name)
    return xtext if 0 < len(xtext) <= _MAX_ATTRIBUTE else _UNAVAILABLE


def _login(user: str) -> str:
    """A user's name in xtext, as it is or not at all: another one would be another user. Raises ValueError."""
    xtext = _NO_XCHAR.sub(lambda found: f"+{ord(found[0]):02X}", user).replace(" ", "+20")
    # Postfix masks what is not printable ASCII
    if not (xtext.isascii() and xtext.isprintable() and len(xtext) <= _MAX_ATTRIBUTE):
        raise ValueError("XCLIENT LOGIN cannot hold the user's name")
    return xtext


def _attribute_lines(verb: str, attributes: dict[str, str], offered: frozenset[str]) -> tuple[bytes, ...]:
    lines: list[str] = []
    for name, value in attributes.items():
        if name not in offered:
            continue
        attribute = f" {name}={value}"
        if lines and len(lines[-1]) + len(attribute) + len("\r\n") <= _MAX_COMMAND:
            lines[-1] += attribute
        else:
            lines.append(verb + attribute)
    return tuple(_command(line) for line in lines)


# proxy-protocol.txt 2.2: signature; version 2 with the command; family with STREAM; length of the addresses
_PROXY_V2 = struct.Struct("!12sBBH")
_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21
_UNSPEC, _TCP_OVER_IPV4, _TCP_OVER_IPV6 = 0x00, 0x11, 0x21
# RFC 4291 2.5.5.2
_IPV4_MAPPED = b"\0" * 10 + b"\xff\xff"


def proxy_v2(
    source: tuple[IPv4Address | IPv6Address, int] | None, destination: tuple[IPv4Address | IPv6Address, int]
) -> bytes:
    """The PROXY header for a connection of this client to us; None is LOCAL, a connection of our own.

    Where one address is IPv4 and the other IPv6, both are written as IPv6, the first IPv4-mapped.
    """
    if source is None:
        return _PROXY_V2.pack(_SIGNATURE, _LOCAL, _UNSPEC, 0)
    addresses = source[0].packed, destination[0].packed
    family = _TCP_OVER_IPV4
    if any(len(address) == 16 for address in addresses):
        family = _TCP_OVER_IPV6
        addresses = _as_ipv6(addresses[0]), _as_ipv6(addresses[1])
    block = b"".join(addresses) + struct.pack("!HH", source[1], destination[1])
    return _PROXY_V2.pack(_SIGNATURE, _PROXY, family, len(block)) + block


def _as_ipv6(packed: bytes) -> bytes:
    return packed if len(packed) == 16 else _IPV4_MAPPED + packed


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
    `refused` names the refused recipients. `max_recipients`: so many were accepted before one was refused because there
    were too many; 0 when that did not happen.
    """

    reply: Reply
    stored: bool = False
    error: str = ""
    after: After = After.CLOSE
    is_used_up: bool = False
    refused: tuple[Refused, ...] = ()
    max_recipients: int = 0


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

    With PIPELINING the commands go out as one group that DATA ends (RFC 2920 3.1), otherwise one by one. The commands
    `before` MAIL belong to the group; it does not matter that one of them is refused, unless with 421.
    """

    __slots__ = ("_before", "_commands", "_is_in_content", "_pipelining", "_rcpts", "_replies")

    def __init__(
        self, mail: bytes, rcpts: Sequence[bytes], *, pipelining: bool, before: Sequence[bytes] = ()
    ) -> None:
        self._commands = (*before, mail, *rcpts, DATA)
        self._before = len(before)
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
        refusal = self._refusal()
        if refusal is not None:
            return refusal
        # RFC 5321 3.3: nothing but 354 asks for content
        if known[-1].code != 354:
            return self._trouble("protocol")
        self._is_in_content = True
        return StartContent.NOW

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
        before, mail, rcpts, data = _parts(self._replies, self._before, self._rcpts)
        if not all(reply.is_ok or reply.is_refusal for reply in (*before, *mail, *rcpts)):
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
            max_recipients=_accepted_before_too_many(rcpts),
        )

    def _trouble(self, error: str) -> Outcome:
        # RFC 5321 3.8: a server may close an idle connection at any time; then MAIL never gets its reply.
        is_used_up = error == "closed" and len(self._replies) <= self._before
        return Outcome(DOWNSTREAM_TROUBLE, error=error, is_used_up=is_used_up)


def _parts(replies: list[ServerReply], before: int, rcpts: int) -> tuple[list[ServerReply], ...]:
    """The replies to the commands before MAIL, to MAIL, to so many RCPTs, and to what follows them."""
    rcpts_end = before + 1 + rcpts
    return (
        replies[:before],
        replies[before : before + 1],
        replies[before + 1 : rcpts_end],
        replies[rcpts_end:],
    )


def _accepted_before_too_many(rcpts: Sequence[ServerReply]) -> int:
    """So many RCPTs were accepted before the first one that was too many; 0 when none was."""
    accepted = 0
    for reply in rcpts:
        if reply.is_too_many_recipients:
            return accepted
        accepted += reply.is_ok
    return 0


# --- asking about recipients -------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _shared(reply: ServerReply) -> Reply:
    """A 2yz reply to RCPT for our client; there are few different ones, so they are made once."""
    return reply.for_client()


class Verified(NamedTuple):
    """What a downstream said about recipients: a reply for each, in order; DOWNSTREAM_TROUBLE where it said nothing.

    `is_mail_refused`: the replies are about the sender. `refusals` counts what the downstream will have counted as
    errors. `error`, `after`, `is_used_up` and `max_recipients` are as in Outcome.
    """

    replies: tuple[Reply, ...]
    is_mail_refused: bool
    refusals: int
    error: str
    after: After
    is_used_up: bool = False
    max_recipients: int = 0

    @classmethod
    def all(cls, reply: Reply, count: int) -> Verified:
        """The same reply for each recipient, without having asked."""
        return cls((reply,) * count, is_mail_refused=True, refusals=0, error="", after=After.REUSE)


class Verification:
    """MAIL, RCPTs, RSET: ask about recipients without sending anything. To be driven like a Transfer."""

    __slots__ = ("_before", "_commands", "_pipelining", "_rcpts", "_replies")

    def __init__(
        self, mail: bytes, rcpts: Sequence[bytes], *, pipelining: bool, before: Sequence[bytes] = ()
    ) -> None:
        self._commands = (*before, mail, *rcpts, RSET)
        self._before = len(before)
        self._rcpts = len(rcpts)
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
            if all([200 <= reply.code < 300 for reply in known]):  # noqa: C419  # a generator takes twice the time
                # nearly always
                accepted = tuple([_shared(reply) for reply in known[self._before + 1 : -1]])
                return Verified(accepted, False, 0, "", After.REUSE)
            return self._verified("")
        is_of_mail = len(known) == self._before + 1
        if known[-1].is_ok or (known[-1].is_refusal and known[-1].code != 421 and not is_of_mail):
            return Send(self._commands[len(known)], 1)
        # Without PIPELINING a refused MAIL needs no RSET; 421 ends the dialogue, and so does what is no answer.
        return self._verified("closed" if known[-1].code == 421 else "")

    def interrupted(self, replies: Sequence[ServerReply], error: str) -> Verified:
        """The connection failed after these replies to what was sent last: "closed", "timeout" or "protocol"."""
        self._replies += replies
        return self._verified(error)

    def _verified(self, error: str) -> Verified:
        known = self._replies
        asked = self._rcpts
        before, mail, rcpts, rset = _parts(known, self._before, asked)
        is_mail_refused = bool(mail) and mail[0].is_refusal
        is_nonsense = not all(reply.is_ok or reply.is_refusal for reply in known)
        if is_nonsense:
            error = error or "protocol"
        if not all(reply.is_ok or reply.is_refusal for reply in before):
            replies = []
        elif is_mail_refused:
            replies = [mail[0].for_client()] * asked
        elif mail and not mail[0].is_ok:
            replies = []
        else:
            replies = [
                reply.for_client() if reply.is_ok or reply.is_refusal else DOWNSTREAM_TROUBLE
                for reply in rcpts
            ]
        missing = asked - len(replies)
        is_ended = any(reply.code == 421 for reply in (*before, *mail, *rcpts))
        # A refused MAIL opened nothing; otherwise only an answered RSET lets the next MAIL follow.
        is_clean = rset[0].is_ok if rset else is_mail_refused and not is_ended
        return Verified(
            replies=(*replies, *[DOWNSTREAM_TROUBLE] * missing),
            is_mail_refused=is_mail_refused,
            refusals=sum(reply.is_refusal for reply in known),
            error=error if missing or is_nonsense else "",
            after=After.REUSE if is_clean and not is_ended and not error else After.CLOSE,
            is_used_up=is_ended or (error == "closed" and not mail),
            max_recipients=_accepted_before_too_many(rcpts),
        )
