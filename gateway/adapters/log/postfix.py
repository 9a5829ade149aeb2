"""The style `text`: lines as a Postfix with `syslog_name = mxgate` would write them, for tools that read those.

One line for each transaction all the same: of a refused one `NOQUEUE: reject: RCPT from unknown[192.0.2.7]: 550 ...`,
of an accepted one `ID: client=unknown[192.0.2.7], from=<...>, ... status=sent (...)`. All other events are the event
and its keys. deploy/fail2ban has a filter for these lines.

Strangers' texts stand between `<` and `>`, which are escaped in them like blanks, quotes, backslashes and all that is
not printable ASCII; in free texts `=` is. So no text begins a field, ends one, or looks like the client's address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

_PLAIN_WORD = re.compile(r"[A-Za-z0-9._:/+@*-]+")
_PLAIN_BRACKETED = re.compile(r"[!#-;=?-\[\]-~]*")  # printable ASCII but blank, ", <, > and \
_NOT_BRACKETED = re.compile(r"[^!#-;=?-\[\]-~]")
_NOT_FREE = re.compile(r"[^ !#-;?-Z^-~]")  # printable ASCII but ", <, >, =, [, ] and backslash
_NOT_QUOTED = re.compile(r"[^ !#-\[\]-~]")
_NOUN = re.compile(r"[a-z][a-z0-9_]*")

# What Postfix calls the place.
_STAGES: Final = {
    "connect": "CONNECT",
    "ehlo": "EHLO",
    "mail": "MAIL",
    "rcpt": "RCPT",
    "eom": "END-OF-MESSAGE",
}
_REFUSED: Final = frozenset({"message.deferred", "message.rejected", "transaction.refused"})
_SENT: Final = frozenset({"message.accepted", "message.quarantined"})
# The words of Postfix for sessions that end like this.
_ENDED: Final = {
    "early_talker": "improper command pipelining",
    "pipelining": "improper command pipelining",
    "errors": "too many errors",
    "unknown_recipients": "too many errors",
    "commands": "too many errors",
}
# What stands in a transaction's line in another form or place.
_PLACED: Final = frozenset(
    {"client", "mail_from", "rcpts", "rcpt_count", "code", "enhanced", "text", "proto", "helo"}
    | {"tx", "stage", "size_bytes", "duration_ms", "route"}
)
_LEVELS: Final = {"warning": "warning: ", "error": "error: "}


def postfix_line(hostname: str, pid: int) -> Callable[[str, str, str, Mapping[str, object]], str]:
    """Makes a line of a timestamp, a level, an event and its keys, whose values are numbers and texts of any kind."""

    def line(timestamp: str, level: str, event: str, keys: Mapping[str, object]) -> str:
        noun, _, _ = event.partition(".")
        if event in _SENT:
            noun, told = "smtpd", _sent(event, keys)
        elif event in _REFUSED:
            noun, told = "smtpd", _refused(event, keys)
        elif event == "transaction.aborted":
            noun, told = "smtpd", _aborted(keys)
        elif event in ("session.ended", "connection.refused"):
            noun, told = "smtpd", _ended(event, keys)
        else:
            noun = noun if _NOUN.fullmatch(noun) else "other"
            told = f"{_LEVELS.get(level, '')}{_escaped(_NOT_FREE, event)}{_fields(keys)}"
        return f"{timestamp} {hostname} mxgate/{noun}[{pid}]: {told}"

    return line


def _sent(event: str, keys: Mapping[str, object]) -> str:
    rcpts = "".join(f"to=<{rcpt}>, " for rcpt in _rcpts(keys))
    status = "sent" if event == "message.accepted" else "sent, quarantined"
    return (
        f"{_word(keys.get('tx'))}: client={_client(keys)}, from=<{_bracketed(keys.get('mail_from'))}>, {rcpts}"
        f"relay={_word(keys.get('route'))}, size={_number(keys, 'size_bytes')}, nrcpt={_number(keys, 'rcpt_count')}, "
        f"delay={_seconds(keys)}, dsn={_word(keys.get('enhanced'))}, status={status} ({_reply(keys)}), "
        f"proto={_word(keys.get('proto'))} helo=<{_bracketed(keys.get('helo'))}>{_rest(keys)}"
    )


def _refused(event: str, keys: Mapping[str, object]) -> str:
    rcpts = _refused_rcpts(keys) if event == "transaction.refused" else _rcpts(keys)
    # Postfix names the recipient in front of the words about it; here the last of them decided
    about = f"<{rcpts[-1]}>: " if rcpts and keys.get("stage") == "rcpt" else ""
    code, enhanced = _number(keys, "code"), _word(keys.get("enhanced"))
    return (
        f"NOQUEUE: reject: {_stage(keys)} from {_client(keys)}: "
        f"{code} {enhanced} {about}{_free(keys.get('text'))}; {_envelope(keys, rcpts)} "
        f"id={_word(keys.get('tx'))} size={_number(keys, 'size_bytes')} delay={_seconds(keys)}{_rest(keys)}"
    )


def _aborted(keys: Mapping[str, object]) -> str:
    return (
        f"NOQUEUE: aborted after {_stage(keys)} from {_client(keys)}; {_envelope(keys, _rcpts(keys))} "
        f"id={_word(keys.get('tx'))} size={_number(keys, 'size_bytes')} delay={_seconds(keys)}{_rest(keys)}"
    )


def _ended(event: str, keys: Mapping[str, object]) -> str:
    """A session that was ended for what the client did, or a connection that was not served."""
    reason = str(keys.get("reason"))
    what = _ENDED.get(reason, "connection refused" if event == "connection.refused" else "session ended")
    where = "EHLO" if keys.get("helo") else "CONNECT"
    rest = {key: value for key, value in keys.items() if key not in ("client", "helo")}
    helo = f" helo=<{_bracketed(keys['helo'])}>" if "helo" in keys else ""
    return f"{what} after {where} from {_client(keys)}:{helo}{_fields(rest)}"


def _envelope(keys: Mapping[str, object], rcpts: list[str]) -> str:
    to = "".join(f" to=<{rcpt}>" for rcpt in rcpts)
    return (
        f"from=<{_bracketed(keys.get('mail_from'))}>{to} "
        f"proto={_word(keys.get('proto'))} helo=<{_bracketed(keys.get('helo'))}>"
    )


def _rest(keys: Mapping[str, object]) -> str:
    return _fields(
        {key: value for key, value in keys.items() if key not in _PLACED and value not in ("", [], 0)}
    )


def _fields(keys: Mapping[str, object]) -> str:
    return "".join(f" {key}={_value(value)}" for key, value in keys.items())


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return _word(",".join(map(str, value)))
    return _word(value)


def _stage(keys: Mapping[str, object]) -> str:
    return _STAGES.get(str(keys.get("stage")), "UNKNOWN")


def _client(keys: Mapping[str, object]) -> str:
    # no name of a client is looked up here
    return f"unknown[{_bracketed(keys.get('client'))}]"


def _rcpts(keys: Mapping[str, object]) -> list[str]:
    rcpts = keys.get("rcpts")
    return [_bracketed(rcpt) for rcpt in rcpts] if isinstance(rcpts, list | tuple) else []


def _refused_rcpts(keys: Mapping[str, object]) -> list[str]:
    """Of what `refused` says of each: code, enhanced code, policy, reason, and the address, which may hold blanks."""
    refused = keys.get("refused")
    told = [str(each).split(" ", 4) for each in refused] if isinstance(refused, list | tuple) else []
    return [_bracketed(each[4]) for each in told if len(each) == 5]


def _reply(keys: Mapping[str, object]) -> str:
    return f"{_number(keys, 'code')} {_word(keys.get('enhanced'))} {_free(keys.get('text'))}"


def _number(keys: Mapping[str, object], key: str) -> int:
    value = keys.get(key)
    return value if isinstance(value, int) else 0


def _seconds(keys: Mapping[str, object]) -> str:
    value = keys.get("duration_ms")
    return f"{value / 1000:.4g}" if isinstance(value, int | float) else "0"


def _bracketed(value: object) -> str:
    text = "" if value is None else str(value)
    return text if _PLAIN_BRACKETED.fullmatch(text) else _escaped(_NOT_BRACKETED, text)


def _free(value: object) -> str:
    return _escaped(_NOT_FREE, "" if value is None else str(value))


def _word(value: object) -> str:
    """A value behind `key=`: as it is, or in quotes."""
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if _PLAIN_WORD.fullmatch(text):
        return text
    return f'"{_escaped(_NOT_QUOTED, text)}"'


def _escaped(unwanted: re.Pattern[str], text: str) -> str:
    return unwanted.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
