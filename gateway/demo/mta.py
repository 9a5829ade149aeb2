"""The MTA behind the demo's gateway: aiosmtpd, which knows one recipient too few and keeps mail in a Maildir."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope

DOMAIN = "demo.test"
UNKNOWN = f"nobody@{DOMAIN}"
"""The one recipient of the domain that the MTA refuses."""

_NUMBERS = itertools.count(1)


async def serve(sock: socket.socket, maildir: Path) -> asyncio.Server:
    """Serve on the socket until the server is closed."""
    loop = asyncio.get_running_loop()
    handler = Downstream(maildir)
    return await loop.create_server(lambda: _Smtp(handler, loop), sock=sock)


class _Smtp(SMTP):
    """A server of aiosmtpd that takes what the gateway does."""

    # Real mail has lines longer than the 998 octets of RFC 5321 4.5.3.1.6, and the gateway passes them on.
    line_length_limit = 16384

    def __init__(self, handler: Downstream, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            handler,
            data_size_limit=0,  # none: the gateway has one
            enable_SMTPUTF8=True,
            hostname=f"mta.{DOMAIN}",
            ident="demo MTA",
            loop=loop,
        )


class Downstream:
    """The MTA as a handler of aiosmtpd: who exists, and where mail goes."""

    def __init__(self, maildir: Path) -> None:
        self._maildir = maildir

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, _server: object, _session: object, envelope: Envelope, address: str, rcpt_options: list[str]
    ) -> str:
        """Take everybody of the domain but one."""
        local, _, domain = address.lower().rpartition("@")
        # RFC 5321 4.5.1: postmaster needs no domain
        if domain != DOMAIN and (local, domain) != ("", "postmaster"):
            return "550 5.7.1 Relaying denied"
        if address.lower() == UNKNOWN:
            return "550 5.1.1 There is nobody of this name here"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(rcpt_options)
        return "250 2.1.5 Ok"

    async def handle_DATA(  # noqa: N802  # aiosmtpd's name
        self, _server: object, _session: object, envelope: Envelope
    ) -> str:
        """Say 250 when the message is on the disk, and not before."""
        assert isinstance(envelope.content, bytes)
        try:
            name = await asyncio.to_thread(store, self._maildir, envelope.content)
        except OSError as exc:
            sys.stderr.write(f"mxgate demo: the MTA cannot write to {self._maildir}: {exc.strerror}\n")
            return "452 4.3.1 The message cannot be stored now"
        return f"250 2.0.0 Stored as new/{name}"

    async def handle_exception(self, error: Exception) -> str:
        """Trouble of the MTA is no reason to refuse a message for good, which aiosmtpd would do."""
        traceback.print_exception(error)
        return "451 4.3.0 Temporary trouble"


def store(maildir: Path, content: bytes) -> str:
    """Deliver to a Maildir, as https://cr.yp.to/proto/maildir.html has it; the file's name in new/.

    On the disk when it returns: OSError, or a power cut before, leaves nothing in new/. The octets are those of the
    wire with their CRLF, so that they can be compared with what was sent.
    """
    now_ns = time.time_ns()
    seconds, microseconds = now_ns // 10**9, now_ns % 10**9 // 1000
    name = f"{seconds}.M{microseconds}P{os.getpid()}Q{next(_NUMBERS)}.{DOMAIN}"
    tmp, new = maildir / "tmp" / name, maildir / "new" / name
    try:
        with tmp.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        tmp.rename(new)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    # The name is durable when its directory is.
    directory = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return name
