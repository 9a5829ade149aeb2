"""From a host's settings to a connection that is ready for MAIL: connect, PROXY, TLS, banner, EHLO, STARTTLS, XCLIENT.

RFC 5321 3.1, 3.2, 4.1.4; RFC 2033 (LHLO); RFC 3207; Postfix's XCLIENT_README; the PROXY protocol, version 2. Whatever
goes wrong is NoConnectionError: never the client's fault, so never a 5xx.

An opportunistic TLS handshake that fails is trouble too; the mail waits rather than fall back in silence.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.names import Addresses
from gateway.adapters.relay.settings import (
    HostSettings,
    Identity,
    Protocol,
    RelaySettings,
    RelaySettingsError,
    RouteSettings,
    TlsMode,
)
from gateway.errors import GatewayError
from gateway.session import Session, client_address
from gateway.smtp.client import (
    STARTTLS,
    Capabilities,
    ServerReply,
    ehlo_as_client,
    ehlo_command,
    helo_command,
    lhlo_command,
    proxy_v2,
    xclient_command,
)


class NoConnectionError(GatewayError):
    """There is no usable connection. `error` is a token of gateway.relaying.Delivery; the message is for the log.

    `is_about_client`: the downstream refused this client's identity, which says nothing about other clients. `host` is
    known once the error has left it.
    """

    def __init__(self, error: str, detail: str, *, is_about_client: bool = False) -> None:
        super().__init__(detail)
        self.error = error
        self.is_about_client = is_about_client
        self.host = ""


class Opener:
    """Opens connections to one host. Raises RelaySettingsError when its TLS settings cannot be used.

    `learn` is called with what the host offers us at EHLO, before the client's identity is passed on.
    """

    def __init__(
        self,
        host: HostSettings,
        route: RouteSettings,
        settings: RelaySettings,
        learn: Callable[[Capabilities], None],
    ) -> None:
        self.addresses = Addresses(host.host, host.port)
        self._host = host
        self._identity = route.identity
        self._hostname = settings.hostname
        self._is_lmtp = route.protocol is Protocol.LMTP
        self._connect_timeout_s = settings.connect_timeout_s
        self._hello_command = (lhlo_command if self._is_lmtp else ehlo_command)(settings.hostname)
        self._tls = _tls_context(host)
        self._learn = learn

    async def open(
        self, client: Session | None, deadline: float, on_idle_end: Callable[[Connection], None]
    ) -> Connection:
        """A connection that is ready for MAIL, of this client where its identity is passed on.

        None is ourselves: it tells that the host is there. Tries address after address; takes no longer than
        `connect_timeout_s` to connect and as long again to greet, and not beyond `deadline`. Raises NoConnectionError.
        """
        loop = asyncio.get_running_loop()
        connect_s = self._connect_timeout_s
        end = min(deadline, loop.time() + 2 * connect_s)
        addresses = await self._resolve(min(end, loop.time() + connect_s))
        failure = NoConnectionError("connect", "the name has no address")
        for tried, address in enumerate(addresses):
            started = loop.time()
            if started >= end:
                # the next attempt begins with this one
                raise failure
            try:
                # an address that does not answer leaves their share to the others
                share_s = min(end - started, connect_s / (len(addresses) - tried))
                try:
                    connection = await self._connect(address, share_s, on_idle_end)
                finally:
                    connect_s -= loop.time() - started
                await self._prepare(connection, client, end)
            except NoConnectionError as trouble:
                if trouble.is_about_client:
                    raise
                failure = trouble
                self.addresses.failed(address)
            else:
                return connection
        self.addresses.forget()
        raise failure

    async def _resolve(self, deadline: float) -> list[str]:
        try:
            async with asyncio.timeout_at(deadline):
                return await self.addresses.in_turn()
        except (OSError, UnicodeError) as exc:  # TimeoutError is an OSError
            raise NoConnectionError("connect", f"cannot resolve: {_words(exc)}") from exc

    async def _connect(
        self, address: str, timeout_s: float, on_idle_end: Callable[[Connection], None]
    ) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(loop, on_idle_end), address, self._host.port
                )
        except OSError as exc:
            raise NoConnectionError("connect", f"{address}: {_words(exc)}") from exc
        connection.address = address
        return connection

    async def _prepare(self, connection: Connection, client: Session | None, end: float) -> None:
        """Everything between the connection and MAIL; closes it when that fails."""
        deadline = min(end, asyncio.get_running_loop().time() + self._connect_timeout_s)
        try:
            if self._identity is Identity.PROXY_V2:
                source = None if client is None else (client.client, client.port)
                connection.preface(proxy_v2(source, (client_address(connection.address), self._host.port)))
            if self._host.tls_implicit:
                await self._start_tls(connection, deadline)
            await self._greet(connection, deadline)
            self._learn(connection.capabilities)
            if self._identity is Identity.XCLIENT:
                await self._introduce(connection, client, deadline)
        except BaseException:
            connection.abort()
            raise

    async def _greet(self, connection: Connection, deadline: float) -> None:
        replies = await connection.banner(deadline)
        if not replies or replies[0].code != 220:
            raise NoConnectionError("banner", _said(connection, replies))
        await self._hello(connection, deadline)
        if self._host.tls is TlsMode.NONE or self._host.tls_implicit:
            return
        if connection.capabilities.starttls:
            replies = await connection.exchange(STARTTLS, 1, deadline)
            # `trouble`: text behind the reply was sent before TLS and must not count after it (CVE-2011-0411's class)
            if not replies or replies[0].code != 220 or connection.trouble:
                raise NoConnectionError("tls", _said(connection, replies))
            await self._start_tls(connection, deadline)
            await self._hello(connection, deadline)
        elif self._host.tls is not TlsMode.OPPORTUNISTIC:
            raise NoConnectionError("tls", "STARTTLS is not offered")

    async def _hello(self, connection: Connection, deadline: float) -> None:
        replies = await connection.exchange(self._hello_command, 1, deadline)
        if replies and replies[0].is_ok:
            connection.capabilities = Capabilities.parse(replies[0])
            return
        # RFC 5321 3.2: a server without EHLO refuses it for good, and HELO may follow; RFC 2033 knows no such thing
        if replies and 500 <= replies[0].code < 600 and not connection.trouble and not self._is_lmtp:
            replies = await connection.exchange(helo_command(self._hostname), 1, deadline)
            if replies and replies[0].is_ok:
                return
        raise NoConnectionError("ehlo", _said(connection, replies))

    async def _start_tls(self, connection: Connection, deadline: float) -> None:
        assert self._tls is not None
        if self._host.tls_implicit and not connection.is_silent:
            raise NoConnectionError("tls", connection.trouble or "it spoke before TLS")
        timeout_s = max(0.001, deadline - asyncio.get_running_loop().time())
        try:
            await connection.start_tls(self._tls, self._host.tls_name or self._host.host, timeout_s)
        except (OSError, ValueError) as exc:
            raise NoConnectionError("tls", _words(exc)) from exc

    async def _introduce(self, connection: Connection, client: Session | None, deadline: float) -> None:
        """XCLIENT, and EHLO again, since the dialogue starts anew (XCLIENT_README)."""
        offered = connection.capabilities.xclient
        if "ADDR" not in offered:
            raise NoConnectionError("identity", "XCLIENT is not offered to us")
        if client is None:
            return
        try:
            command = xclient_command(client, offered)
        except ValueError as exc:
            raise NoConnectionError("identity", str(exc), is_about_client=True) from exc
        await self._as_client(connection, command, deadline)
        hello = ehlo_as_client(client, self._hostname)
        if self._is_lmtp:
            hello = hello.replace(b"EHLO", b"LHLO", 1)
        connection.capabilities = Capabilities.parse(await self._as_client(connection, hello, deadline))

    async def _as_client(self, connection: Connection, command: bytes, deadline: float) -> ServerReply:
        replies = await connection.exchange(command, 1, deadline)
        if not replies or connection.trouble:
            raise NoConnectionError("ehlo", _said(connection, replies))
        if not replies[0].is_ok:
            raise NoConnectionError("identity", _said(connection, replies), is_about_client=True)
        return replies[0]


def _tls_context(host: HostSettings) -> ssl.SSLContext | None:
    if host.tls_implicit and host.tls not in (TlsMode.ENCRYPT, TlsMode.VERIFY):
        raise RelaySettingsError(f"tls_implicit of {host} needs tls = encrypt or verify")
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
