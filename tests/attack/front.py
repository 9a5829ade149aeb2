"""Between the attack lab and submission: the lab speaks neither TLS nor AUTH, and its probe wants to send mail.

`front.py ROLE LISTEN PLAIN IMPLICIT SOCKET`: ROLE is what a client of the lab is,

- `stranger`: its octets go to the port of STARTTLS as they are. Only the lab's probe (its MAIL line is known) goes on
  in a session of a user, since it asks whether mail still gets through;
- `user`: its octets go to the port of implicit TLS, and with its first EHLO it is logged in, which it does not see.

SOCKET is where it answers in the place of a Dovecot, for one user. LISTEN, PLAIN and IMPLICIT are ports of 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
import sys
from contextlib import suppress

HOST = "127.0.0.1"
PROBE = b"MAIL FROM:<probe@good.test>\r\n"
AUTH = b"AUTH PLAIN " + base64.b64encode(b"\0lab\0lab") + b"\r\n"
TLS = ssl.create_default_context()
TLS.check_hostname = False
TLS.verify_mode = ssl.CERT_NONE

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Session:
    """One client of the lab."""

    def __init__(self, client: Streams, role: str, plain: int, implicit: int) -> None:
        self._client = client
        self._is_user = role == "user"
        self._plain, self._implicit = plain, implicit
        self._is_logged_in = False

    async def run(self) -> None:
        reader, writer = self._client
        if self._is_user:
            self._gateway = await asyncio.open_connection(HOST, self._implicit, ssl=TLS)
        else:
            self._gateway = await asyncio.open_connection(HOST, self._plain)
        back = asyncio.create_task(self._back())
        try:
            while data := await reader.read(65536):
                if self._is_user and not self._is_logged_in and _is_only_ehlo(data):
                    back = await self._log_in(back, data, self._gateway)
                elif data == PROBE and not self._is_user:
                    fresh = await asyncio.open_connection(HOST, self._implicit, ssl=TLS)
                    await _reply(fresh[0])
                    back = await self._log_in(back, b"EHLO mail.good.test\r\n", fresh, data)
                elif not self._gateway[1].is_closing():
                    self._gateway[1].write(data)
                    with suppress(OSError):
                        await self._gateway[1].drain()
            with suppress(OSError, NotImplementedError):
                self._gateway[1].write_eof()
            await asyncio.wait([back], timeout=5)
        finally:
            back.cancel()
            self._gateway[1].transport.abort()
            writer.close()

    async def _log_in(
        self, back: asyncio.Task[None], hello: bytes, gateway: Streams, behind: bytes = b""
    ) -> asyncio.Task[None]:
        """EHLO and AUTH; the client sees the reply to EHLO, or with `behind` only what comes of that."""
        back.cancel()
        with suppress(asyncio.CancelledError):
            await back
        if gateway is not self._gateway:
            self._gateway[1].transport.abort()
        self._gateway = gateway
        gateway[1].write(hello)
        answer = await _reply(gateway[0])
        if answer.startswith(b"250"):
            gateway[1].write(AUTH)
            said = await _reply(gateway[0])
            assert said.startswith(b"235"), said
            self._is_logged_in = True
        if behind:
            gateway[1].write(behind)
        else:
            self._client[1].write(answer)
        return asyncio.create_task(self._back())

    async def _back(self) -> None:
        """From the gateway to the client, to the end of either."""
        with suppress(OSError):
            while data := await self._gateway[0].read(65536):
                self._client[1].write(data)
                await self._client[1].drain()
            # a TLS connection ends as a whole, the lab's only from our side: what it still says is read
            self._client[1].write_eof()


def _is_only_ehlo(data: bytes) -> bool:
    return data[:5].upper() == b"EHLO " and data.find(b"\n") == len(data) - 1


async def _reply(reader: asyncio.StreamReader) -> bytes:
    lines = b""
    while True:
        line = await reader.readline()
        lines += line
        if line[3:4] != b"-":
            return lines


async def _dovecot(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nDONE\n")
    while line := await reader.readline():
        if line.startswith(b"AUTH\t"):
            is_lab = line.rstrip().endswith(base64.b64encode(b"\0lab\0lab"))
            writer.write(b"OK\t1\tuser=lab\n" if is_lab else b"FAIL\t1\n")
    writer.close()


async def main(role: str, listen: int, plain: int, implicit: int, socket: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ssl.SSLError, asyncio.IncompleteReadError):
            await Session((reader, writer), role, plain, implicit).run()

    await asyncio.start_unix_server(_dovecot, socket)
    server = await asyncio.start_server(serve, HOST, listen, limit=1 << 20)
    await server.serve_forever()


if __name__ == "__main__":
    _, role_, listen_, plain_, implicit_, socket_ = sys.argv
    asyncio.run(main(role_, int(listen_), int(plain_), int(implicit_), socket_))
