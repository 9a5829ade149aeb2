"""rspamd: what an rspamd says of a message (https://docs.rspamd.com/developers/protocol/), by HTTP `/checkv2`.

    [policy.rspamd.settings]
    url = "http://127.0.0.1:11333"

It is told what we know: client, its confirmed name, HELO, TLS, sender, recipients and the transaction's id; the
message is streamed to it. Its action becomes a verdict by the table of the settings. What it found stands in the field
X-Mxgate-Rspamd, score and symbols, and mail that it calls spam and lets through also has `X-Spam: Yes`.

rspamd never changes the message here: `rewrite subject` is only said in that field. `discard` would lose mail, so it is
a refusal. Its own greylisting is best off (`enabled = false`), since `greylist` says more about the sender.

No answer, or one that is none, is a failure, for which `on_error` decides; by default the mail goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from pathlib import Path
from urllib.parse import urlsplit

from gateway.api import (
    AddField,
    AddressSource,
    HeaderEdit,
    HttpError,
    HttpResponse,
    Policy,
    Reply,
    Result,
    Transaction,
    Trust,
    Verdict,
    defer,
    proceed,
    quarantine,
    reject,
)
from policies.verify.iprev import confirm

FIELD = "X-Mxgate-Rspamd"
REJECTED = "Spam message rejected"
DEFERRED = "Try again later"

_MAX_ANSWER_BYTES = 2**20
_MAX_SYMBOLS = 100
# Of our field: what is over it is left out, the lightest symbols first.
_MAX_FIELD = 8000
# For the name of the client; it is no reason to keep the message waiting.
_NAME_TIMEOUT_S = 2.0
_MAX_OPTIONS = 5
_MAX_TEXT = 400
# what parts the words of the field, too
_NOT_IN_WORDS = re.compile(r"[^\x21-\x7e]+|[;,\[\]]")
_NOT_IN_REPLIES = re.compile(r"[^\x20-\x7e]+")


class OnAction(StrEnum):
    """What follows from an action of rspamd."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"
    DEFER = "defer"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class RspamdSettings:
    """[policy.rspamd.settings]."""

    url: str = field(
        default="http://127.0.0.1:11333", metadata={"doc": "where rspamd is: a normal worker or a proxy"}
    )
    socket: Path | None = field(
        default=None, metadata={"doc": "a Unix socket to connect to instead of the URL's host"}
    )
    on_reject: OnAction = field(default=OnAction.REJECT, metadata={"doc": "its action `reject`"})
    on_soft_reject: OnAction = field(default=OnAction.DEFER, metadata={"doc": "its action `soft reject`"})
    on_greylist: OnAction = field(default=OnAction.CONTINUE, metadata={"doc": "its action `greylist`"})
    on_add_header: OnAction = field(
        default=OnAction.CONTINUE, metadata={"doc": "its action `add header`: probably spam"}
    )
    on_rewrite_subject: OnAction = field(
        default=OnAction.CONTINUE, metadata={"doc": "its action `rewrite subject`: probably spam"}
    )
    on_quarantine: OnAction = field(default=OnAction.QUARANTINE, metadata={"doc": "its action `quarantine`"})
    on_discard: OnAction = field(
        default=OnAction.REJECT, metadata={"doc": "its action `discard`; nothing is ever lost here"}
    )
    max_message_bytes: int = field(
        default=20_971_520, metadata={"doc": "a larger message is not sent to it, and goes on"}
    )
    show_symbols: bool = field(
        default=True, metadata={"doc": f"put {FIELD} with score and symbols above the message"}
    )

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("url is not http://HOST... or https://HOST...")
        if parts.username is not None:
            raise ValueError("url holds a user: secrets do not belong there")


_SPAM = ("add header", "rewrite subject", "quarantine")
_ACTIONS = ("reject", "soft reject", "greylist", "discard", *_SPAM)


