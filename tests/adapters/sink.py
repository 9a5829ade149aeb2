"""A downstream that does what a test says, on a loopback port: it speaks SMTP, or fails at a chosen step.

    async with Sink(rcpt=[OK, say("550 5.1.1 No such user")]) as sink:
        ... sink.port, sink.messages, sink.commands ...

A step's value is one Do for every time, or a list of them: one for each time, then the default again. `gate` lets a
test hold a reply back until it has looked around; `until` waits for the sink to have seen something. Nothing sleeps.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

EXTENSIONS = ("PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "SIZE 1000000000")
_WAIT_S = 20.0
# commands with one reply and nothing behind it: what their step is called, what is said
_PLAIN = {
    b"HELO": ("helo", b"250 sink.example.org"),
    b"XCLI": ("xclient", b"220 sink.example.org ESMTP"),
    b"XFOR": ("xforward", b"250 2.0.0 Ok"),
    b"MAIL": ("mail", b"250 2.1.0 Sender ok"),
    b"RCPT": ("rcpt", b"250 2.1.5 Recipient ok"),
    b"RSET": ("rset", b"250 2.0.0 Reset"),
}


@dataclass(frozen=True)
class Do:
    """What happens at a step: wait for `gate`, write `say` as it stands (None: the default reply), `then`."""

    say: bytes | None = None
    then: Literal["go on", "close", "reset", "hang"] = "go on"
    gate: asyncio.Event | None = None


OK = Do()
CLOSE = Do(b"", "close")
RESET = Do(b"", "reset")
HANG = Do(b"", "hang")


def say(line: str, then: Literal["go on", "close", "reset", "hang"] = "go on") -> Do:
    """One reply line."""
    return Do(line.encode("latin-1") + b"\r\n", then)


@dataclass
class Stored:
    """One message as it came, still stuffed and without the dot; XFORWARD is among the commands."""

    commands: tuple[bytes, ...]
    wire: bytes
    peer: Peer


@dataclass
class Peer:
    """One connection: what it said in which pieces, whom it spoke for, and whether it has ended."""

    writer: asyncio.StreamWriter
    pieces: list[bytes] = field(default_factory=list)
    header: bytes = b""
    xclient: bytes = b""
    is_tls: bool = False
    is_closed: bool = False


class EndError(Exception):
    """This connection is over."""


class Sink:
    """Listens while the context lasts; what it has seen can be looked at any time.

    `tls` is offered as STARTTLS, or spoken from the first byte (`is_tls_implicit`). `has_proxy_header`: nothing is
    said before a PROXY header, version 2, has come.
    """

    def __init__(
        self,
        *,
        extensions: Sequence[str] = EXTENSIONS,
        tls: ssl.SSLContext | None = None,
        is_tls_implicit: bool = False,
        has_proxy_header: bool = False,
        content_after: int = 0,
        address: str = "127.0.0.1",
        port: int = 0,
        **steps: Do | list[Do],
    ) -> None:
        self.extensions = extensions
        self.messages: list[Stored] = []
        self.commands: list[bytes] = []
        self.peers: list[Peer] = []
        self.steps = steps
        self.port = port
        self._address = address
        self.content_bytes = 0
        self._tls = tls
        self._is_tls_implicit = is_tls_implicit
        self._has_proxy_header = has_proxy_header
        self._content_after = content_after
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._listener = socket.create_server((self._address, self.port))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._accepting is not None
        tasks = {self._accepting, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert self._listener is not None
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._listener is not None
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        header = b""
        try:
            if self._has_proxy_header:
                # Octet by octet, so that nothing of what follows is taken.
                while len(header) < 16 or len(header) < 16 + int.from_bytes(header[14:16]):
                    header += await loop.sock_recv(sock, 1)
            reader = asyncio.StreamReader()
            writers: list[asyncio.StreamWriter] = []
            protocol = asyncio.StreamReaderProtocol(reader, lambda _, writer: writers.append(writer))
            tls = self._tls if self._is_tls_implicit else None
            await loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls)
        except (OSError, asyncio.CancelledError):
            sock.close()
            return
        await self._talk(Peer(writers[0], header=header, is_tls=tls is not None), reader)

    async def until(self, claim: Callable[[Sink], object]) -> None:
        """Wait for the claim to become true."""
        async with asyncio.timeout(_WAIT_S):
            while not claim(self):
                self._changed.clear()
                await self._changed.wait()

    @property
    def open_peers(self) -> list[Peer]:
        return [peer for peer in self.peers if not peer.is_closed]

    # --- one connection ----------------------------------------------------------------------------

    async def _talk(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        self.peers.append(peer)
        self._changed.set()
        try:
            await self._step(peer, reader, "banner", b"220 sink.example.org ESMTP")
            await self._converse(peer, reader)
        except (EndError, OSError, asyncio.CancelledError):
            pass
        finally:
            peer.writer.transport.abort()
            peer.is_closed = True
            self._changed.set()

    async def _converse(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        transaction: list[bytes] = []
        buffer = bytearray()
        while True:
            line = await self._line(peer, reader, buffer)
            self.commands.append(line)
            self._changed.set()
            verb = line[:4].upper()
            match verb:
                case b"EHLO" | b"LHLO":
                    await self._step(peer, reader, "ehlo", self._capabilities(peer))
                case b"STAR":
                    await self._step(peer, reader, "starttls", b"220 go")
                    assert self._tls is not None
                    await peer.writer.start_tls(self._tls)
                    peer.is_tls = True
                case b"DATA":
                    if (await self._step(peer, reader, "data", b"354 go")).startswith(b"354"):
                        wire = await self._content(peer, reader, buffer)
                        self.messages.append(Stored(tuple(transaction), wire, peer))
                        transaction = []
                        self._changed.set()
                        await self._step(peer, reader, "dot", b"250 2.0.0 Stored as %d" % len(self.messages))
                case b"QUIT":
                    peer.writer.write(b"221 2.0.0 Bye\r\n")
                    return
                case _ if verb in _PLAIN:
                    if verb in (b"XFOR", b"MAIL", b"RCPT"):
                        transaction.append(line)
                    elif verb == b"RSET":
                        transaction = []
                    elif verb == b"XCLI":
                        peer.xclient = line
                    await self._step(peer, reader, *_PLAIN[verb])
                case _:
                    peer.writer.write(b"502 5.5.2 What\r\n")

    def _capabilities(self, peer: Peer) -> bytes:
        lines = ["sink.example.org", *self.extensions]
        if self._tls is not None and not peer.is_tls:
            lines.append("STARTTLS")
        return "\r\n".join([*(f"250-{each}" for each in lines[:-1]), f"250 {lines[-1]}"]).encode()

    async def _line(self, peer: Peer, reader: asyncio.StreamReader, buffer: bytearray) -> bytes:
        while (end := buffer.find(b"\r\n")) < 0:
            await self._more(peer, reader, buffer)
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line

    async def _content(self, peer: Peer, reader: asyncio.StreamReader, buffer: bytearray) -> bytes:
        wire = bytearray(b"\r\n")
        is_told = False
        while True:
            at = max(0, len(wire) - 4)
            wire += buffer
            buffer.clear()
            self.content_bytes = len(wire) - 2
            if len(wire) - 2 > self._content_after and not is_told:
                is_told = True
                self._changed.set()
                await self._step(peer, reader, "content", b"")
            if (end := wire.find(b"\r\n.\r\n", at)) >= 0:
                buffer += wire[end + 5 :]
                return bytes(wire[2 : end + 2])
            await self._more(peer, reader, buffer)

    async def _more(self, peer: Peer, reader: asyncio.StreamReader, buffer: bytearray) -> None:
        data = await reader.read(65536)
        if not data:
            raise EndError
        if len(peer.pieces) < 100:
            peer.pieces.append(data)
        buffer += data

    async def _step(self, peer: Peer, reader: asyncio.StreamReader, step: str, reply: bytes) -> bytes:
        do = self.steps.get(step, OK)
        if isinstance(do, list):
            do = do.pop(0) if do else OK
        if do.gate is not None:
            await do.gate.wait()
        said = (reply + b"\r\n" if reply else b"") if do.say is None else do.say
        if said:
            peer.writer.write(said)
            await peer.writer.drain()
        match do.then:
            case "close":
                # in order, behind what was said
                peer.writer.close()
                raise EndError
            case "reset":
                sock: socket.socket = peer.writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise EndError
            case "hang":
                while await reader.read(65536):
                    pass
                raise EndError
            case "go on":
                return said
