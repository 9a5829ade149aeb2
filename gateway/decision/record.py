"""The types of a decision record. To make one costs references to what is there already, and nothing else.

A record must not keep what is large: no Transaction and no Message, whose body and notes would live on with it, but
the octets of the header, which the ring caps. Lists are handed over and not changed any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from gateway.lookup import Asked
from gateway.mail.digest import BodyDigest, Wanted
from gateway.session import Envelope, Recipient, Session
from gateway.smtp.reply import Reply
from gateway.verdict import AuthResult, Stage, Verdict

ACTIONS = ("accepted", "quarantined", "deferred", "rejected", "aborted")
"""What becomes of a transaction: the words of the log and of mxgate_transactions_total."""


class Judged(NamedTuple):
    """One hook of one policy: what counted, and what it would have been where the policy is observed only."""

    policy: str
    stage: Stage
    mode: str
    """enforce or observe."""
    verdict: Verdict
    """What counted."""
    would_be: Verdict | None
    """The verdict of an observed policy, None of any other."""
    duration_s: float
    failure: str
    """exception, timeout, verdict or blocked; "" when it did not fail."""
    rcpt: Recipient | None = None
    """At RCPT, the recipient that it was about."""


class RcptAnswer(NamedTuple):
    """What one recipient was answered; `policy` and `reason` say what decided it, as in the log."""

    rcpt: Recipient
    reply: Reply
    policy: str = ""
    reason: str = ""


class Decision(NamedTuple):
    """One finished transaction. The words are those of its line in the log."""

    id: str
    time: float
    """When it ended, seconds since the epoch."""
    session: Session
    envelope: Envelope
    """Of its recipients only those that were accepted; `rcpts` has all."""
    rcpts: Sequence[RcptAnswer]
    """In the order of the client."""
    action: str
    """One of ACTIONS."""
    stage: Stage
    """Where it was decided."""
    reply: Reply | None
    """The last word to the client, None when the client went away before."""
    policy: str
    reason: str
    duration_s: float
    """From MAIL to the final reply."""
    judged: Sequence[Judged] = ()
    """In the order in which they were judged."""
    results: tuple[AuthResult, ...] = ()
    delivered: bool = False
    """The downstream said that it has the message."""
    error: str = ""
    route: str = ""
    header: bytes = b""
    """Octets of the header, unstuffed; the ring cuts them to 16 KiB."""
    size_bytes: int = 0
    """Of the content on the wire."""
    digests: Mapping[Wanted, BodyDigest] = MappingProxyType({})
    """Of the body, those that policies wanted."""
    timings: tuple[tuple[str, float], ...] = ()
    """Parts of the duration in seconds, by name."""
    dns: Sequence[Asked] = ()
    """Each question of the policies once."""
    judged_at: float = 0.0
    """When the header was complete and the policies saw it, seconds since the epoch; without a header as `time`."""
    authserv_id: str = ""
    """Ours (RFC 8601 2.5) at that time."""
    omitted_rcpts: int = 0
    """Left out by the ring, because the record was too large."""
    omitted_judged: int = 0
    omitted_dns: int = 0
    omitted_header_bytes: int = 0
