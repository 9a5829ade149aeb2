"""A handler for aiosmtpd: an existing server of it asks our gatekeeper, policies and relay about its mail.

    async with open_gatekeeper(config) as gatekeeper:          # gateway.embedding
        server = await loop.create_server(lambda: SMTP(GatewayHandler(gatekeeper)), "0.0.0.0", 25)

One handler serves any number of sessions. What is promised elsewhere holds here too: 250 for content only behind the
downstream's own 250, the octets as they came, trouble of ours is 4xx, one log line for each transaction. Paths and
parameters are parsed by our own parser; what aiosmtpd refuses by itself never comes here.

What aiosmtpd 1.4.6 cannot do, and `mxgate serve` does:

- no PIPELINING, CHUNKING, DSN, LIMITS and ENHANCEDSTATUSCODES; its own replies have no enhanced codes, and it says 500
  where it does not like a line;
- the whole message is in memory, twice for a moment, and reaches policies that watch the body at its end;
- CONNECT is asked with the first EHLO or HELO, behind the banner; a refusal there is the answer to that command;
- lines of content end at its own `line_length_limit` of 1000 octets unless yours is larger; what it breaks off or
  finds too long or too big it answers itself (500, 552), and no policy hears of it;
- no limits of connections, of clients, of errors, of a slow sender; `command_call_limit` and `timeout` are its own;
- input before the banner and behind DATA is no violation to it;
- the reply is on its way, not yet read by the client, when `on_outcome` begins.

A PROXY header is believed from `proxy_protocol_from` only (aiosmtpd asks all or nobody for one, by
`proxy_protocol_timeout`). Who has proved who it is by AUTH has trust `authenticated`, and is the session's user where
`AuthResult.auth_data` has a `login`, as a LoginPassword has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any
from weakref import WeakKeyDictionary

from aiosmtpd.proxy_protocol import ProxyData
from aiosmtpd.smtp import SMTP
from aiosmtpd.smtp import Envelope as TheirEnvelope
from aiosmtpd.smtp import Session as TheirSession

from gateway.gatekeeper import Answer, Conversation, Gatekeeper
from gateway.session import AddressSource, TlsInfo, Trust, client_address
from gateway.smtp import reply
from gateway.smtp.command import (
    CommandError,
    Extension,
    MailCommand,
    RcptCommand,
    SimpleCommand,
    parse_command,
)
from gateway.smtp.content import BdatDecoder, Fault
from gateway.smtp.reply import Reply

_BLOCK_BYTES = 64 * 1024
_NOWHERE = IPv4Address("127.0.0.1")  # the other end of a socket that has no address
_LOCAL = 0  # the command of PROXY v2 for a connection of the balancer's own


@dataclass(slots=True)
class _Talk:
    """One connection: its conversation, and what the open transaction of aiosmtpd is to us."""

    conversation: Conversation
    refusal: Reply | None = None  # of CONNECT: whatever is said, this is the answer
    smtputf8: bool = False
    recipients: int = 0


class GatewayHandler:
    """What aiosmtpd calls. `max_recipients` is of one transaction, `max_line_bytes` of one line without its CRLF."""

    def __init__(
        self,
        gatekeeper: Gatekeeper,
        *,
        max_recipients: int = 200,
        max_line_bytes: int = 8192,
        proxy_protocol_from: Sequence[IPv4Network | IPv6Network] = (),
    ) -> None:
        self._gatekeeper = gatekeeper
        self._max_recipients = max_recipients
        self._max_line_bytes = max_line_bytes
        self._balancers = tuple(proxy_protocol_from)
        self._talks: WeakKeyDictionary[SMTP, _Talk] = WeakKeyDictionary()
        self._behind: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for what runs behind the replies: policies that are told of an outcome."""
        await asyncio.gather(*self._behind, return_exceptions=True)

    # --- the hooks of aiosmtpd ---------------------------------------------------------------------------

    async def handle_PROXY(  # noqa: N802  # aiosmtpd's name, as below
        self, server: SMTP, session: TheirSession, envelope: TheirEnvelope, proxy_data: ProxyData
    ) -> bool:
        peer, _ = _address(session.peer)
        if not any(peer in network for network in self._balancers):
            self._gatekeeper.services.log.warning("proxy.refused", peer=str(peer), error="unlisted")
            return False
        return True

    async def handle_EHLO(  # noqa: N802
        self,
        server: SMTP,
        session: TheirSession,
        envelope: TheirEnvelope,
        hostname: str,
        responses: list[str],
    ) -> list[str]:
        refusal = await self._greeted(server, session, "EHLO", hostname)
        return [_line(refusal)] if refusal is not None else self._offered(responses)

    async def handle_HELO(  # noqa: N802
        self, server: SMTP, session: TheirSession, envelope: TheirEnvelope, hostname: str
    ) -> str:
        refusal = await self._greeted(server, session, "HELO", hostname)
        return f"250 {self._gatekeeper.settings.hostname}" if refusal is None else _line(refusal)

    async def handle_MAIL(  # noqa: N802
        self,
        server: SMTP,
        session: TheirSession,
        envelope: TheirEnvelope,
        address: str,
        mail_options: list[str],
    ) -> str:
        talk = self._talks[server]
        conversation = talk.conversation
        if session.authenticated:
            conversation.session = replace(
                conversation.session, trust=Trust.AUTHENTICATED, user=_user(session.auth_data)
            )
        extensions = self._gatekeeper.extensions()
        line = " ".join([f"MAIL FROM:{_path(address)}", *mail_options])
        try:
            command = parse_command(_octets(line), extensions.keywords)
        except CommandError as exc:
            return self._say(server, Answer(exc.reply, exc.close))
        assert isinstance(command, MailCommand)
        if command.envelope.size_hint > extensions.size:
            return _line(reply.TOO_BIG)
        conversation.reset()
        answer = await conversation.mail(command.envelope)
        if answer.reply.is_positive:
            talk.smtputf8, talk.recipients = command.envelope.smtputf8, 0
            envelope.mail_from = address
            envelope.mail_options.extend(mail_options)
        return self._say(server, answer)

    async def handle_RCPT(  # noqa: N802
        self,
        server: SMTP,
        session: TheirSession,
        envelope: TheirEnvelope,
        address: str,
        rcpt_options: list[str],
    ) -> str:
        talk = self._talks[server]
        line = " ".join([f"RCPT TO:{_path(address)}", *rcpt_options])
        try:
            command = parse_command(_octets(line), self._gatekeeper.extensions().keywords, talk.smtputf8)
        except CommandError as exc:
            return self._say(server, Answer(exc.reply, exc.close))
        assert isinstance(command, RcptCommand)
        if talk.recipients >= self._max_recipients:
            # RFC 5321 4.5.3.1.10: the client sends to the others in another transaction
            return _line(reply.TOO_MANY_RECIPIENTS)
        answers = await talk.conversation.rcpt([command.rcpt])
        (answer,) = answers.replies
        if answer.is_positive:
            talk.recipients += 1
            envelope.rcpt_tos.append(address)
            envelope.rcpt_options.extend(rcpt_options)
        return self._say(server, Answer(answer, answers.close))

    async def handle_DATA(  # noqa: N802
        self, server: SMTP, session: TheirSession, envelope: TheirEnvelope
    ) -> str:
        conversation = self._talks[server].conversation
        # the octets also where aiosmtpd was told to decode them; unstuffed, as after BDAT
        fault = await self._feed(conversation, envelope.original_content or b"")
        answer = await conversation.eom(fault)
        self._tell(conversation)
        return self._say(server, answer)

    async def handle_RSET(  # noqa: N802
        self, server: SMTP, session: TheirSession, envelope: TheirEnvelope
    ) -> str:
        if (talk := self._talks.get(server)) is not None:
            talk.conversation.reset()
        return _line(reply.OK)

    async def handle_QUIT(  # noqa: N802
        self, server: SMTP, session: TheirSession, envelope: TheirEnvelope
    ) -> str:
        return _line(reply.BYE)

    def handle_STARTTLS(  # noqa: N802
        self, server: SMTP, session: TheirSession, envelope: TheirEnvelope
    ) -> bool:
        if (talk := self._talks.get(server)) is not None:
            talk.conversation.reset()
            talk.conversation.tls_started(_tls((session.ssl or {}).get("ssl_object")) or TlsInfo("", ""))
        return True

    async def handle_exception(self, error: Exception) -> str:
        """A defect of ours or of aiosmtpd is no refusal for good."""
        self._gatekeeper.services.log.error("session.failed", error=repr(error))
        return _line(reply.INTERNAL)

    # --- our side ------------------------------------------------------------------------------------------

    async def _greeted(self, server: SMTP, session: TheirSession, verb: str, hostname: str) -> Reply | None:
        """The first thing that a client says, or says again; what refuses it."""
        talk = self._talks.get(server)
        if talk is None:
            talk = self._talks[server] = self._begun(server, session)
            if (answer := await talk.conversation.connect()) is not None:
                talk.refusal = answer.reply
        if talk.refusal is not None:
            self._say(server, Answer(talk.refusal, close=True))
            return talk.refusal
        try:
            command = parse_command(_octets(f"{verb} {hostname}"))
        except CommandError as exc:
            self._say(server, Answer(exc.reply, exc.close))
            return exc.reply
        assert isinstance(command, SimpleCommand)
        talk.conversation.reset()
        refused = await talk.conversation.ehlo(command.argument, esmtp=verb == "EHLO")
        if refused is not None:
            self._say(server, refused)
            return refused.reply
        session.host_name = hostname
        return None

    def _begun(self, server: SMTP, session: TheirSession) -> _Talk:
        client, port, source = _client(session)
        assert server.transport is not None
        tls = _tls(server.transport.get_extra_info("ssl_object"))
        conversation = self._gatekeeper.open(client, port, tls, source)
        # aiosmtpd has no hook for the end of a connection, but one task for all of it, in which this runs
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: conversation.reset())
        return _Talk(conversation)

    def _offered(self, responses: list[str]) -> list[str]:
        """What aiosmtpd offers, but for what the downstreams do not take."""
        extensions = self._gatekeeper.extensions()
        kept = []
        for response in responses:
            keyword, _, value = response[4:].partition(" ")
            if (
                keyword in (Extension.SMTPUTF8, Extension.EIGHT_BIT_MIME)
                and keyword not in extensions.keywords
            ):
                continue
            if keyword == Extension.SIZE:
                size = min(int(value), extensions.size)
                kept.append(f"{response[:4]}{keyword} {size}")
                continue
            kept.append(response)
        return kept

    async def _feed(self, conversation: Conversation, content: bytes) -> Fault | None:
        """Have the content looked at as it would be on the wire, in turns; what is wrong with it."""
        conversation.begin_content(is_stuffed=False)
        decoder = BdatDecoder(
            max_bytes=self._gatekeeper.extensions().size, max_line_bytes=self._max_line_bytes
        )
        decoder.begin_chunk(len(content))
        for at in range(0, len(content), _BLOCK_BYTES):
            block, _ = decoder.feed(content[at : at + _BLOCK_BYTES])
            if block:
                conversation.content(block)
            await asyncio.sleep(0)
        if end := decoder.finish():
            conversation.content(end)
        return decoder.fault

    def _tell(self, conversation: Conversation) -> None:
        """What no client waits for."""
        if (telling := conversation.outcome()) is None:
            return
        task = asyncio.create_task(_run(telling))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    def _say(self, server: SMTP, answer: Answer) -> str:
        """The reply as aiosmtpd writes it; where the connection is to end, that is when it has been written."""
        if answer.close and server.transport is not None:
            # aiosmtpd writes without a pause between this and its next turn
            asyncio.get_running_loop().call_soon(server.transport.close)
        return _line(answer.reply)


