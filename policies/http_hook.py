"""http_hook: a policy in any language, as a service of one's own that is asked by HTTP.

    [policy.http_hook.settings]
    url = "http://127.0.0.1:8080/judge"
    stages = ["eom"]

At each stage that is listed the service gets a JSON object by POST, with the session, the envelope, what other policies
found, and at `eom` the message's header, with `send_content` all of it. It answers with an action, and may give a
reason and a reply, and fields to put above the message. docs/http-hook.md has both schemas, and a service to begin
with.

Whatever else comes of it is a failure of the service, for which `on_error` decides: no answer within `timeout_s`,
another status than 200 or 204, what is no answer. It may be asked twice about one message, so it should keep no count
of its own.
"""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from gateway.api import (
    AddField,
    HttpError,
    HttpResponse,
    Message,
    OnError,
    Policy,
    Recipient,
    Reply,
    Services,
    Session,
    Stage,
    Transaction,
    Trust,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)

VERSION = 1
"""Of the contract; it grows by what is asked and answered in addition, and this number when something else changes."""
REFUSED = Reply(550, "5.7.1", "Refused by policy")
REFUSED_NOW = Reply(451, "4.7.1", "Refused by policy for now, please try again later")

_MAX_ANSWER_BYTES = 65_536
_MAX_FIELDS = 20
_YIELD_EVERY = 16  # blocks


