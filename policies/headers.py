"""headers: whether the header of a message is as RFC 5322 wants it, and whether the message runs in circles.

What is found has an action of its own, and all are `continue` unless set: honest mail breaks some of these rules every
day, so observe before you refuse. The strictest action of what is found counts; the refusal is 550 5.6.0 (a loop: 554
5.4.6), or 450 with the same in 4.x. Only the header is judged: what a line of the content may hold is the engine's
matter (`server.max_line_bytes`), and the author's domain that of dmarc.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import mktime_tz, parsedate_tz
from enum import StrEnum

from gateway.api import (
    Header,
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

# RFC 5322 3.6: at most one of each
_ONCE = (
    *(b"date", b"from", b"sender", b"reply-to", b"to", b"cc", b"bcc"),
    *(b"message-id", b"in-reply-to", b"references", b"subject"),
)
# RFC 5322 2.1.1, without CRLF
_MAX_LINE_BYTES = 998
# RFC 5322 2.2: a name is printable ASCII, and the colon follows it at once (4.5.3 only reads blanks there)
_NAME = re.compile(rb"[\x21-\x39\x3b-\x7e]+:")
# RFC 5322 2.2: of the controls only the tab, and CR and LF where a line ends
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")
_BY = re.compile(rb"(?:^|[\s)])by\s+([\w.:\[\]-]+)", re.IGNORECASE)
# RFC 5322 3.2.2: one that holds none
_COMMENT = re.compile(r" ?\((?:[^()\\]|\\.)*\) ?")
# A parser of dates is no place to spend time on what no date is so long as.
_MAX_DATE_BYTES = 200


class OnFinding(StrEnum):
    """What follows from a finding."""

    CONTINUE = "continue"
    QUARANTINE = "quarantine"
    DEFER = "defer"
    REJECT = "reject"


_ORDER = tuple(OnFinding)


@dataclass(frozen=True, slots=True)
class HeadersSettings:
    """[policy.headers.settings]."""

    on_missing: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "no Date or no From, which every message has"}
    )
    on_repeated: OnFinding = field(
        default=OnFinding.CONTINUE,
        metadata={"doc": "two of what stands once: From, Sender, To, Subject, Date, Message-ID and others"},
    )
    on_bad_date: OnFinding = field(
        default=OnFinding.CONTINUE,
        metadata={"doc": "a Date that is none, or lies more than `max_ahead_s` in the future"},
    )
    on_no_message_id: OnFinding = field(default=OnFinding.CONTINUE, metadata={"doc": "no Message-ID"})
    on_long_line: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "a line of the header with more than 998 octets"}
    )
    on_control: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "control characters in the header"}
    )
    on_eightbit: OnFinding = field(
        default=OnFinding.CONTINUE,
        metadata={"doc": "octets beyond ASCII in the header of mail without SMTPUTF8, or that are no UTF-8"},
    )
    on_malformed: OnFinding = field(
        default=OnFinding.CONTINUE, metadata={"doc": "a line that is no field, or a name that is none"}
    )
    on_loop: OnFinding = field(
        default=OnFinding.CONTINUE,
        metadata={"doc": "one host stands in `by` of more than `max_passes` Received fields"},
    )
    max_passes: int = field(default=10, metadata={"doc": "how often a message may pass one host"})
    max_ahead_s: float = field(default=2 * 86_400.0, metadata={"doc": "how far in the future a Date may lie"})

    def __post_init__(self) -> None:
        if self.max_passes < 1 or not 0 <= self.max_ahead_s < float("inf"):
            raise ValueError("max_passes is below 1, or max_ahead_s negative")


_TEXTS = {
    "missing": "The message has no Date or no From field",
    "repeated": "The message has a field twice that may stand once",
    "bad_date": "The Date field of the message holds no date, or one in the future",
    "no_message_id": "The message has no Message-ID field",
    "long_line": "The header of the message has a line that is too long",
    "control": "The header of the message holds control characters",
    "eightbit": "The header of the message holds characters beyond ASCII",
    "malformed": "The header of the message holds what is no field",
    "loop": "The message has passed one host too often, this looks like a loop",
}
_CODES = {"loop": (554, "5.4.6")}  # RFC 3463 3.5: a routing loop


class Headers(Policy[HeadersSettings]):
    """Judges the header once the message is there."""

    name = "headers"
    Settings = HeadersSettings
    exempt = (Trust.TRUSTED, Trust.AUTHENTICATED)

    def __init__(self, settings: HeadersSettings, services: Services) -> None:
        super().__init__(settings, services)
        found = services.metrics.counters("findings_total", "What was wrong with headers", ("finding",))
        self._found = {finding: found.labels(finding) for finding in _TEXTS}

    async def on_eom(self, tx: Transaction) -> Verdict:
        """Everything that is found, and the strictest action of it."""
        assert tx.message is not None
        findings = tuple(self._findings(tx.message.header, smtputf8=tx.envelope.smtputf8))
        if not findings:
            return proceed()
        for finding, _ in findings:
            self._found[finding].inc()
        worst = max((finding for finding, _ in findings), key=lambda each: _ORDER.index(self._action(each)))
        reason, evidence = f"headers_{worst}", _Evidence(findings)
        code, enhanced = _CODES.get(worst, (550, "5.6.0"))
        match self._action(worst):
            case OnFinding.CONTINUE:
                return proceed(reason=reason, evidence=evidence)
            case OnFinding.QUARANTINE:
                return quarantine(reason, evidence=evidence)
            case OnFinding.DEFER:
                return defer(reason, Reply(450, f"4{enhanced[1:]}", _TEXTS[worst]), evidence=evidence)
            case OnFinding.REJECT:
                return reject(reason, Reply(code, enhanced, _TEXTS[worst]), evidence=evidence)

    def _action(self, finding: str) -> OnFinding:
        action: OnFinding = getattr(self.settings, f"on_{finding}")
        return action

    def _findings(self, header: Header, *, smtputf8: bool) -> Iterator[tuple[str, str]]:
        """What is wrong, each thing once, and the words for it."""
        # RFC 5322 3.6
        if absent := [name.decode() for name in (b"date", b"from") if not header.all(name)]:
            yield "missing", f"there is no {' and no '.join(absent)}"
        if repeated := [name.decode() for name in _ONCE if header.has_more(name, 1)]:
            yield "repeated", f"more than one {', '.join(repeated)}"
        if (dates := header.all(b"date")) and (wrong := self._wrong_date(dates[0].value)):
            yield "bad_date", wrong
        if not header.all(b"message-id"):
            yield "no_message_id", "there is no message-id"
        octets = header.octets
        longest = max(map(len, octets.split(b"\r\n")))
        if longest > _MAX_LINE_BYTES:
            yield "long_line", f"a line has {longest} octets"
        if found := _CONTROL.search(octets):
            yield "control", f"octet {found[0][0]:#04x} at {found.start()}"
        if not octets.isascii() and not (smtputf8 and _is_utf8(octets)):
            yield "eightbit", "it is not ASCII" if _is_utf8(octets) else "it is neither ASCII nor UTF-8"
        if strange := next((each.raw for each in header.fields if not _NAME.match(each.raw)), b""):
            yield "malformed", f"this is no field: {strange[:80].strip().decode('latin-1')}"
        host, passes = most_passed(header)
        if passes > self.settings.max_passes:
            yield "loop", f"{passes} Received fields by {host}"

    def _wrong_date(self, value: bytes) -> str:
        """RFC 5322 3.3: why a Date is none that can be; "" when it can."""
        text = b" ".join(value.split()).decode("latin-1")
        parsed = parsedate_tz(_without_comments(text[:_MAX_DATE_BYTES]))
        try:
            ahead_s = None if parsed is None else mktime_tz(parsed) - self.services.clock.now()
        except (ValueError, OverflowError):
            ahead_s = None
        if ahead_s is None:
            return f"date is no date: {text[:80]}"
        return f"date lies {ahead_s:.0f} s ahead" if ahead_s > self.settings.max_ahead_s else ""


def most_passed(header: Header) -> tuple[str, int]:
    """RFC 5321 6.3: the host that stands behind `by` in most Received fields, and in how many."""
    hosts = Counter(
        found[1].lower().decode("latin-1")
        for each in header.all(b"received")
        if (found := _BY.search(each.value))
    )
    return max(hosts.items(), key=lambda item: item[1], default=("", 0))


def _without_comments(text: str) -> str:
    """RFC 5322 4.3: comments and blanks may stand between any two words; the parser knows them at the end only."""
    found = "(" in text
    while found:
        text, count = _COMMENT.subn(" ", text)
        found = count > 0
    return text.replace(" :", ":").replace(": ", ":").strip()


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What is wrong."""

    findings: Sequence[tuple[str, str]]

    def lines(self) -> Sequence[str]:
        return [f"{finding}: {words}" for finding, words in self.findings]
