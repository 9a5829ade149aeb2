"""A decision record as JSON's types.

Much of a record was written by strangers: addresses, HELO, header fields, the downstream's words. `to_json` gives only
what every reader of JSON takes (finite numbers, no lone surrogate), and never raises, whatever a policy has put into
its verdicts. In full it has all that a replay needs: the header's octets, digests, and answers of DNS, to the octet.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite
from typing import Final, TypeAlias

from gateway.decision.exact import record_text
from gateway.decision.record import Decision, Judged, RcptAnswer
from gateway.decision.why import why
from gateway.lookup import Asked
from gateway.mail.digest import BodyDigest, Canonicalization
from gateway.redaction import HIDDEN, Redaction
from gateway.smtp.reply import Reply
from gateway.verdict import Action, AddField, AuthResult, Evidence, RemoveFields, Verdict

Json: TypeAlias = "Mapping[str, Json] | list[Json] | str | int | float | bool | None"

# What policies judge a message by, and what finds it in other logs. Not the subject: it is content, and whoever may use
# the machine may ask on loopback.
SHOWN_FIELDS: Final = frozenset(
    (
        *(b"from", b"sender", b"reply-to", b"return-path", b"date", b"message-id", b"list-id"),
        *(b"authentication-results", b"received-spf", b"dkim-signature"),
        *(b"arc-seal", b"arc-message-signature", b"arc-authentication-results"),
    )
)
# Keys of texts that are free, and may name whom they are about by the local part alone.
_WORDS: Final = frozenset(("text", "error", "evidence", "value"))
# RFC 5322 2.2.3: a line end before white space is folding
_FIELD_END = re.compile(rb"\r\n(?![ \t])")
# A text that a policy made may be of any size; what a person or a program reads of it need not be.
_MAX_TEXT: Final = 2000
_MAX_EVIDENCE: Final = 500


def to_json(decision: Decision, *, in_full: bool = True) -> dict[str, Json]:
    """The record in JSON's types. The keys of its first level are those of its line in the log, where that has them.

    In full it may take some milliseconds, since policies put their evidence into words.
    """
    session, envelope, reply = decision.session, decision.envelope, decision.reply
    ours, sentence = why(decision)
    tls = session.tls
    shown: dict[str, Json] = {
        "tx": _text(decision.id),
        "timestamp": timestamp(decision.time),
        "session": _text(session.id),
        "client": str(session.client),
        "port": session.port,
        "helo": _text(session.helo),
        "esmtp": session.esmtp,
        "tls": _text(tls.version) if tls else "",
        "cipher": _text(tls.cipher) if tls else "",
        "trust": _text(session.trust),
        "address_source": _text(session.address_source),
        "user": _text(session.user or ""),
        "role": _text(session.role),
        "mail_from": _text(envelope.mail_from.text) if envelope.mail_from is not None else "",
        "body_type": _text(envelope.body_type),
        "smtputf8": envelope.smtputf8,
        "size_hint": envelope.size_hint,
        "dsn_ret": _text(envelope.dsn_ret),
        "dsn_envid": _text(envelope.dsn_envid),
        "rcpts": [_rcpt(answer) for answer in decision.rcpts],
        "stage": _text(decision.stage),
        "action": _text(decision.action),
        "policy": _text(decision.policy),
        "reason": _text(decision.reason),
        **_reply(reply),
        "ours": ours,
        "why": _text(sentence),
        "delivered": decision.delivered,
        "would_be": would_be(decision),
        "route": _text(decision.route),
        "error": _text(decision.error),
        "size_bytes": decision.size_bytes,
        "duration_ms": _milliseconds(decision.duration_s),
        "timings_ms": {_text(name): _milliseconds(spent_s) for name, spent_s in decision.timings},
        "verdicts": [_judged(judged, in_full=in_full) for judged in decision.judged],
        "results": [result_json(result) for result in decision.results],
        "omitted_rcpts": decision.omitted_rcpts,
        "omitted_verdicts": decision.omitted_judged,
    }
    if in_full:
        shown |= _in_full(decision)
    return shown


def redacted(record: Mapping[str, Json], redaction: Redaction) -> dict[str, Json]:
    """A record of `to_json` without what is to be taken out; of the header nothing is left, for it is full of names."""
    sender, user, rcpts = record.get("mail_from"), str(record.get("user") or ""), record.get("rcpts")
    names = [str(sender or ""), user]
    if isinstance(rcpts, list):
        names += [str(each["rcpt"]) for each in rcpts if isinstance(each, Mapping)]
    said = {key: _said(value, key, names, redaction) for key, value in record.items()}
    shown: dict[str, Json] = redaction.values(said)
    if user:
        shown["user"] = redaction.user(user)
    if "header_octets" in shown:
        del shown["header_octets"]
        shown["header"] = []
        shown["omitted_header_bytes"] = record["omitted_header_bytes"]
    local = sender.rpartition("@")[0].lower() if isinstance(sender, str) else ""
    dns = shown.get("dns")
    if redaction.hides_local_parts and local and isinstance(dns, list):
        # RFC 7208 7.2: the macros l and s put the sender's local part into a name
        for asked in dns:
            if isinstance(asked, dict):
                labels = str(asked["name"]).split(".")
                asked["name"] = ".".join(
                    [HIDDEN if each.lower() in (local, *local.split(".")) else each for each in labels]
                )
    return shown


def _said(value: Json, key: str, names: Sequence[str], redaction: Redaction) -> Json:
    """A value in which what is said in words, by a downstream or a policy, is without these names."""
    match value:
        case str():
            return redaction.about(names, value) if key in _WORDS else value
        case Mapping():
            return {of: _said(each, of, names, redaction) for of, each in value.items()}
        case list():
            return [_said(each, key, names, redaction) for each in value]
        case _:
            return value


def _in_full(decision: Decision) -> dict[str, Json]:
    return {
        "header": [*_fields(decision.header)],
        "header_octets": base64.b64encode(decision.header).decode("ascii"),
        "omitted_header_bytes": decision.omitted_header_bytes,
        "digests": [_digest(*wanted, digest) for wanted, digest in decision.digests.items()],
        "dns": [asked_json(asked) for asked in decision.dns],
        "omitted_dns": decision.omitted_dns,
        "judged_at": decision.judged_at,
        "authserv_id": _text(decision.authserv_id),
    }


def would_be(decision: Decision) -> dict[str, Json] | None:
    """What observed policies would have made of it: the strictest, where it is stricter than what was done."""
    worst: Judged | None = None
    action = Action.CONTINUE
    for judged in decision.judged:
        verdict: object = judged.would_be
        if isinstance(verdict, Verdict) and verdict.action > action:
            worst, action = judged, verdict.action
    if worst is None or worst.would_be is None:
        return None
    return {
        "policy": _text(worst.policy),
        "stage": _text(worst.stage),
        "rcpt": _text(worst.rcpt.mailbox.text) if worst.rcpt is not None else "",
        **_verdict(worst.would_be),
    }


def _rcpt(answer: RcptAnswer) -> dict[str, Json]:
    return {
        "rcpt": _text(answer.rcpt.mailbox.text),
        "notify": _text(answer.rcpt.notify),
        "orcpt": _text(answer.rcpt.orcpt),
        **_reply(answer.reply),
        "policy": _text(answer.policy),
        "reason": _text(answer.reason),
    }


def _reply(reply: object) -> dict[str, Json]:
    if not isinstance(reply, Reply):
        return {"code": 0, "enhanced": "", "text": ""}
    return {"code": reply.code, "enhanced": reply.enhanced, "text": reply.text}


def _judged(judged: Judged, *, in_full: bool) -> dict[str, Json]:
    seen = judged.verdict if judged.would_be is None else judged.would_be
    evidence: dict[str, Json] = {"evidence": [*_evidence(seen.evidence)]} if in_full else {}
    return {
        "policy": _text(judged.policy),
        "stage": _text(judged.stage),
        "rcpt": _text(judged.rcpt.mailbox.text) if judged.rcpt is not None else "",
        "mode": _text(judged.mode),
        **_verdict(judged.verdict),
        "would_be": _verdict(judged.would_be) if judged.would_be is not None else None,
        "failure": _text(judged.failure),
        **evidence,
        "duration_ms": _milliseconds(judged.duration_s),
    }


def _verdict(verdict: Verdict) -> dict[str, Json]:
    action: object = verdict.action
    return {
        "action": action.label if isinstance(action, Action) else _text(action),
        "reason": _text(verdict.reason),
        **_reply(verdict.reply),
        "results": [result_json(result) for result in _tuple(verdict.results)],
        "edits": [_edit(edit) for edit in _tuple(verdict.edits)],
    }


def result_json(result: object) -> dict[str, Json]:
    """One authentication result in JSON's types."""
    if not isinstance(result, AuthResult):
        return {"method": _text(result), "result": "", "reason": "", "properties": []}
    return {
        "method": _text(result.method),
        "result": _text(result.result),
        "reason": _text(result.reason),
        "properties": [[_text(part) for part in _tuple(pair)] for pair in _tuple(result.properties)],
    }