class Rspamd(Policy[RspamdSettings]):
    """Asks once for each message."""

    name = "rspamd"
    Settings = RspamdSettings
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)
    timeout_s = 15.0
    needs_http = True
    own_fields = (FIELD,)

    async def on_eom(self, tx: Transaction) -> Verdict:
        """Raises HttpError."""
        message, settings = tx.message, self.settings
        assert message is not None
        if message.size_bytes > settings.max_message_bytes:
            return proceed(reason="rspamd_too_large")
        response = await self.services.http.request(
            "POST",
            settings.url.rstrip("/") + "/checkv2",
            content=message.blocks,
            headers=await self._told(tx),
            socket=str(settings.socket or ""),
            max_bytes=_MAX_ANSWER_BYTES,
        )
        found = read_answer(response)
        edits: list[HeaderEdit] = []
        if settings.show_symbols:
            edits.append(AddField(FIELD, found.field()))
        if found.action in _SPAM:
            edits.append(AddField("X-Spam", "Yes"))
        return self._verdict(found, edits)

    def _verdict(self, found: Found, edits: Sequence[HeaderEdit]) -> Verdict:
        # an operator may have actions of his own
        word = found.action.replace(" ", "_") if found.action in _ACTIONS else "other"
        reason = "rspamd_pass" if found.action == "no action" else f"rspamd_{word}"
        match getattr(self.settings, f"on_{word}", OnAction.CONTINUE):
            case OnAction.QUARANTINE:
                return quarantine(reason, edits=edits, evidence=found)
            case OnAction.DEFER:
                return defer(reason, Reply(451, "4.7.1", found.text or DEFERRED), evidence=found)
            case OnAction.REJECT:
                return reject(reason, Reply(550, "5.7.1", found.text or REJECTED), evidence=found)
            case _:
                return proceed(reason=reason, edits=edits, evidence=found)

    async def _told(self, tx: Transaction) -> list[tuple[str, str]]:
        """What rspamd knows of the session; it has the message's own header itself."""
        session = tx.session
        told = [("Queue-Id", tx.id), ("Helo", _line(session.helo))]
        if session.address_source is not AddressSource.HIDDEN:
            told.append(("IP", str(session.client)))
            confirmed = await self.services.dns.run(confirm(session.client), tx, timeout_s=_NAME_TIMEOUT_S)
            if confirmed.result is Result.PASS:
                told.append(("Hostname", _word(confirmed.name)))
        if session.user is not None:
            told.append(("User", _line(session.user)))
        if session.tls is not None:
            told += [("TLS-Version", session.tls.version), ("TLS-Cipher", session.tls.cipher)]
        mail_from = tx.envelope.mail_from
        told.append(("From", "<>" if mail_from is None else _line(str(mail_from))))
        return told + [("Rcpt", _line(str(each.mailbox))) for each in tx.envelope.rcpts]


@dataclass(frozen=True, slots=True)
class Symbol:
    """One of what rspamd found."""

    name: str
    score: float
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({self.score:.2f})[{','.join(self.options)}]"


@dataclass(frozen=True, slots=True)
class Found:
    """What rspamd says of a message; the evidence of a verdict. `text` is its words for the client, "" for none."""

    action: str
    score: float
    required: float
    symbols: tuple[Symbol, ...]
    text: str = ""

    def lines(self) -> Sequence[str]:
        return (f"{self.action}: {self.score:.2f} of {self.required:.2f}", *map(str, self.symbols))

    def field(self) -> str:
        """As X-Spamd-Result has it, one symbol a line."""
        value = f"{self.action}; score={self.score:.2f}; required={self.required:.2f}"
        for symbol in self.symbols:
            line = f";\r\n\t{symbol}"
            if len(value) + len(line) > _MAX_FIELD:
                break
            value += line
        return value


def read_answer(response: HttpResponse) -> Found:
    """Raises HttpError for what is no answer of rspamd."""
    if response.status != 200:
        raise HttpError("protocol", f"status {response.status}")
    try:
        return _found(json.loads(response.content))
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        raise HttpError("protocol", f"the answer is none of rspamd: {exc}"[:300]) from exc


def _found(answer: object) -> Found:
    """Raises ValueError and TypeError."""
    if not isinstance(answer, dict) or not isinstance(answer.get("action"), str):
        raise TypeError("it has no action")
    messages = _object(answer.get("messages"))
    text = messages.get("smtp_message")
    symbols = []
    for name, value in _object(answer.get("symbols")).items():
        one = _object(value)
        symbols.append(Symbol(_word(name), _number(one.get("score")), _options(one.get("options"))))
    symbols.sort(key=lambda each: (-abs(each.score), each.name))
    return Found(
        " ".join(_word(each) for each in answer["action"].split()[:5]),
        _number(answer.get("score")),
        _number(answer.get("required_score")),
        tuple(symbols[:_MAX_SYMBOLS]),
        _NOT_IN_REPLIES.sub(" ", text).strip()[:_MAX_TEXT] if isinstance(text, str) else "",
    )


def _options(value: object) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else []
    return tuple([_word(each) for each in texts[:_MAX_OPTIONS] if isinstance(each, str)])


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    """JSON has no bound for numbers, and 1e999 is one."""
    number = float(value) if isinstance(value, int | float) else 0.0
    if not isfinite(number):
        raise ValueError("a score is not finite")
    return number


def _word(text: str, at_most: int = 100) -> str:
    """What may stand in our field: printable ASCII without blanks and separators, and not too long."""
    return _NOT_IN_WORDS.sub("_", text)[:at_most]


def _line(text: str) -> str:
    """What the client said, as a header of HTTP: in UTF-8, without controls."""
    return "".join(each if each.isprintable() else "?" for each in text[:1000]).strip()
