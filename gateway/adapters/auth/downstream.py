"""A mail server's own submission port, asked by logging in there with the client's credentials (RFC 4954, 8314).

Only over TLS with a certificate that is valid for the name, since the password goes there. 535 is a refusal; all else
that is not 235 is an outage: the server says something about us, or about itself, and nothing about the password.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.authentication import AuthUnavailableError
from gateway.errors import GatewayError
from gateway.smtp.client import (
    QUIT,
    STARTTLS,
    DownstreamProtocolError,
    ReplyReader,
    ServerReply,
    ehlo_command,
)
from gateway.smtp.sasl import MAX_AUTH_LINE

if TYPE_CHECKING:
    from gateway.session import Session
    from gateway.smtp.sasl import Credentials

# More than a StreamReader ever holds (twice its limit of 64 KiB, and one read of 256 KiB): what stayed in its buffer
# would be read behind the handshake as if it had come in TLS
_BLOCK_BYTES = 1_048_576
# RFC 4954 6
_ACCEPTED, _REFUSED, _GO_ON = 235, 535, 334
# RFC 3463 3.8, RFC 4954 6: the credentials are what is wrong, whatever the code in front of it
_CREDENTIALS_INVALID = b"5.7.8 "


class DownstreamSettingsError(GatewayError):
    """The CA file, or the name, cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class DownstreamSettings:
    """The server; `hostname` is said in EHLO. `tls_name` empty: `host`; `tls_ca_file` empty: the system's CAs."""

    host: str
    port: int
    hostname: str
    tls_implicit: bool = False
    tls_ca_file: str = ""
    tls_name: str = ""


class DownstreamBackend:
    """Logs in and leaves. Raises DownstreamSettingsError."""

    def __init__(self, settings: DownstreamSettings) -> None:
        self._settings = settings
        try:
            self._tls = ssl.create_default_context(cafile=settings.tls_ca_file or None)
        except (OSError, ValueError) as exc:
            raise DownstreamSettingsError(
                f"submission.auth.tls_ca_file {settings.tls_ca_file!r}: {exc}"
            ) from exc
        # RFC 8996: no TLS 1.0, 1.1
        self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # it says which names no certificate can have; asyncio would at each attempt, and leave the socket open
            name = settings.tls_name or settings.host
            self._tls.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=name)
        except (ValueError, TypeError) as exc:  # TypeError: NUL
            raise DownstreamSettingsError(f"submission.auth.tls_name {settings.tls_name!r}: {exc}") from exc

    async def check(self, credentials: Credentials, session: Session) -> str | None:
        """The name that the server took, None when it refuses. Raises AuthUnavailableError."""
        settings = self._settings
        try:
            reader, writer = await asyncio.open_connection(
                settings.host,
                settings.port,
                ssl=self._tls if settings.tls_implicit else None,
                server_hostname=(settings.tls_name or settings.host) if settings.tls_implicit else None,
            )
        except (OSError, UnicodeError) as exc:  # ssl.SSLError is an OSError
            raise AuthUnavailableError(f"downstream: {exc}") from exc
        dialogue = _Dialogue(reader, writer)
        try:
            offered = await self._greet(dialogue)
            reply = await _authenticate(dialogue, credentials, offered)
            writer.write(QUIT)
        except (OSError, DownstreamProtocolError) as exc:
            # their texts hold nothing of what we wrote
            raise AuthUnavailableError(f"downstream: {exc}") from exc
        finally:
            writer.close()
        if reply.code == _ACCEPTED:
            return credentials.user
        if reply.code == _REFUSED or (reply.code >= 500 and reply.lines[0].startswith(_CREDENTIALS_INVALID)):
            return None
        raise AuthUnavailableError(f"downstream: it answered AUTH with {reply.code}")

    async def _greet(self, dialogue: _Dialogue) -> frozenset[str]:
        """Everything up to AUTH; the mechanisms that are offered."""
        settings, hello = self._settings, ehlo_command(self._settings.hostname)
        _expect(220, await dialogue.reply(), "banner")
        reply = await dialogue.ask(hello)
        _expect(250, reply, "EHLO")
        if not settings.tls_implicit:
            if not any(line.upper() == b"STARTTLS" for line in reply.lines):
                raise AuthUnavailableError("downstream: it does not offer STARTTLS")
            _expect(220, await dialogue.ask(STARTTLS), "STARTTLS")
            await dialogue.start_tls(self._tls, settings.tls_name or settings.host)
            reply = await dialogue.ask(hello)
            _expect(250, reply, "EHLO")
        lines = [line.decode("latin-1").upper().replace("AUTH=", "AUTH ").split() for line in reply.lines[1:]]
        return frozenset(word for verb, *words in filter(None, lines) if verb == "AUTH" for word in words)


class _Dialogue:
    """Commands and replies, one at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._replies = ReplyReader()

    async def ask(self, command: bytes) -> ServerReply:
        self._writer.write(command)
        return await self.reply()

    async def reply(self) -> ServerReply:
        replies: list[ServerReply] = []
        while not replies:
            data = await self._reader.read(_BLOCK_BYTES)
            if not data:
                raise AuthUnavailableError("downstream: it closed the connection")
            replies = self._replies.feed(data)
        # RFC 3207 4.2: what stands behind the reply to STARTTLS is somebody else's; elsewhere nobody asked for it
        if len(replies) > 1 or not self._replies.is_empty:
            raise AuthUnavailableError("downstream: it said more than it was asked for")
        return replies[0]

    async def start_tls(self, context: ssl.SSLContext, name: str) -> None:
        self._replies = ReplyReader()
        await self._writer.start_tls(context, server_hostname=name)


async def _authenticate(
    dialogue: _Dialogue, credentials: Credentials, offered: frozenset[str]
) -> ServerReply:
    user, password = credentials.user.encode(), credentials.password.encode()
    if "PLAIN" in offered:
        command = b"AUTH PLAIN " + base64.b64encode(b"\0".join([b"", user, password])) + b"\r\n"
        assert len(command) <= MAX_AUTH_LINE  # both parts are far shorter
        return await dialogue.ask(command)
    if "LOGIN" not in offered:
        raise AuthUnavailableError("downstream: it offers neither PLAIN nor LOGIN")
    reply = await dialogue.ask(b"AUTH LOGIN\r\n")
    for part in (user, password):
        if reply.code != _GO_ON:
            return reply
        reply = await dialogue.ask(base64.b64encode(part) + b"\r\n")
    return reply


def _expect(code: int, reply: ServerReply, what: str) -> None:
    if reply.code != code:
        raise AuthUnavailableError(f"downstream: it answered {what} with {reply.code}")
