"""Verdict: what a policy decides, as data; made by proceed(), quarantine(), defer() and reject(), merged in one place.

There is no ACCEPT: a policy that could make others be skipped is how open relays begin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import lru_cache
from typing import Protocol

from gateway.frozen import frozen
from gateway.smtp.reply import Reply

# RFC 5322 2.2.3: a line end only as folding, no line of white space alone, no controls
_FIELD_TEXT = r"[^\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]"
_FIELD_VALUE = re.compile(rf"{_FIELD_TEXT}*(?:\r\n[ \t]+(?![ \t\r]){_FIELD_TEXT}+)*")
_REASON = re.compile(r"[a-z][a-z0-9_]{0,62}")
_CACHED_REASONS = 512
_MAX_LINE = 998
# RFC 5322 2.2: printable ASCII but the colon; the length is ours
_FIELD_NAME = re.compile(r"[\x21-\x39\x3b-\x7e]{1,77}")


class Stage(StrEnum):
    """The stages of a session. One token names stage, hook (`on_rcpt`), metric label, log key and config key."""

    CONNECT = "connect"
    EHLO = "ehlo"
    MAIL = "mail"
    RCPT = "rcpt"
    EOM = "eom"


class Action(IntEnum):
    """Ordered: the strictest wins. QUARANTINE exists at EOM only and is for the whole transaction."""

    CONTINUE = 0
    QUARANTINE = 1
    DEFER = 2
    REJECT = 3

    @property
    def label(self) -> str:
        """The token in logs, metrics and configuration."""
        return self.name.lower()


# A member that is asked of its class costs ten times what a name of the module does.
_CONTINUE = Action.CONTINUE


class Result(StrEnum):
    """RFC 8601 2.7: the result words of authentication methods."""

    NONE = "none"
    PASS = "pass"
    FAIL = "fail"
    SOFTFAIL = "softfail"
    NEUTRAL = "neutral"
    POLICY = "policy"
    TEMPERROR = "temperror"
    PERMERROR = "permerror"


@frozen
class AuthResult:
    """RFC 8601 2.2: one resinfo. `properties` are (ptype.property, value), e.g. ("smtp.mailfrom", "example.org")."""

    method: str
    result: Result
    reason: str = ""
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class AddField:
    """Header edit: put this field above the message. `value` is unfolded or folded with CRLF and white space.

    Raises ValueError when the name is no field name (RFC 5322 2.2) or the value could end the field.
    """

    name: str
    value: str

    def __post_init__(self) -> None:
        if not _FIELD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no field name")
        self.value.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
        if not _FIELD_VALUE.fullmatch(self.value):
            raise ValueError(f"the value of {self.name} holds a line end that is no folding")


@dataclass(frozen=True, slots=True)
class RemoveFields:
    """Header edit: take out every field of this name, compared without case. Raises ValueError for what is no name."""

    name: str

    def __post_init__(self) -> None:
        if not _FIELD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no field name")


HeaderEdit = AddField | RemoveFields

_ONCE = "stands at most once in a message (RFC 5322 3.6); a second one means what each reader likes"
_STRUCTURE = "says how the message is to be read (RFC 2045 3)"
_TRACE = "says which way the message came; only who handed it on may say that"
_ENGINE = "is written by the engine"
# What no policy may put above a message, and why. A name that ends in "-" stands for all that begin so.
_NOT_ADDED = {
    **dict.fromkeys(("from", "sender", "reply-to", "to", "cc", "bcc", "subject", "date"), _ONCE),
    **dict.fromkeys(("message-id", "in-reply-to", "references"), _ONCE),
    **dict.fromkeys(("mime-version", "content-"), _STRUCTURE),
    **dict.fromkeys(("received", "return-path", "resent-"), _TRACE),
    **dict.fromkeys(("dkim-signature", "arc-"), "is a signature; who signs does it in on_send"),
    "authentication-results": _ENGINE,
}
_SIGNATURE = "dkim-signature"
# What a policy may take out, and why it breaks no promise: all else leaves as it came (DESIGN.md section 1),
# since a signature of the sender's may cover it.
_REMOVED = {
    "received-spf": "a trace field of another host's check (RFC 7208 9.1), which reads as if it were ours",
    "x-mxgate-": "names that are ours: what comes in with one is forged",
}


def forbidden(edit: HeaderEdit, reserved: AbstractSet[str] = frozenset(), *, is_last: bool = False) -> str:
    """Why a policy may not make this edit, "" when it may. `reserved`: lower-case names of the engine's own fields.

    `is_last`: in `on_send`, where nothing is changed any more but signatures are added.
    """
    name = edit.name.lower()
    if is_last:
        is_signature = isinstance(edit, AddField) and name == _SIGNATURE
        why = "" if is_signature else "is no signature, which is all that is added behind the edits"
    elif name in reserved:
        why = _ENGINE
    elif isinstance(edit, AddField):
        why = _entry(_NOT_ADDED, name)
        # RFC 5322 2.1.1: a downstream may refuse the whole message for a longer line
        if not why and max(map(len, f"{edit.name}: {edit.value}".split("\r\n"))) > _MAX_LINE:
            why = f"has a line of more than {_MAX_LINE} characters"
    else:
        why = "" if _entry(_REMOVED, name) else "leaves as it came"
    return f"{edit.name} {why}" if why else ""


def is_own_field(name: object) -> bool:
    """Whether a policy may have this name of a header field for its own."""
    return (
        isinstance(name, str) and bool(_FIELD_NAME.fullmatch(name)) and name.lower().startswith("x-mxgate-")
    )


def _entry(table: Mapping[str, str], name: str) -> str:
    """What the table says of a name, "" when nothing."""
    entries = (why for key, why in table.items() if name == key or (key[-1] == "-" and name.startswith(key)))
    return next(entries, "")


class Evidence(Protocol):
    """What a policy has seen and tried, kept small and put into words only when somebody asks."""

    def lines(self) -> Sequence[str]:
        """One finding a line; text from outside as it is, whoever prints it escapes it."""


@frozen
class Verdict:
    """One policy's decision at one stage.

    `reason` is a stable token ([a-z0-9_]) for logs and metrics. `reply` is given to the client when the action
    is DEFER (4xx) or REJECT (5xx). `close` ends the connection behind that reply. `evidence` is for those who ask
    why (`mxgate explain`, decision records); it does not outlive a merge.
    """

    action: Action
    reason: str = ""
    reply: Reply | None = None
    results: tuple[AuthResult, ...] = ()
    edits: tuple[HeaderEdit, ...] = ()
    close: bool = False
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        if self.reason and not _is_token(self.reason):
            raise ValueError(f"reason {self.reason!r} is no token of a-z, 0-9 and _")
        if self.action is _CONTINUE and self.reply is None and not self.close:
            return  # as nearly all of them
        match self.action:
            case Action.DEFER:
                fits = self.reply is not None and self.reply.is_transient
            case Action.REJECT:
                fits = self.reply is not None and self.reply.is_permanent
            case _:
                fits = self.reply is None and not self.close
        if not fits:
            raise ValueError(f"reply {self.reply} does not fit {self.action.label}")


@lru_cache(maxsize=_CACHED_REASONS)
def _is_token(reason: str) -> bool:
    return _REASON.fullmatch(reason) is not None


_PROCEED = Verdict(_CONTINUE)


def proceed(
    *,
    reason: str = "",
    results: Sequence[AuthResult] = (),
    edits: Sequence[HeaderEdit] = (),
    evidence: Evidence | None = None,
) -> Verdict:
    """Go on; what was found may be reported all the same."""
    if not (reason or results or edits or evidence):
        return _PROCEED
    return Verdict(_CONTINUE, reason, None, tuple(results), tuple(edits), False, evidence)


def quarantine(
    reason: str,
    *,
    results: Sequence[AuthResult] = (),
    edits: Sequence[HeaderEdit] = (),
    evidence: Evidence | None = None,
) -> Verdict:
    """Deliver the message apart (EOM only)."""
    return Verdict(Action.QUARANTINE, reason, results=tuple(results), edits=tuple(edits), evidence=evidence)


def defer(
    reason: str,
    reply: Reply,
    *,
    results: Sequence[AuthResult] = (),
    close: bool = False,
    evidence: Evidence | None = None,
) -> Verdict:
    """Refuse for now; `reply` is a 4xx."""
    return Verdict(Action.DEFER, reason, reply, tuple(results), close=close, evidence=evidence)


def reject(
    reason: str,
    reply: Reply,
    *,
    results: Sequence[AuthResult] = (),
    close: bool = False,
    evidence: Evidence | None = None,
) -> Verdict:
    """Refuse for good; `reply` is a 5xx."""
    return Verdict(Action.REJECT, reason, reply, tuple(results), close=close, evidence=evidence)


def merge(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict of many: the strictest with its reason and reply (the first among equals), all results and edits."""
    strictest = _PROCEED
    results: list[AuthResult] = []
    edits: list[HeaderEdit] = []
    close = False
    for verdict in verdicts:
        # of those that just go on, the first with something to say
        if verdict.action > strictest.action or (
            not strictest.reason and verdict.action is strictest.action is _CONTINUE
        ):
            strictest = verdict
        results += verdict.results
        edits += verdict.edits
        close = close or verdict.close
    if not results and not edits and close == strictest.close:
        return strictest
    return Verdict(strictest.action, strictest.reason, strictest.reply, tuple(results), tuple(edits), close)
