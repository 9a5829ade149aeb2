"""The auth socket of Dovecot, as a client of its authentication protocol, version 1 (doc.dovecot.org, auth_protocol).

The credentials go as PLAIN in base64, so that no octet of a name means anything to the protocol. Over TCP they are as
safe as that network is: Dovecot has no TLS there.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from typing import TYPE_CHECKING

from gateway.authentication import AuthUnavailableError

if TYPE_CHECKING:
    from gateway.session import Session
    from gateway.smtp.sasl import Credentials

_VERSION = b"VERSION\t1\t1\n"
# Dovecot takes no lines over 8 KiB from us; its own greeting has a few hundred octets
_MAX_LINE_BYTES = 16_384
_MAX_LINES = 100
# Dovecot's own process ids are no larger, and a client's must differ from those of all others
_MAX_CLIENT_ID = 2**31 - 1
# strescape.c, str_tabescape
_ESCAPED = {"0": "\0", "1": "\001", "t": "\t", "r": "\r", "n": "\n"}


class DovecotBackend:
    """Asks the socket at a path, or at host and port."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._address = address

    async def check(self, credentials: Credentials, session: Session) -> str | None:
        """The user's name as Dovecot has it, None when it refuses. Raises AuthUnavailableError."""
        try:
            reader, writer = await self._connect()
        except OSError as exc:
            raise AuthUnavailableError(f"dovecot: {exc}") from exc
        try:
            return await self._ask(reader, writer, credentials, session)
        except (OSError, asyncio.LimitOverrunError, asyncio.IncompleteReadError, UnicodeDecodeError) as exc:
            # an IncompleteReadError is the end of the connection; none of them holds what we wrote
            raise AuthUnavailableError(f"dovecot: {type(exc).__name__}") from exc
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._address, str):
            return await asyncio.open_unix_connection(self._address, limit=_MAX_LINE_BYTES)
        host, port = self._address
        return await asyncio.open_connection(host, port, limit=_MAX_LINE_BYTES)

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        credentials: Credentials,
        session: Session,
    ) -> str | None:
        writer.write(_VERSION + f"CPID\t{secrets.randbelow(_MAX_CLIENT_ID) + 1}\n".encode())
        mechanisms: set[str] = set()
        for _ in range(_MAX_LINES):
            command, *words = await _line(reader)
            if command == "VERSION" and words[:1] != ["1"]:
                raise AuthUnavailableError("dovecot: it speaks another version of the protocol")
            if command == "MECH":
                mechanisms.update(words[:1])
            if command == "DONE":
                break
        if "PLAIN" not in mechanisms:
            raise AuthUnavailableError("dovecot: it does not offer PLAIN (auth_mechanisms)")
        response = base64.b64encode(
            b"\0".join([b"", credentials.user.encode(), credentials.password.encode()])
        ).decode("ascii")
        writer.write(
            # nologin: no login process will ask about it; resp is always the last
            f"AUTH\t1\tPLAIN\tservice=smtp\tnologin\tsecured\trip={session.client}\trport={session.port}"
            f"\tresp={response}\n".encode("ascii")
        )
        for _ in range(_MAX_LINES):
            command, *words = await _line(reader)
            if words[:1] != ["1"]:
                continue
            if command == "OK":
                return _user(words[1:]) or credentials.user
            if command == "FAIL":
                if "temp" in words[1:] or "code=temp_fail" in words[1:]:
                    raise AuthUnavailableError("dovecot: it has a temporary failure")
                return None
            if command == "CONT":
                break
        raise AuthUnavailableError("dovecot: it said what is no answer")


async def _line(reader: asyncio.StreamReader) -> list[str]:
    line = (await reader.readuntil(b"\n"))[:-1].decode("utf-8")
    return [_unescaped(word) for word in line.split("\t")]


def _unescaped(word: str) -> str:
    first, *rest = word.split("\001")
    return first + "".join([_ESCAPED.get(each[:1], each[:1]) + each[1:] for each in rest])


def _user(words: list[str]) -> str:
    user = next((word.removeprefix("user=") for word in words if word.startswith("user=")), "")
    if not user.isprintable():
        raise AuthUnavailableError("dovecot: it gave a user whose name holds control characters")
    return user
