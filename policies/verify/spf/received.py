"""The Received-SPF field (RFC 7208 9.1, erratum 5436): the value, safe whatever the client and the domains sent."""

from __future__ import annotations

import re

from gateway.api import Result
from policies.verify.spf.result import SpfResult

# RFC 5322 3.2.3: a value of these needs no quotes
_DOT_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
# What a quoted-string may not hold as it is, and what we do not want to hand on: controls and 8-bit characters
_UNSAFE = re.compile(r"[^\x20-\x7e]")
# A value is cut to this: none of them is that long, but those of a stranger
_MAX_VALUE = 320


def received_spf(found: SpfResult, *, mail_from: str, helo: str, is_helo: bool, receiver: str = "") -> str:
    """The value of the field for one identity; `mail_from` is "" for the null reverse-path.

    Lines are folded. Comments hold our words and addresses only; everything of a stranger is a quoted value.
    """
    pairs = [("client-ip", str(found.client))]
    if mail_from:
        pairs.append(("envelope-from", mail_from))
    pairs.append(("helo", helo))
    if receiver:
        pairs.append(("receiver", receiver))
    pairs.append(("identity", "helo" if is_helo else "mailfrom"))
    if found.term:
        pairs.append(("mechanism", found.term))
    if found.problem:
        pairs.append(("problem", f"{found.problem} ({found.problem_domain})"))
    # RFC 7208 9.1: result [FWS comment] [FWS key-value-list]
    head = f"{found.result} ({_COMMENTS[found.result]})"
    return f"{head}\r\n\t" + ";\r\n\t".join([f"{key}={_value(text)}" for key, text in pairs])


_COMMENTS = {
    Result.PASS: "the domain permits the client",
    Result.FAIL: "the domain does not permit the client",
    Result.SOFTFAIL: "the domain probably does not permit the client",
    Result.NEUTRAL: "the domain says nothing about the client",
    Result.NONE: "the domain has no SPF record",
    Result.TEMPERROR: "DNS did not answer",
    Result.PERMERROR: "the SPF record of the domain cannot be evaluated",
}


def _value(text: str) -> str:
    """RFC 7208 9.1: dot-atom or quoted-string."""
    text = _UNSAFE.sub("?", text[:_MAX_VALUE])
    if _DOT_ATOM.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