def _edit(edit: object) -> dict[str, Json]:
    match edit:
        case AddField():
            return {"edit": "add", "name": _text(edit.name), "value": _text(edit.value)}
        case RemoveFields():
            return {"edit": "remove", "name": _text(edit.name), "value": ""}
        case _:
            return {"edit": _text(edit), "name": "", "value": ""}


def _evidence(evidence: Evidence | None) -> Iterator[str]:
    """The lines of evidence; of evidence that cannot be put into words, why not."""
    if evidence is None:
        return
    try:
        for line in islice(evidence.lines(), _MAX_EVIDENCE):
            yield _text(line)
    except Exception as exc:  # noqa: BLE001  # a stranger's code; the record is shown all the same
        yield f"<{type(exc).__name__}>"


def _digest(canonicalization: Canonicalization, length: int | None, digest: BodyDigest) -> dict[str, Json]:
    return {
        "canonicalization": _text(canonicalization),
        "length": length,
        "sha256": digest.sha256.hex(),
        "size_bytes": digest.size_bytes,
    }


def asked_json(asked: Asked) -> dict[str, Json]:
    """One question and its answer in JSON's types; exact.py gives the records back."""
    question, answer = asked.question, asked.answer
    return {
        "policy": _text(asked.policy),
        "name": _text(question.name),
        "rrtype": _text(question.rrtype),
        "answer": _text(answer.found),
        "why": _text(answer.why),
        "records": [_unpaired(record_text(record)) for record in answer.records],
        "duration_ms": _milliseconds(asked.duration_s),
    }


