"""Targets of the search that are no parsers of one text: machines that are fed octets in pieces.

Each is held against a second, simple way to say the same: the whole stream at once, or a search for CRLF.CRLF. What
they disagree about is a finding (AssertionError), and so is every exception that the machine does not document.
The first octets say where the stream is cut; so the search finds the cuts too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from gateway.adapters.dns.message import query_for, read_message
from gateway.adapters.dns.reply import read
from gateway.lookup import RRType
from gateway.mail.message import HeaderError, HeaderReader
from gateway.session import Envelope, Recipient
from gateway.smtp import reply
from gateway.smtp.client import (
    Capabilities,
    DownstreamProtocolError,
    Outcome,
    ReplyReader,
    Send,
    ServerReply,
    Transfer,
    Verification,
    Verified,
    final_outcome,
)
from gateway.smtp.command import Extension
from gateway.smtp.content import BdatDecoder, DataDecoder, Fault
from gateway.smtp.reply import Reply
from gateway.smtp.sasl import Credentials
from gateway.smtp.server import Extensions, Server, ServerSettings

CUTS = 4
SETTINGS = ServerSettings("mx.example.org", max_message_bytes=2000, max_recipients=3, has_tls=True)
OFFERED = Extensions(2000, frozenset(Extension))
UNKNOWN = Reply(550, "5.1.1", "Unknown")
# RFC 5321 4.2: what we may say
REPLY_LINES = re.compile(rb"(?:[2-5]\d\d[ -][\x20-\x7e]{0,506}\r\n)*")


def pieces(octets: bytes) -> tuple[bytes, list[bytes]]:
    """The stream behind the octets that say where it is cut, and its pieces."""
    cuts, stream = octets[:CUTS], octets[CUTS:]
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return stream, [stream[a:b] for a, b in pairwise(edges)]


class _Session:
    """A driver of the receiving machine that answers at once, and checks what every driver relies on."""

    def __init__(self) -> None:
        self.server = Server(SETTINGS, self, defaultdict(int), defaultdict(int))
        self.output = b""
        self.contents: list[bytes] = []
        self.closed: list[str] = []
        self._kept: bytes | None = None
        self.server.open()
        self.take()

    def take(self) -> None:
        self.output += self.server.take_output()

    def greeted(self, domain: str, *, esmtp: bool) -> None:
        assert not set(domain) & set("\r\n\0")
        self.server.greet(OFFERED if esmtp else None)

    def auth(self, credentials: Credentials) -> None:
        raise AssertionError(f"the MX never offers AUTH, and took it of {credentials.user!r}")

    def mail(self, envelope: Envelope) -> None:
        assert not set(str(envelope.mail_from)) & set("\r\n\0<> ") or '"' in str(envelope.mail_from)
        self.server.answer(reply.SENDER_OK)

    def rcpt(self, rcpts: tuple[Recipient, ...]) -> None:
        answers = [UNKNOWN if each.mailbox.local == "unknown" else reply.RECIPIENT_OK for each in rcpts]
        self.server.answer_rcpts(answers, unknown=answers.count(UNKNOWN))

    def content_begins(self, *, is_stuffed: bool) -> None:
        assert self._kept is None
        self._kept = b""
        self.server.accept_content()

    def content(self, block: bytes) -> None:
        assert self._kept is not None
        self._kept += block

    def content_ends(self, fault: Fault | None) -> None:
        assert self._kept is not None
        if fault is None:
            self.contents.append(self._kept)
        self._kept = None
        self.server.answer(fault.reply if fault else reply.OK, close=bool(fault and fault.closes))

    def starttls(self) -> None:
        self.server.tls_started()

    def reset(self) -> None:
        self._kept = None

    def closing(self, reason: str) -> None:
        self.closed.append(reason)


def server(octets: bytes) -> None:
    """Octets of a client: replies, and messages that nobody behind us could read as two."""
    _, parts = pieces(octets)
    session = _Session()
    for part in parts:
        session.server.receive(part)
        session.take()
    assert REPLY_LINES.fullmatch(session.output)
    assert len(session.closed) <= 1
    for content in session.contents:
        rest = content.replace(b"\r\n", b"")
        assert not set(rest) & set(b"\r\n\0")
        assert content == b"" or content.endswith(b"\r\n")
        assert len(content) <= SETTINGS.max_message_bytes + 2


def data(octets: bytes) -> None:
    """Content after DATA: it ends at the first CRLF.CRLF, and is kept as it came or refused."""
    for lenient in (False, True):
        stream, parts = pieces(octets)
        decoder = DataDecoder(max_bytes=1000, max_line_bytes=100, allow_bare_lf=lenient)
        kept, behind = b"", None
        for number, part in enumerate(parts):
            block, behind = decoder.feed(part)
            kept += block
            if behind is not None:
                behind += b"".join(parts[number + 1 :])
                break
        end = (b"\r\n" + stream).find(b"\r\n.\r\n")
        assert behind == (None if end < 0 else stream[end + 3 :])
        if decoder.fault is None:
            assert not set(kept.replace(b"\r\n", b"")) & set(b"\r\n\0")
            if end >= 0 and not lenient:
                assert kept == stream[:end]
            assert b"\r\n.\r\n" not in b"\r\n" + kept
        elif decoder.fault is Fault.LINE_END and not lenient:
            assert set((stream if end < 0 else stream[:end]).replace(b"\r\n", b"")) & set(b"\r\n\0")


def bdat(octets: bytes) -> None:
    """Content in chunks: as much as was said, and never an octet of what follows."""
    stream, parts = pieces(octets)
    sizes = [len(part) for part in parts]
    decoder = BdatDecoder(max_bytes=1000, max_line_bytes=100)
    kept = b""
    for size in sizes:
        decoder.begin_chunk(size)
        block, stream = _chunk(decoder, stream)
        kept += block
    kept += decoder.finish()
    assert stream == b""
    whole = b"".join(parts)
    if decoder.fault is None:
        assert kept == (whole if whole.endswith(b"\n") or not whole else whole + b"\r\n")
        assert not set(kept.replace(b"\r\n", b"")) & set(b"\r\n\0")


def _chunk(decoder: BdatDecoder, stream: bytes) -> tuple[bytes, bytes]:
    """Feed one chunk in two pieces; what is kept of it, and what stands behind it."""
    first, second = stream[: len(stream) // 2], stream[len(stream) // 2 :]
    kept, behind = decoder.feed(first)
    if behind is not None:
        return kept, behind + second
    more, behind = decoder.feed(second)
    assert behind is not None, "the chunk is here and the decoder waits for more"
    return kept + more, behind


def header(octets: bytes) -> None:
    """The index of a header: the same for every cut, every octet in one field, names without their blanks."""
    stream, parts = pieces(octets)
    for is_stuffed in (False, True):
        found: list[object] = []
        for blocks in ([stream], parts):
            reader = HeaderReader(is_stuffed=is_stuffed, max_bytes=500, max_fields=20)
            try:
                for block in blocks:
                    if reader.feed(block):
                        break
                # what ends in the middle of a line does not come here: content ends in CRLF
                ended = reader.header or (reader.finish() if stream.endswith(b"\r\n") else None)
            except HeaderError:
                found.append(HeaderError)
                continue
            if ended is None:
                found.append(None)
                continue
            found.append(ended.octets)
            assert b"".join(each.raw for each in ended.fields) == ended.octets
            for each in ended.fields:
                assert each.name == each.name.lower().strip()
                assert each in ended.all(each.name)
                assert each.raw.endswith(b"\r\n")
                assert not re.search(rb"\r\n[^ \t]", each.raw)
        assert found[0] == found[1], found


def replies(octets: bytes) -> None:
    """What a downstream says, whatever it was asked: replies, in any cut the same, and outcomes that keep the rules."""
    stream, parts = pieces(octets)
    whole, whole_ended = _replies([stream])
    heard, ended = _replies(parts)
    assert (heard, ended) == (whole, whole_ended)
    for each in heard:
        Capabilities.parse(each)
        if each.code >= 400 or each.is_ok:
            said = each.for_client().wire
            assert REPLY_LINES.fullmatch(said)
    for pipelining in (False, True):
        _drive(heard, pipelining=pipelining)


def _replies(parts: Sequence[bytes]) -> tuple[list[ServerReply], bool]:
    reader = ReplyReader()
    heard: list[ServerReply] = []
    try:
        for part in parts:
            heard += reader.feed(part)
    except DownstreamProtocolError as exc:
        return [*heard, *exc.replies], True
    return heard, False


def _drive(heard: Sequence[ServerReply], *, pipelining: bool) -> None:
    mail, rcpts = b"MAIL FROM:<>\r\n", (b"RCPT TO:<a@example.org>\r\n", b"RCPT TO:<b@example.org>\r\n")
    transfer = Transfer(mail, rcpts, pipelining=pipelining)
    left = [*heard]
    step: object = transfer.begin()
    while isinstance(step, Send):
        given, left = left[: step.replies], left[step.replies :]
        whole = len(given) == step.replies
        step = transfer.advance(given) if whole else transfer.interrupted(given, "closed")
    if isinstance(step, Outcome):
        # nothing is stored before the dot
        assert not step.stored
        assert step.reply.code >= 400
    else:
        end = final_outcome(left[:1])
        assert end.stored == bool(left and left[0].is_ok)
        assert end.stored == (end.reply.code == 250 or 200 <= end.reply.code < 300)
        assert end.stored or end.reply.code < 500 or left[0].code >= 500
    verification = Verification(mail, rcpts, pipelining=pipelining)
    left = [*heard]
    asked: object = verification.begin()
    while isinstance(asked, Send):
        given, left = left[: asked.replies], left[asked.replies :]
        whole = len(given) == asked.replies
        asked = verification.advance(given) if whole else verification.interrupted(given, "timeout")
    assert isinstance(asked, Verified)
    assert len(asked.replies) == len(rcpts)


def dns_packet(octets: bytes) -> None:
    """A packet that answers our question, whatever it holds, with and without its very words."""
    for rrtype in RRType:
        query = query_for("a.example.org", rrtype)
        asked = octets[:4] + b"\0\1" + octets[6:12] + query.section
        for packet in (octets, asked + octets[12:], asked + octets[12 + len(query.section) :]):
            heard = read_message(query, packet)
            if heard is not None and heard.reply is not None:
                read(heard.reply, query.name, rrtype, set())
