"""A raw SMTP client: it sends exactly the bytes that a test gives and reads whole replies.

For what smtplib cannot or will not send: BDAT, pipelining, bytes that are wrong on purpose. Every read has a
deadline. A reply that breaks RFC 5321 4.2 is an AssertionError.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.e2e.net import Address

_REPLY_LINE = re.compile(r"([2-5]\d\d)([ -])(.*)")
_ENHANCED = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")


@dataclass(frozen=True, slots=True)
class Reply:
    """One SMTP reply with all its lines, as they came but for CRLF."""

    code: int
    lines: tuple[str, ...]

    @property
    def enhanced(self) -> str:
        """The enhanced status code of the first line, or ""."""
        found = _ENHANCED.match(self.lines[0][4:])
        return found.group() if found else ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The lines without codes."""
        return tuple(line[4:] for line in self.lines)

    def __str__(self) -> str:
        return " / ".join(self.lines)


class Client:
    """One connection. `tls` wraps it at once (implicit TLS); `timeout_s` is the deadline of each single read.

    `source` is the client's address: each of 127.0.0.0/8 is ours on Linux.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: ssl.SSLContext | None = None,
        timeout_s: float = 15,
        source: str | None = None,
    ) -> None:
        self._buffer = bytearray()
        bound = None if source is None else (source, 0)
        self.sock = socket.create_connection(address, timeout=timeout_s, source_address=bound)
        # what a test sends in pieces arrives in pieces
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.start_tls(tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection without QUIT."""
        self.sock.close()

    def start_tls(self, context: ssl.SSLContext) -> None:
        """The TLS handshake, nothing before it; a name that the certificate lacks is an ssl.SSLError."""
        self.sock = context.wrap_socket(self.sock, server_hostname="mx.example.org")

    def send(self, octets: bytes) -> None:
        """Exactly these octets, in one write where the system takes them."""
        self.sock.sendall(octets)

    def read_reply(self) -> Reply:
        """The next whole reply; ConnectionError when the connection ends before it."""
        lines: list[str] = []
        while True:
            line = self._read_line()
            parsed = _REPLY_LINE.fullmatch(line)
            assert parsed, f"not an SMTP reply line: {line!r}"
            lines.append(line)
            if parsed[2] == " ":
                codes = {line[:3] for line in lines}
                # RFC 5321 4.2.1: the code of each line is the same
                assert len(codes) == 1, f"one reply with several codes: {lines}"
                return Reply(int(parsed[1]), tuple(lines))

    def is_at_eof(self) -> bool:
        """Whether the server closes without another octet; waits for one or the other."""
        if self._buffer:
            return False
        try:
            self._buffer += (octets := self.sock.recv(65536))
        except (ConnectionError, ssl.SSLError):
            return True
        return not octets

    def discard(self) -> bytes:
        """Forget what was read and belongs to no reply; what that was."""
        octets = bytes(self._buffer)
        self._buffer.clear()
        return octets

    def command(self, line: str) -> Reply:
        """Send one line (UTF-8, CRLF is added) and read its reply."""
        self.send(line.encode() + b"\r\n")
        return self.read_reply()

    def hello(self, name: str = "client.example.net") -> Reply:
        """Read the banner and say EHLO; the reply to EHLO, which is positive."""
        banner = self.read_reply()
        assert banner.code == 220, banner
        reply = self.command(f"EHLO {name}")
        assert reply.code == 250, reply
        return reply

    def envelope(self, mail_from: str, rcpts: Sequence[str], parameters: str = "") -> list[Reply]:
        """MAIL and each RCPT, one after the other; their replies. Addresses without <>."""
        mail = self.command(f"MAIL FROM:<{mail_from}>{' ' if parameters else ''}{parameters}")
        return [mail, *(self.command(f"RCPT TO:<{rcpt}>") for rcpt in rcpts)]

    def data(self, content: bytes) -> Reply:
        """DATA with `content`, which ends in CRLF; the reply to the dot, or to DATA when that is not 354."""
        begin = self.command("DATA")
        if begin.code >= 400:
            return begin
        assert begin.code == 354, begin
        self.send(stuff(content) + b".\r\n")
        return self.read_reply()

    def bdat(self, chunk: bytes, *, last: bool = False) -> Reply:
        """One chunk of RFC 3030."""
        self.send(b"BDAT %d%s\r\n%b" % (len(chunk), b" LAST" if last else b"", chunk))
        return self.read_reply()

    def submit(self, mail_from: str, rcpts: Sequence[str], content: bytes) -> Reply:
        """One transaction on a greeted connection: the first refusal, or the reply to the content."""
        for reply in self.envelope(mail_from, rcpts):
            if reply.code != 250:
                return reply
        return self.data(content)

    def _read_line(self) -> str:
        while (end := self._buffer.find(b"\n")) < 0:
            octets = self.sock.recv(65536)
            if not octets:
                raise ConnectionError(f"the server closed; unread: {bytes(self._buffer)!r}")
            self._buffer += octets
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        assert line.endswith(b"\r\n"), f"a reply line ends in CRLF: {line!r}"
        assert line.isascii(), f"a reply line is ASCII: {line!r}"
        return line[:-2].decode("ascii")


def stuff(content: bytes) -> bytes:
    """Dot-stuffing of RFC 5321 4.5.2."""
    stuffed = content.replace(b"\r\n.", b"\r\n..")
    return b"." + stuffed if stuffed.startswith(b".") else stuffed