def _fields(header: bytes) -> Iterator[Json]:
    """The judged fields, unfolded; octets that are no UTF-8 as backslash, x and two digits."""
    for field in _FIELD_END.split(header):
        name, colon, value = field.partition(b":")
        if colon and name.strip().lower() in SHOWN_FIELDS:
            text = value.decode("utf-8", "backslashreplace").replace("\r\n", "").strip()
            yield {"name": _text(name.strip().decode("utf-8", "backslashreplace")), "value": _text(text)}


def _text(value: object) -> str:
    """A text without lone surrogates and of a bounded length; of anything else, which type it has."""
    if not isinstance(value, str):
        return f"<{type(value).__name__}>"
    if len(value) > _MAX_TEXT:
        value = f"{value[:_MAX_TEXT]}..."
    return _unpaired(str.__str__(value))  # what a subclass makes of str() is its own affair


def _unpaired(value: str) -> str:
    """A text without lone surrogates."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _milliseconds(duration_s: float) -> float:
    milliseconds = duration_s * 1000
    return round(milliseconds, 3) if isfinite(milliseconds) else 0.0


def timestamp(seconds: float) -> str:
    """ISO 8601 in UTC with milliseconds, as in the log; such texts sort as the times do."""
    milliseconds = int(seconds * 1000)
    date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000))
    return f"{date}.{milliseconds % 1000:03}Z"
