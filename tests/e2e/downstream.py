"""A scriptable downstream MTA: it records the exact octets of each message and fails where a test says so.

It is strict on purpose: only CRLF.CRLF ends a message. A message counts as stored from the moment in which the
whole positive reply to its dot has been written; `messages` holds those, `unconfirmed` those that arrived up to the dot
and never got that reply. A thread per connection; `close` ends and joins them all.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn, assert_never

from tests.e2e.net import LOOPBACK, Address, free_port, wait_until

EXTENSIONS = ("PIPELINING", "SIZE 104857600", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES")
# How much of the content the sink has seen when a fault of Step.BODY happens.
BODY_FAULT_AFTER_BYTES = 200
# Between the pieces of a slow reply, and between the reads of slow content.
SLOW_REPLY_S = 0.15
SLOW_READ_S = 0.005
SLOW_READ_BYTES = 1024
LONG_REPLY_BYTES = 200_000
GARBAGE = b"\x16\x03\x01\x00\xff garbage\x00\r\n"


class Step(StrEnum):
    """Where the dialogue goes wrong; BODY is in the middle of the content, EOD at its dot."""

    BANNER = "banner"
    EHLO = "ehlo"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    BODY = "body"
    EOD = "eod"


class Fault(StrEnum):
    """What happens instead of (SLOW, LONG: along with) the right reply."""

    CLOSE = "close"
    RST = "rst"
    HANG = "hang"
    CLOSING = "421"  # the reply, then close
    TRANSIENT = "451"
    PERMANENT = "554"
    ODD = "odd"  # a positive reply of the wrong kind: 354 where 2xx is due, 250 where 354 is due
    GARBAGE = "garbage"
    SLOW = "slow"
    LONG = "long"
    REPLY_THEN_CLOSE = "reply-then-close"


@dataclass(frozen=True, slots=True)
class Received:
    """One message up to its dot; `wire` still holds the dot-stuffing, not the final dot."""

    mail_from: str  # the argument of MAIL FROM: with its parameters
    rcpts: tuple[str, ...]  # the arguments of RCPT TO:, accepted ones only
    wire: bytes

    @property
    def content(self) -> bytes:
        """The content as the client meant it (RFC 5321 4.5.2)."""
        return re.sub(rb"(?m)^\.", b"", self.wire)


class _SessionOverError(Exception):
    """The connection is at its end, by the script or by the peer."""


class Downstream:
    """Listens from the start. `behave` sets the faults for all that follows and forgets what was."""

    def __init__(self, extensions: tuple[str, ...] = EXTENSIONS) -> None:
        self.address: Address = (LOOPBACK, free_port())
        self.messages: list[Received] = []
        self.unconfirmed: list[Received] = []
        self.unheard: list[Received] = []  # of `messages`: the reply could not leave any more
        self.dots = 0  # messages that came up to their dot, answered or not
        self.commands: list[str] = []  # of all connections since the last `behave`
        self.extensions = extensions
        self.refused_rcpts: dict[str, str] = {}  # RCPT argument -> the reply it gets
        self._faults: Mapping[Step, Fault] = {}
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None
        self.up()

    def up(self) -> None:
        """Listen (again)."""
        listener = socket.create_server(self.address)
        self._listener = listener
        self._spawn(self._accept, listener)

    def down(self) -> None:
        """Refuse connections and drop those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            # close() alone leaves it listening as long as the other thread waits in accept()
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._drop()

    def behave(self, faults: Mapping[Step, Fault] | None = None) -> None:
        """Fail so from now on, on new connections; the old ones are closed and all records are cleared."""
        self._faults = dict(faults or {})
        self._drop()
        with self._lock:
            self.messages.clear()
            self.unconfirmed.clear()
            self.unheard.clear()
            self.dots = 0
            self.commands.clear()
        self.refused_rcpts = {}

    def close(self) -> None:
        """Stop; every thread has ended when this returns."""
        self.down()
        for thread in self._threads:
            thread.join(timeout=5)
            assert not thread.is_alive(), f"{thread.name} does not end"

    def rcpts_seen(self) -> list[str]:
        """The arguments of every RCPT that came, verification included."""
        return [line[8:] for line in list(self.commands) if line.upper().startswith("RCPT TO:")]

    def wait_for_message(self, within_s: float = 10) -> Received:
        """The first stored message."""
        return wait_until(lambda: self.messages, within_s=within_s, what="a message at the downstream")[0]

    def _spawn(self, target: object, sock: socket.socket) -> None:
        assert callable(target)
        thread = threading.Thread(
            target=target, args=(sock,), name=f"downstream:{self.address[1]}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _drop(self) -> None:
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already
        wait_until(
            lambda: not self._sockets.intersection(sockets), within_s=5, what="the sink's sessions ended"
        )

    def _accept(self, listener: socket.socket) -> None:
        while listener is self._listener:
            try:
                sock, _ = listener.accept()
            except OSError:
                return  # `down` closed it
            sock.settimeout(60)
            # a reply is one write, and several in a row must not wait for acknowledgements
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets.add(sock)
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        try:
            _Session(self, sock, self.faults_of_a_connection()).run()
        except (_SessionOverError, OSError):
            pass  # the end of a connection, by either side
        finally:
            sock.close()
            with self._lock:
                self._sockets.discard(sock)

    def faults_of_a_connection(self) -> Mapping[Step, Fault]:
        """How one that begins now will fail (asked by its session)."""
        return self._faults

    def store(self, message: Received, *, confirmed: bool) -> None:
        """Record one message (called by its session)."""
        with self._lock:
            (self.messages if confirmed else self.unconfirmed).append(message)


class _Session:
    """One connection of the sink."""

    def __init__(self, sink: Downstream, sock: socket.socket, faults: Mapping[Step, Fault]) -> None:
        self._sink = sink
        self._sock = sock
        self._faults = faults
        self._buffer = bytearray()
        self._mail_from = ""
        self._rcpts: list[str] = []
        self._is_confirmed = False

    def run(self) -> None:
        self._answer(Step.BANNER, "220 sink.example.org ESMTP")
        verb = ""
        while verb != "QUIT":
            line = self._read_line().decode("utf-8", "replace")
            self._sink.commands.append(line)
            verb = line.upper().split(":")[0].split(" ")[0]
            self._command(verb, line)

    def _command(self, verb: str, line: str) -> None:
        match verb:
            case "EHLO":
                lines = ("sink.example.org", *self._sink.extensions)
                first = "".join(f"250-{text}\r\n" for text in lines[:-1])
                self._answer(Step.EHLO, f"{first}250 {lines[-1]}")
            case "HELO":
                self._answer(Step.EHLO, "250 sink.example.org")
            case "MAIL":
                if self._answer(Step.MAIL, "250 2.1.0 Ok"):
                    self._mail_from, self._rcpts = line[10:], []
            case "RCPT":
                self._rcpt(line[8:])
            case "DATA" if not self._rcpts:
                self._write("503 5.5.1 No recipients")
            case "DATA":
                if self._answer(Step.DATA, "354 Go on"):
                    self._content()
            case "RSET":
                self._mail_from, self._rcpts = "", []
                self._write("250 2.0.0 Ok")
            case "NOOP" | "QUIT":
                self._write("250 2.0.0 Ok" if verb == "NOOP" else "221 2.0.0 Bye")
            case _:
                self._write("500 5.5.2 Unknown")

    def _rcpt(self, rcpt: str) -> None:
        if refusal := self._sink.refused_rcpts.get(rcpt):
            self._write(refusal)
        elif self._answer(Step.RCPT, "250 2.1.5 Ok"):
            self._rcpts.append(rcpt)

    def _content(self) -> None:
        fault = self._faults.get(Step.BODY)
        seen_bytes = 0
        # the line end in front of the dot belongs to the content (RFC 5321 4.1.1.4)
        while (end := self._content_end(seen_bytes)) < 0:
            seen_bytes = len(self._buffer)
            if fault is Fault.SLOW:
                time.sleep(SLOW_READ_S)
                self._read(SLOW_READ_BYTES)
            else:
                self._read()
            if fault is not None and fault is not Fault.SLOW and len(self._buffer) >= BODY_FAULT_AFTER_BYTES:
                self._answer(Step.BODY, "")
                raise _SessionOverError
        message = Received(self._mail_from, tuple(self._rcpts), bytes(self._buffer[:end]))
        del self._buffer[: end + 3]
        self._mail_from, self._rcpts = "", []
        self._is_confirmed = False
        self._sink.dots += 1
        try:
            self._answer(Step.EOD, "250 2.0.0 Stored", message)
        except OSError:
            # the connection was dropped between the two halves of `_confirm`
            if self._is_confirmed:
                self._sink.unheard.append(message)
            raise
        finally:
            if not self._is_confirmed:
                self._sink.store(message, confirmed=False)

    def _content_end(self, searched_bytes: int) -> int:
        """Where the content ends and its dot begins; -1 while there is no dot. Linear over many reads."""
        if self._buffer.startswith(b".\r\n"):
            return 0
        found = self._buffer.find(b"\r\n.\r\n", max(0, searched_bytes - 4))
        return found if found < 0 else found + 2

    def _answer(self, step: Step, right: str, message: Received | None = None) -> bool:
        """Give the right reply, or the step's fault; whether the reply was the right one.

        A message is stored just before the last octets of its confirmation leave: the client may have its 250
        before this thread runs again.
        """
        match self._faults.get(step):
            case None:
                self._confirm(message)
                self._write(right)
                return True
            case Fault.SLOW | Fault.LONG | Fault.REPLY_THEN_CLOSE as fault:
                self._answer_badly(fault, right, message)
                return True
            case Fault.CLOSE | Fault.RST | Fault.HANG as fault:
                self._end(fault)
            case Fault.ODD:
                self._write("250 2.0.0 Odd" if right.startswith("354") else "354 Odd")
            case Fault.GARBAGE:
                self._sock.sendall(GARBAGE)
            case Fault.CLOSING | Fault.TRANSIENT | Fault.PERMANENT as fault:
                self._write(f"{fault} {fault[0]}.3.9 As the test says at {step}")
                if fault is Fault.CLOSING:
                    raise _SessionOverError
            case fault:
                assert_never(fault)
        return False

    def _answer_badly(self, fault: Fault, right: str, message: Received | None) -> None:
        """The right reply, in an unkind way."""
        if fault is Fault.SLOW:
            for piece in (right[:2], right[2:5]):
                self._sock.sendall(piece.encode())
                time.sleep(SLOW_REPLY_S)
            right = right[5:]
        elif fault is Fault.LONG:
            right = f"{right[:3]} {'x' * LONG_REPLY_BYTES}"
        self._confirm(message)
        self._write(right)
        if fault is Fault.REPLY_THEN_CLOSE:
            raise _SessionOverError

    def _end(self, fault: Fault) -> NoReturn:
        """No reply at all."""
        if fault is Fault.RST:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        while fault is Fault.HANG:
            self._read()
        raise _SessionOverError

    def _confirm(self, message: Received | None) -> None:
        if message is not None:
            self._is_confirmed = True
            self._sink.store(message, confirmed=True)

    def _write(self, reply: str) -> None:
        self._sock.sendall(reply.encode() + b"\r\n")

    def _read_line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._read()
        line, _, rest = bytes(self._buffer).partition(b"\r\n")
        self._buffer[:] = rest
        return line

    def _read(self, at_most: int = 65536) -> None:
        octets = self._sock.recv(at_most)
        if not octets:
            raise _SessionOverError
        self._buffer += octets
