"""A decision record for people: a few lines that say what was decided, by whom, why, and on what evidence.

It takes what the admin port gave, so nothing of it is trusted: what is missing or of another type is left out, and
what is not printable is escaped, so that no text of a stranger makes a line of its own or drives a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

# A terminal is read by eyes; --json has all.
_MAX_RCPTS = 20
_MAX_VALUE = 300
_IS_IT_US = {
    "no": "is it us? no",
    "rule": "is it us? yes, a rule of ours",
    "trouble": "is it us? yes, TROUBLE",
}
# No size and no duration is larger, and no float is inexact below.
_MAX_NUMBER = 1e15


def as_line(record: Mapping[str, object]) -> str:
    """One record on one line, for who watches them go by."""
    rcpts = _records(record, "rcpts")
    to = f"<{_of(rcpts[0], 'rcpt')}>" if rcpts else "nobody"
    more = len(rcpts) + _number(record, "omitted_rcpts") - 1
    return _joined(
        _of(record, "timestamp"),
        f"{_of(record, 'action'):<11}",
        _of(record, "client"),
        f"<{_of(record, 'mail_from')}> -> {to}",
        f"and {more:.0f} more" if more > 0 else "",
        _reply(record),
        _because(record),
        {"trouble": "TROUBLE OF OURS", "rule": "", "no": "not us"}.get(_of(record, "ours"), ""),
        f"tx {_of(record, 'tx')}",
    )


def as_text(record: Mapping[str, object]) -> Iterator[str]:
    """The lines of one record, without line ends."""
    yield _joined(_of(record, "timestamp"), _of(record, "action"), _of(record, "tx"))
    yield _joined(
        "  client", _of(record, "client"), _noted(_of(record, "helo"), _of(record, "tls"), _trust(record))
    )
    yield f"  from <{_of(record, 'mail_from')}>"
    rcpts = _records(record, "rcpts")
    for rcpt in rcpts[:_MAX_RCPTS]:
        yield _joined(f"  to <{_of(rcpt, 'rcpt')}>:", _reply(rcpt), _because(rcpt))
    left_out = len(rcpts[_MAX_RCPTS:]) + _number(record, "omitted_rcpts")
    if left_out:
        yield f"  to {left_out:.0f} more"
    yield from _decided(record)
    for field in _records(record, "header"):
        yield f"  {_of(field, 'name')}: {_of(field, 'value')}"
    yield from _verdicts(record)
    yield from dns_lines(record)
    yield from _left_out(record)
    yield from _took(record)


def _decided(record: Mapping[str, object]) -> Iterator[str]:
    stage = _of(record, "stage")
    told = _reply(record) or "nothing, the client was gone"
    yield _joined("  answered", told, f"at {stage}" if stage else "", _because(record))
    if sentence := _of(record, "why"):
        yield f"  {_IS_IT_US.get(_of(record, 'ours'), 'why')}: {sentence}"
    if error := _of(record, "error"):
        yield f"  error {error}"
    would_be = record.get("would_be")
    if isinstance(would_be, dict):
        about = f"for <{rcpt}>" if (rcpt := _of(would_be, "rcpt")) else ""
        yield _joined(
            "  observed only: would have been",
            f"{_of(would_be, 'action')} at {_of(would_be, 'stage')}",
            about,
            _because(would_be),
            _reply(would_be),
        )


def _verdicts(record: Mapping[str, object]) -> Iterator[str]:
    verdicts = _records(record, "verdicts")
    if verdicts:
        yield "  verdicts"
    for verdict in verdicts:
        failure = _of(verdict, "failure")
        rcpt = _of(verdict, "rcpt")
        yield _joined(
            f"    {_of(verdict, 'stage'):<7}",
            f"{_of(verdict, 'policy')}:",
            _of(verdict, "action"),
            _of(verdict, "reason"),
            f"for <{rcpt}>" if rcpt else "",
            f"FAILED ({failure})" if failure else "",
            "observed" if _of(verdict, "mode") == "observe" else "",
            f"{_number(verdict, 'duration_ms'):g} ms",
        )
        for line in _texts(verdict, "evidence"):
            yield f"            {printable(line)}"
        yield from finding_lines(verdict)
        would_be = verdict.get("would_be")
        if isinstance(would_be, dict):
            yield _joined(
                "            would have been",
                _of(would_be, "action"),
                _of(would_be, "reason"),
                _reply(would_be),
            )
            yield from finding_lines(would_be)
    omitted = _number(record, "omitted_verdicts")
    if omitted:
        yield f"    {omitted:.0f} more"


def finding_lines(verdict: Mapping[str, object]) -> Iterator[str]:
    """What a policy found: its results, as Authentication-Results words them, and its edits."""
    for result in _records(verdict, "results"):
        pairs = result.get("properties")
        shown = [
            f"{printable(pair[0])}={printable(pair[1])}"
            for pair in (pairs if isinstance(pairs, list) else [])
            if isinstance(pair, list) and len(pair) == 2
        ]
        yield _joined(
            f"            {_of(result, 'method')}={_of(result, 'result')}",
            _noted(_of(result, "reason")),
            *shown,
        )
    for edit in _records(verdict, "edits"):
        yield _joined("           ", _of(edit, "edit"), f"{_of(edit, 'name')}:", _of(edit, "value"))


def dns_lines(record: Mapping[str, object]) -> Iterator[str]:
    """Who asked what, and the answers."""
    asked = _records(record, "dns")
    if asked:
        yield "  dns"
    for each in asked:
        found = _of(each, "answer").replace("_", " ")
        yield _joined(
            f"    {_of(each, 'policy')}:" if _of(each, "policy") else "   ",
            _of(each, "name"),
            _of(each, "rrtype"),
            "" if found == "records" else found,
            _noted(_of(each, "why"), f"{took:g} ms" if (took := _number(each, "duration_ms")) else ""),
        )
        for text in _texts(each, "records"):
            yield f"            {_as_written(text)}"


def _left_out(record: Mapping[str, object]) -> Iterator[str]:
    for key, what in (("omitted_header_bytes", "octets of the header"), ("omitted_dns", "answers of DNS")):
        if count := _number(record, key):
            yield f"  not kept: {count:.0f} {what}"


def _took(record: Mapping[str, object]) -> Iterator[str]:
    timings = record.get("timings_ms")
    parts = (
        [f"{printable(name)} {_number(timings, name):g}" for name in timings]
        if isinstance(timings, dict)
        else []
    )
    route = _of(record, "route")
    yield _joined(
        f"  took {_number(record, 'duration_ms'):g} ms",
        _noted(*parts),
        f"{_number(record, 'size_bytes'):.0f} bytes",
        f"route {route}" if route else "",
    )


def _trust(record: Mapping[str, object]) -> str:
    words = (_of(record, "trust"), _of(record, "user"), _of(record, "address_source"))
    return " ".join(word for word in words if word and word not in ("untrusted", "socket"))


def _because(record: Mapping[str, object]) -> str:
    policy, reason = _of(record, "policy"), _of(record, "reason")
    return f"[{_joined(policy, reason)}]" if policy or reason else ""


def _reply(record: Mapping[str, object]) -> str:
    code = int(_number(record, "code"))
    return _joined(str(code), _of(record, "enhanced"), _of(record, "text")) if code else ""


def _noted(*texts: str) -> str:
    told = ", ".join(text for text in texts if text)
    return f"({told})" if told else ""


def _joined(*texts: str) -> str:
    return " ".join(text for text in texts if text)


def _of(record: Mapping[str, object], key: str) -> str:
    value = record.get(key)
    return printable(value) if isinstance(value, str) else ""


def _number(record: Mapping[str, object], key: str) -> float:
    value = record.get(key)
    return value if isinstance(value, (int, float)) and 0 <= value < _MAX_NUMBER else 0


def _records(record: Mapping[str, object], key: str) -> list[dict[str, object]]:
    value = record.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _texts(record: Mapping[str, object], key: str) -> list[object]:
    value = record.get(key)
    return value if isinstance(value, list) else []


def _as_written(record: object) -> str:
    """A DNS record, whose text has its own escapes (exact.py)."""
    text = record if isinstance(record, str) and record.isprintable() else printable(record)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def printable(value: object) -> str:
    """A text on one line: printable characters as they are, all others so that they can be told from those."""
    text = value if isinstance(value, str) else ""
    if len(text) > _MAX_VALUE:
        text = f"{text[:_MAX_VALUE]}..."
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