async def _run(telling: Coroutine[None, None, None]) -> None:
    await telling


def _line(answer: Reply) -> str:
    return answer.wire.decode("ascii").removesuffix("\r\n")


def _path(address: str) -> str:
    """The null reverse-path comes with its brackets, every other without."""
    return address if address == "<>" else f"<{address}>"


def _octets(line: str) -> bytes:
    """What the client said; aiosmtpd decodes with this error handler."""
    return line.encode("utf-8", "surrogateescape")


def _client(session: TheirSession) -> tuple[IPv4Address | IPv6Address, int, AddressSource]:
    """Whose the connection is, and how that is known."""
    told = session.proxy_data
    peer, port = _address(session.peer)
    if told is None or told.command == _LOCAL:
        return peer, port, AddressSource.SOCKET
    if isinstance(told.src_addr, IPv4Address | IPv6Address):
        return client_address(str(told.src_addr)), told.src_port or 0, AddressSource.PROXY
    # a client that the balancer cannot name is hidden by it
    return peer, port, AddressSource.HIDDEN


def _address(peer: Any) -> tuple[IPv4Address | IPv6Address, int]:
    if isinstance(peer, tuple) and len(peer) >= 2:
        return client_address(peer[0]), int(peer[1])
    return _NOWHERE, 0


def _user(auth_data: Any) -> str | None:
    """Who has authenticated, where the authenticator has said so as aiosmtpd's own LoginPassword does."""
    login = getattr(auth_data, "login", None)
    if isinstance(login, bytes):
        login = login.decode("utf-8", "backslashreplace")
    return login if isinstance(login, str) and login else None


def _tls(ssl_object: Any) -> TlsInfo | None:
    if ssl_object is None:
        return None
    cipher = ssl_object.cipher()
    return TlsInfo(ssl_object.version() or "", cipher[0] if cipher else "")
