"""clamav: whether a clamd finds malware in a message (clamd(8), INSTREAM).

    [policy.clamav.settings]
    clamd = "/run/clamav/clamd.ctl"

The message is streamed to clamd, over a Unix socket or TCP. Mail with malware is refused with 550 5.7.1 that names the
signature, which the sender's own people may want to know. Signatures that are only a guess (`Heuristics.*`, `PUA.*`)
may be left out of account by `ignore`.

clamd out of reach, an error of it, or no answer in time is a failure, for which `on_error` decides: by default the mail
is deferred, since who scans for malware wants no mail unscanned.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

from gateway.api import (
    Message,
    OnError,
    Policy,
    Reply,
    Services,
    Transaction,
    Trust,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)

# clamd(8): "stream: Eicar FOUND"; the session is closed behind it
_ANSWER = re.compile(rb"stream: (?:(OK)|(.+) (FOUND|ERROR))")
_MAX_ANSWER_BYTES = 4096
_UNPRINTABLE = re.compile(r"[^\x21-\x7e]+")
_SIZE = struct.Struct(">I")
_END = _SIZE.pack(0)


class ClamdError(Exception):
    """clamd gave no verdict."""


class TooLargeError(ClamdError):
    """The message is larger than clamd's own StreamMaxLength: no later attempt would be."""


class OnFound(StrEnum):
    """What becomes of mail in which something was found."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"
    DEFER = "defer"
    REJECT = "reject"


class OnTooLarge(StrEnum):
    """What becomes of mail that is too large to be scanned."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class ClamavSettings:
    """[policy.clamav.settings]."""

    clamd: str = field(
        default="/run/clamav/clamd.ctl", metadata={"doc": "clamd's Unix socket, or its `HOST:PORT`"}
    )
    on_found: OnFound = field(default=OnFound.REJECT, metadata={"doc": "malware was found"})
    ignore: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "signatures that count for nothing, e.g. `Heuristics.*`; `*` and `?` stand for others"
        },
    )
    max_message_bytes: int = field(
        default=26_214_400,
        metadata={"doc": "a larger message is not scanned; no more than clamd's own StreamMaxLength"},
    )
    on_too_large: OnTooLarge = field(
        default=OnTooLarge.CONTINUE, metadata={"doc": "a message is larger than that"}
    )

    def __post_init__(self) -> None:
        host, _, port = self.clamd.rpartition(":")
        if not self.clamd.startswith("/") and not (host and port.isdecimal() and 0 < int(port) < 65_536):
            raise ValueError("clamd is neither the path of a socket nor HOST:PORT")


class Clamav(Policy[ClamavSettings]):
    """Asks once for each message."""

    name = "clamav"
    Settings = ClamavSettings
    exempt = (Trust.TRUSTED,)
    on_error = OnError.DEFER
    timeout_s = 20.0
    calls_out = True

    def __init__(self, settings: ClamavSettings, services: Services) -> None:
        super().__init__(settings, services)
        counted = services.metrics.counters("scans_total", "Messages, by what came of them", ("result",))
        self._counted = {word: counted.labels(word) for word in ("clean", "found", "ignored", "too_large")}

    async def on_eom(self, tx: Transaction) -> Verdict:
        """Raises ClamdError and OSError."""
        assert tx.message is not None
        if tx.message.size_bytes > self.settings.max_message_bytes:
            return self._too_large()
        try:
            signature = await self._scan(tx.message)
        except TooLargeError:
            return self._too_large()
        if not signature:
            self._counted["clean"].inc()
            return proceed(reason="clamav_clean")
        evidence = _Found(signature)
        if any(fnmatchcase(signature, pattern) for pattern in self.settings.ignore):
            self._counted["ignored"].inc()
            return proceed(reason="clamav_ignored", evidence=evidence)
        self._counted["found"].inc()
        text = f"The message carries malware: {signature}"
        match self.settings.on_found:
            case OnFound.CONTINUE:
                return proceed(reason="clamav_found", evidence=evidence)
            case OnFound.QUARANTINE:
                return quarantine("clamav_found", evidence=evidence)
            case OnFound.DEFER:
                return defer("clamav_found", Reply(451, "4.7.1", text), evidence=evidence)
            case OnFound.REJECT:
                return reject("clamav_found", Reply(550, "5.7.1", text), evidence=evidence)

    def _too_large(self) -> Verdict:
        self._counted["too_large"].inc()
        if self.settings.on_too_large is OnTooLarge.QUARANTINE:
            return quarantine("clamav_too_large")
        return proceed(reason="clamav_too_large")

    async def _scan(self, message: Message) -> str:
        """The name of the signature that fits, "" for none. The engine's deadline ends it."""
        with await _connected(self.settings.clamd) as connection:
            # clamd may have its word before it has everything, and then it reads no more
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(_send(connection, message))
                answer = await _answer(connection)
                sending.cancel()
        return signature_of(answer)


async def _connected(clamd: str) -> socket.socket:
    """A connection. Raises OSError.

    Streams of asyncio are of no use here: one that cannot write any more does not give what there is to read.
    """
    loop = asyncio.get_running_loop()
    host, _, port = clamd.rpartition(":")
    if clamd.startswith("/"):
        found: list[tuple[int, object]] = [(socket.AF_UNIX, clamd)]
    else:
        infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        found = [(family, address) for family, _, _, _, address in infos]
    failure = OSError(f"{clamd} has no address")
    for family, address in found:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, address)  # type: ignore[arg-type]  # of its own family
        except OSError as exc:
            connection.close()
            failure = exc
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failure


async def _send(connection: socket.socket, message: Message) -> None:
    """clamd(8) INSTREAM: each block with its length in front, one of none at the end."""
    loop = asyncio.get_running_loop()
    # what clamd has said, if anything, tells why it took no more
    with suppress(ConnectionError):
        await loop.sock_sendall(connection, b"zINSTREAM\0")
        for block in message.blocks():
            await loop.sock_sendall(connection, _SIZE.pack(len(block)) + block)
            # a clamd that takes all at once is no reason for the others to wait
            await asyncio.sleep(0)
        await loop.sock_sendall(connection, _END)


async def _answer(connection: socket.socket) -> bytes:
    """What clamd says, up to a NUL, its end, or a limit."""
    loop = asyncio.get_running_loop()
    answer = b""
    with suppress(ConnectionError):
        while b"\0" not in answer and len(answer) < _MAX_ANSWER_BYTES:
            block = await loop.sock_recv(connection, _MAX_ANSWER_BYTES)
            if not block:
                break
            answer += block
    return answer.partition(b"\0")[0]


def signature_of(answer: bytes) -> str:
    """What clamd's answer names, "" where it found nothing. Raises ClamdError."""
    found = _ANSWER.fullmatch(answer.strip())
    if answer.startswith(b"INSTREAM size limit exceeded"):
        raise TooLargeError
    if found is None:
        raise ClamdError(f"no answer of clamd: {answer[:200]!r}")
    if found[1]:
        return ""
    word = _UNPRINTABLE.sub("_", found[2].decode("latin-1"))[:200]
    if found[3] == b"ERROR":
        raise ClamdError(word)
    return word


@dataclass(frozen=True, slots=True)
class _Found:
    """The signature."""

    signature: str

    def lines(self) -> Sequence[str]:
        return (f"clamd found {self.signature}",)