class Says(StrEnum):
    """What a service may answer."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"
    DEFER = "defer"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class HttpHookSettings:
    """[policy.http_hook.settings]."""

    url: str = field(metadata={"doc": "where the service is, `http://` or `https://`"})
    socket: Path | None = field(
        default=None, metadata={"doc": "a Unix socket to connect to instead of the URL's host"}
    )
    stages: tuple[Stage, ...] = field(
        default=(Stage.EOM,), metadata={"doc": "when it is asked: `connect`, `ehlo`, `mail`, `rcpt`, `eom`"}
    )
    send_content: bool = field(
        default=False, metadata={"doc": "at `eom`: send the whole message, not only its header"}
    )
    max_message_bytes: int = field(
        default=26_214_400, metadata={"doc": "a larger message is sent without its content all the same"}
    )
    token_file: Path | None = field(
        default=None, metadata={"doc": "file with a token, sent as `Authorization: Bearer`"}
    )

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("url is not http://HOST... or https://HOST...")
        if parts.username is not None:
            raise ValueError("url holds a user: secrets do not belong there")
        if not self.stages:
            raise ValueError("stages is empty")


class HttpHook(Policy[HttpHookSettings]):
    """Asks, and makes a verdict of the answer."""

    name = "http_hook"
    Settings = HttpHookSettings
    after = ("spf", "dkim", "arc", "dmarc")
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)
    on_error = OnError.DEFER
    needs_http = True

    def __init__(self, settings: HttpHookSettings, services: Services) -> None:
        super().__init__(settings, services)
        self._headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)

    @classmethod
    def stages(cls, settings: HttpHookSettings | None = None) -> frozenset[Stage]:
        """Those of the settings."""
        return super().stages() if settings is None else frozenset(settings.stages)

    async def start(self) -> None:
        """Read the token. Raises OSError and UnicodeDecodeError."""
        if self.settings.token_file is not None:
            token = self.settings.token_file.read_text("ascii").strip()
            self._headers += (("Authorization", f"Bearer {token}"),)

    async def on_connect(self, session: Session) -> Verdict:
        return await self._asked(Stage.CONNECT, session)

    async def on_ehlo(self, session: Session) -> Verdict:
        return await self._asked(Stage.EHLO, session)

    async def on_mail(self, tx: Transaction) -> Verdict:
        return await self._asked(Stage.MAIL, tx.session, tx)

    async def on_rcpt(self, tx: Transaction, rcpt: Recipient) -> Verdict:
        return await self._asked(Stage.RCPT, tx.session, tx, rcpt)

    async def on_eom(self, tx: Transaction) -> Verdict:
        return await self._asked(Stage.EOM, tx.session, tx)

    async def _asked(
        self, stage: Stage, session: Session, tx: Transaction | None = None, rcpt: Recipient | None = None
    ) -> Verdict:
        """Raises HttpError."""
        settings = self.settings
        message = tx.message if tx is not None and stage is Stage.EOM else None
        text = json.dumps(question(stage, session, tx, rcpt)).encode()
        socket = str(settings.socket or "")
        if message is None or not settings.send_content or message.size_bytes > settings.max_message_bytes:
            response = await self.services.http.request(
                "POST",
                settings.url,
                content=text,
                headers=self._headers,
                socket=socket,
                max_bytes=_MAX_ANSWER_BYTES,
            )
            return verdict(response)
        # the last member of the last member: `..."content": "BASE64"}}`
        before, behind = text[:-2] + b', "content": "', b'"}}'
        size = len(before) + (await _plain_bytes(message) + 2) // 3 * 4 + len(behind)

        def content() -> Iterator[bytes]:
            yield before
            yield from _base64(message.blocks())
            yield behind

        response = await self.services.http.request(
            "POST",
            settings.url,
            content=content,
            # small servers know no other way to tell where a request ends
            headers=(*self._headers, ("Content-Length", str(size))),
            socket=socket,
            max_bytes=_MAX_ANSWER_BYTES,
        )
        return verdict(response)


def question(
    stage: Stage, session: Session, tx: Transaction | None, rcpt: Recipient | None
) -> dict[str, object]:
    """What the service is asked, without the content; `message` stands last."""
    tls = session.tls
    asked: dict[str, object] = {
        "version": VERSION,
        "stage": stage,
        "id": session.id if tx is None else tx.id,
        "session": {
            "id": session.id,
            "client": str(session.client),
            "port": session.port,
            "address_source": session.address_source,
            "helo": session.helo,
            "esmtp": session.esmtp,
            "tls": None if tls is None else {"version": tls.version, "cipher": tls.cipher},
            "trust": session.trust,
            "user": session.user,
        },
    }
    if tx is None:
        return asked
    envelope = tx.envelope
    asked["envelope"] = {
        "mail_from": None if envelope.mail_from is None else str(envelope.mail_from),
        "rcpts": [str(each.mailbox) for each in envelope.rcpts],
        "body_type": envelope.body_type,
        "smtputf8": envelope.smtputf8,
        "size_hint": envelope.size_hint,
    }
    if rcpt is not None:
        asked["rcpt"] = str(rcpt.mailbox)
    asked["results"] = [
        {
            "method": each.method,
            "result": each.result,
            "reason": each.reason,
            "properties": dict(each.properties),
        }
        for each in tx.results
    ]
    if stage is Stage.EOM and tx.message is not None:
        header = b64encode(tx.message.header.octets).decode()
        asked["message"] = {"size_bytes": tx.message.size_bytes, "header": header}
    return asked


def verdict(response: HttpResponse) -> Verdict:
    """What an answer means. Raises HttpError for what is none, whoever made it."""
    if response.status == 204:
        return proceed()
    if response.status != 200:
        raise HttpError("protocol", f"status {response.status}")
    try:
        answer = json.loads(response.content)
        return _verdict(_object(answer))
    except (ValueError, TypeError, RecursionError) as exc:
        raise HttpError("protocol", f"the answer is none: {exc}"[:300]) from exc


def _verdict(answer: Mapping[str, object]) -> Verdict:
    """Raises ValueError and TypeError."""
    says = Says(_text(answer.get("action")))
    reason = _text(answer.get("reason", "")) or f"hook_{says}"
    fields = answer.get("add_fields", [])
    if not isinstance(fields, list) or len(fields) > _MAX_FIELDS:
        raise ValueError(f"add_fields is no array of at most {_MAX_FIELDS}")
    edits = [AddField(_text(each.get("name")), _text(each.get("value"))) for each in map(_object, fields)]
    given = answer.get("reply")
    reply = None if given is None else _reply(_object(given))
    match says:
        case Says.CONTINUE:
            return proceed(reason=reason, edits=edits)
        case Says.QUARANTINE:
            return quarantine(reason, edits=edits)
        case Says.DEFER:
            return defer(reason, reply or REFUSED_NOW)
        case Says.REJECT:
            return reject(reason, reply or REFUSED)


def _reply(given: Mapping[str, object]) -> Reply:
    code = given.get("code")
    if not isinstance(code, int) or isinstance(code, bool):
        raise TypeError("code is no number")
    return Reply(code, _text(given.get("enhanced", f"{code // 100}.7.1")), _text(given.get("text")))


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where an object belongs")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text belongs")
    return value


async def _plain_bytes(message: Message) -> int:
    """The octets of the message without dot-stuffing; a large one is read in turns."""
    size = 0
    for number, block in enumerate(message.blocks()):
        size += len(block)
        if number % _YIELD_EVERY == _YIELD_EVERY - 1:
            await asyncio.sleep(0)
    return size


def _base64(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """RFC 4648 4 of all blocks together."""
    left = b""
    for block in blocks:
        octets = left + block
        end = len(octets) // 3 * 3
        left = octets[end:]
        yield b64encode(octets[:end])
    yield b64encode(left)
