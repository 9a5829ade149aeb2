"""Debugging on demand: the whole dialogue and every verdict, for the clients and recipients that the operator names.

`log.debug_clients` and `log.debug_rcpts`. Whose recipients are named is known only in the middle of a session, so what
was said before is kept until then, up to a limit, in every session while such recipients are named. Lines are at level
debug: `debug.dialogue` for each line of commands and replies, `debug.verdict`, `debug.dns` and `debug.decision` when a
transaction ends. Never content, and no credentials.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any

from gateway.decision.show import redacted, to_json
from gateway.decision.text import dns_lines, finding_lines
from gateway.redaction import Redaction

if TYPE_CHECKING:
    from gateway.decision import Decision
    from gateway.services import Log
    from gateway.session import Recipient

# Lines of a session that are kept while nobody knows whether they are wanted.
_KEPT_LINES = 100
_MAX_LINE = 1000
# What a client says behind AUTH may be its password, whatever the verb (RFC 4954 4).
_VERBS = frozenset(
    b"HELO EHLO MAIL RCPT DATA BDAT RSET NOOP QUIT VRFY HELP STARTTLS AUTH EXPN ETRN".split(),
)
# also with what is no blank of SMTP behind it
_AUTH = re.compile(rb"AUTH\b", re.IGNORECASE)
_MECHANISMS = frozenset(
    b"PLAIN LOGIN CRAM-MD5 DIGEST-MD5 NTLM GSSAPI EXTERNAL XOAUTH2 OAUTHBEARER SCRAM-SHA-1 SCRAM-SHA-256".split()
)


class Debugging:
    """What is to be debugged, and the log that is told. `bool()` is False where nothing is."""

    def __init__(
        self,
        log: Log,
        clients: Iterable[IPv4Network | IPv6Network] = (),
        rcpts: Iterable[str] = (),
        redaction: Redaction | None = None,
    ) -> None:
        self._log = log
        self._redaction = redaction or Redaction()
        self._clients = tuple(clients)
        self._addresses = frozenset(rcpt for rcpt in rcpts if "@" in rcpt)
        self._domains = frozenset(rcpt for rcpt in rcpts if "@" not in rcpt)

    def __bool__(self) -> bool:
        return bool(self._clients or self._addresses or self._domains)

    def dialogue(self, session: str, client: IPv4Address | IPv6Address) -> Dialogue | None:
        """Whom to tell what a session says; None when nobody will want to know."""
        is_wanted = self._is_client(client)
        if not is_wanted and not (self._addresses or self._domains):
            return None
        return Dialogue(self, self._log, session, is_wanted=is_wanted)

    def decided(self, decision: Decision) -> None:
        """A transaction ended: its verdicts with their evidence, where it is one of those."""
        if not self._is_client(decision.session.client) and not self.has(
            [answer.rcpt for answer in decision.rcpts]
        ):
            return
        record = to_json(decision)
        if self._redaction:
            record = redacted(record, self._redaction)
        tx = decision.id
        verdicts: Any = record["verdicts"]
        for verdict in verdicts:
            would_be = verdict["would_be"] or {}
            self._log.debug(
                "debug.verdict",
                tx=tx,
                stage=verdict["stage"],
                policy=verdict["policy"],
                mode=verdict["mode"],
                rcpt=verdict["rcpt"],
                action=verdict["action"],
                reason=verdict["reason"],
                would_be=would_be.get("action", ""),
                would_be_reason=would_be.get("reason", ""),
                failure=verdict["failure"],
                found=[line.strip() for line in finding_lines(would_be or verdict)],
                evidence=verdict["evidence"],
                duration_ms=verdict["duration_ms"],
            )
        asked = [line.strip() for line in dns_lines(record)][1:]
        if asked:
            self._log.debug("debug.dns", tx=tx, asked=asked)
        rcpts: Any = record["rcpts"]
        self._log.debug(
            "debug.decision",
            tx=tx,
            session=decision.session.id,
            action=decision.action,
            stage=decision.stage,
            policy=decision.policy,
            reason=decision.reason,
            rcpts=[f"{each['code']} {each['enhanced']} {each['text']} {each['rcpt']}" for each in rcpts],
            error=record["error"],
            timings_ms=[f"{name} {spent_s * 1000:.1f}" for name, spent_s in decision.timings],
        )

    def has(self, rcpts: Sequence[Recipient]) -> bool:
        """Whether one of these recipients is named."""
        return any(self._is_named(rcpt) for rcpt in rcpts)

    def _is_client(self, client: IPv4Address | IPv6Address) -> bool:
        return any(client in network for network in self._clients)

    def _is_named(self, rcpt: Recipient) -> bool:
        mailbox = rcpt.mailbox
        domain = str(mailbox.domain or "").lower()
        if self._addresses and f"{mailbox.local}@{domain}".lower() in self._addresses:
            return True
        if not self._domains:
            return False
        labels = domain.split(".")
        return domain in self._domains or any(
            "." + ".".join(labels[at:]) in self._domains for at in range(1, len(labels))
        )


class Dialogue:
    """What one session says, told or kept."""

    def __init__(self, debugging: Debugging, log: Log, session: str, *, is_wanted: bool) -> None:
        self._debugging = debugging
        self._log = log
        self._session = session
        self._kept: deque[tuple[str, str]] | None = None if is_wanted else deque(maxlen=_KEPT_LINES)
        self._dropped = 0
        self._has_auth = False

    def heard(self, line: bytes) -> None:
        """A command line of the client."""
        # a client that gets its blanks wrong has a password all the same
        verb = b"AUTH" if _AUTH.match(line) else (line[:16].split(None, 1) or [b""])[0].upper()
        if self._has_auth and verb not in _VERBS:
            self._tell("client", f"({len(line)} octets, not shown: they may be a password)")
            return
        if verb == b"AUTH":
            self._has_auth = True
            word = next(iter(line.split()[1:2]), b"")
            # what is no mechanism that there is may be the password itself
            line = b" ".join([verb, *([word] if word.upper() in _MECHANISMS else []), b"..."])
        self._tell("client", line.decode("utf-8", "backslashreplace"))

    def said(self, output: bytes) -> None:
        """Replies to the client, as they are written."""
        for line in output.split(b"\r\n")[:-1]:
            self._tell("gateway", line.decode("utf-8", "backslashreplace"))

    def content(self, size_bytes: int) -> None:
        """Content came to its end."""
        self._tell("client", f"({size_bytes} octets came with the content, not shown)")

    def rcpts(self, rcpts: Sequence[Recipient]) -> None:
        """Recipients are known: now it may turn out that this session is wanted."""
        kept = self._kept
        if kept is None or not self._debugging.has(rcpts):
            return
        self._kept = None
        if self._dropped:
            self._tell("gateway", f"({self._dropped} earlier lines were not kept)")
        for side, line in kept:
            self._tell(side, line)

    def _tell(self, side: str, line: str) -> None:
        if len(line) > _MAX_LINE:
            line = f"{line[:_MAX_LINE]}..."
        if self._kept is None:
            self._log.debug("debug.dialogue", session=self._session, side=side, line=line)
            return
        self._dropped += len(self._kept) == self._kept.maxlen
        self._kept.append((side, line))
