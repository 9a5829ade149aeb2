"""From a host's settings to a connection that is ready for MAIL: resolve, connect, banner, EHLO, STARTTLS.

RFC 5321 3.1, 3.2, 4.1.4; RFC 3207. Names are resolved by the system, not by the verifiers' resolver, and remembered
for 30 s. Whatever goes wrong is NoConnectionError: never the client's fault, so never a 5xx.

An opportunistic TLS handshake that fails is trouble too; the mail waits rather than fall back in silence.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.settings import HostSettings, RelaySettings, RelaySettingsError, TlsMode
from gateway.errors import GatewayError
from gateway.smtp.client import STARTTLS, Capabilities, ServerReply, ehlo_command, helo_command

# DESIGN.md section 6
_NAMES_CACHE_S = 30.0


class NoConnectionError(GatewayError):
    """There is no usable connection. `error` is a token of gateway.relaying.Delivery; the message is for the log."""

    def __init__(self, error: str, detail: str) -> None:
        super().__init__(detail)
        self.error = error


class Opener:
    """Opens connections to one host. Raises RelaySettingsError when its TLS settings cannot be used."""

    def __init__(self, host: HostSettings, settings: RelaySettings) -> None:
        self._host = host
        self._connect_timeout_s = settings.connect_timeout_s
        self._reply_timeout_s = settings.reply_timeout_s
        self._ehlo = ehlo_command(settings.hostname)
        self._helo = helo_command(settings.hostname)
        self._tls = _tls_context(host)
        self._addresses: list[str] = []
        self._addresses_until = 0.0

    async def open(self, deadline: float, on_idle_end: Callable[[Connection], None]) -> Connection:
        """A connection after EHLO, and after STARTTLS where it is used. Raises NoConnectionError."""
        connection = await self._connect(deadline, on_idle_end)
        try:
            await self._greet(connection, deadline)
        except BaseException:
            connection.abort()
            raise
        return connection

    async def _connect(self, deadline: float, on_idle_end: Callable[[Connection], None]) -> Connection:
        loop = asyncio.get_running_loop()
        end = min(deadline, loop.time() + self._connect_timeout_s)
        failure = ""
        try:
            async with asyncio.timeout_at(end):
                addresses = await self._resolve(loop)
        except (OSError, UnicodeError) as exc:  # TimeoutError is an OSError
            raise NoConnectionError("connect", f"cannot resolve: {_words(exc)}") from exc
        for tried, address in enumerate(addresses):
            # an address that does not answer leaves their share to the others
            share_s = (end - loop.time()) / (len(addresses) - tried)
            try:
                async with asyncio.timeout(share_s):
                    _, connection = await loop.create_connection(
                        lambda: Connection(loop, on_idle_end), address, self._host.port
                    )
            except OSError as exc:
                failure = f"{address}: {_words(exc)}"
            else:
                return connection
        raise NoConnectionError("connect", failure)

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> list[str]:
        if loop.time() >= self._addresses_until:
            found = await loop.getaddrinfo(self._host.host, self._host.port, type=socket.SOCK_STREAM)
            # in the system's order (RFC 6724), each once
            self._addresses = list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
            self._addresses_until = loop.time() + _NAMES_CACHE_S
        return self._addresses

    async def _greet(self, connection: Connection, deadline: float) -> None:
        replies = await connection.banner(self._reply_deadline(deadline))
        if not replies or replies[0].code != 220:
            raise NoConnectionError("banner", _said(connection, replies))
        await self._hello(connection, deadline)
        if self._host.tls is TlsMode.NONE:
            return
        if connection.capabilities.starttls:
            await self._start_tls(connection, deadline)
        elif self._host.tls is not TlsMode.OPPORTUNISTIC:
            raise NoConnectionError("tls", "STARTTLS is not offered")

    async def _hello(self, connection: Connection, deadline: float) -> None:
        replies = await connection.exchange(self._ehlo, 1, self._reply_deadline(deadline))
        if replies and replies[0].is_ok:
            connection.capabilities = Capabilities.parse(replies[0])
            return
        # RFC 5321 3.2: a server without EHLO refuses it for good, and HELO may follow
        if replies and 500 <= replies[0].code < 600 and not connection.trouble:
            replies = await connection.exchange(self._helo, 1, self._reply_deadline(deadline))
            if replies and replies[0].is_ok:
                return
        raise NoConnectionError("ehlo", _said(connection, replies))

    async def _start_tls(self, connection: Connection, deadline: float) -> None:
        replies = await connection.exchange(STARTTLS, 1, self._reply_deadline(deadline))
        # `trouble`: text behind the reply was sent before TLS and must not count after it (CVE-2011-0411's class)
        if not replies or replies[0].code != 220 or connection.trouble:
            raise NoConnectionError("tls", _said(connection, replies))
        assert self._tls is not None
        loop = asyncio.get_running_loop()
        timeout_s = max(0.001, self._reply_deadline(deadline) - loop.time())
        try:
            await connection.start_tls(self._tls, self._host.tls_name or self._host.host, timeout_s)
        except (OSError, ValueError) as exc:
            raise NoConnectionError("tls", _words(exc)) from exc
        await self._hello(connection, deadline)

    def _reply_deadline(self, deadline: float) -> float:
        return min(deadline, asyncio.get_running_loop().time() + self._reply_timeout_s)


def _tls_context(host: HostSettings) -> ssl.SSLContext | None:
    if host.tls is TlsMode.NONE:
        return None
    try:
        context = ssl.create_default_context(cafile=host.tls_ca_file or None)
    except (OSError, ValueError) as exc:
        raise RelaySettingsError(f"tls_ca_file {host.tls_ca_file!r} of {host}: {exc}") from exc
    # RFC 8996: no TLS 1.0, 1.1
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if host.tls is not TlsMode.VERIFY:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _said(connection: Connection, replies: list[ServerReply]) -> str:
    """What there is to log: the refusal, or else the trouble."""
    if replies and replies[0].code >= 200:
        return str(replies[0].code) + b" ".join((b"", *replies[0].lines))[:200].decode(
            "ascii", "backslashreplace"
        )
    return connection.trouble or "not an answer"


def _words(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__
