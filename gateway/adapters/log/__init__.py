"""The log: one line an event on standard error: JSON, as Postfix would write it, or by structlog logfmt or console.

Nothing that came from outside can forge or break a line, or drive a terminal: what is not printable (control
characters, line separators, bidi controls, lone surrogates) is escaped, in JSON and `text` everything but ASCII.
Logging never raises and never blocks: a line that cannot be written at once is dropped and counted.
What the operator wants redacted is taken out of all values here, whoever wrote the line.
"""

from __future__ import annotations

import json
import logging
import os
import select
import stat
import time
import traceback
from collections.abc import Callable, MutableMapping
from functools import lru_cache
from math import isfinite
from typing import Any, cast

import structlog

from gateway.adapters.log.postfix import postfix_line
from gateway.redaction import Redaction
from gateway.services import Log

_esc = json.encoder.encode_basestring_ascii  # C; also escapes DEL

# Keys that the lines themselves, or structlog's console renderer, give a meaning.
_RESERVED = frozenset({"timestamp", "level", "event", "exc_info", "exception", "stack"})
# Keys whose addresses are the operator's own, not a client's.
_NEVER_REDACTED = frozenset({"host", "peer", "listen", "listen_tls", "admin", "nameservers", "version"})

# Whom a line is about, and what is said of them in words.
_NAMES = ("mail_from", "rcpts", "rcpt", "refused", "user")
_FREE_TEXTS = ("text", "error")

# The kinds of lines are few: each is an event of ours with its keys.
_MAX_TEMPLATES = 256

_Event = MutableMapping[str, Any]


def open_log(
    style: str,
    *,
    fd: int = 2,
    on_loss: Callable[[], None] = lambda: None,
    now: Callable[[], float] = time.time,
    hostname: str = "localhost",
    redaction: Redaction | None = None,
    with_debug: bool = False,
) -> Log:
    """The Log service in the style "json", "logfmt", "console" or "text": INFO and above, `with_debug` all.

    `on_loss` is called for each line that could not be written. `hostname` stands in lines of the style "text".
    """
    timestamp = _Timestamp(now)
    writer = _LineWriter(fd, on_loss)
    log: Log
    if style == "json":
        log = _JsonLog(writer, timestamp, with_debug=with_debug)
    elif style == "text":
        log = _PostfixLog(writer, timestamp, hostname, with_debug=with_debug)
    else:
        render = _render_text(timestamp, style, colors=os.isatty(fd))
        level = logging.DEBUG if with_debug else logging.INFO
        wrapped = structlog.wrap_logger(
            writer, processors=[render], wrapper_class=structlog.make_filtering_bound_logger(level)
        )
        log = cast("Log", wrapped.bind())  # bound once: the proxy would bind again for each line
    return _RedactingLog(log, redaction) if redaction else log


def take_over_library_logs(log: Log) -> None:
    """Send what libraries say to the logging module (asyncio, aiohttp), warnings and worse, to `log`."""
    logging.basicConfig(handlers=[_LibraryHandler(log)], level=logging.WARNING, force=True)


class _LibraryHandler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # its arguments do not fit its text
            message = str(record.msg)
        keys = {"library": record.name, "message": message}
        if record.exc_info:
            keys["error"] = "".join(traceback.format_exception(*record.exc_info))
        tell = self._log.error if record.levelno >= logging.ERROR else self._log.warning
        tell("library.complained", **keys)


class _LineWriter:
    """What structlog calls a logger: one method for each level, all the same."""

    def __init__(self, fd: int, on_loss: Callable[[], None]) -> None:
        self._fd = fd
        self._on_loss = on_loss
        self._can_block = not _is_file(fd)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._is_torn = False

    def info(self, line: str) -> None:
        data = f"{line}\n".encode("ascii", "backslashreplace")
        if self._is_torn:
            data = b"\n" + data
        try:
            # A pipe that is ready takes PIPE_BUF bytes at once, and nobody else's bytes come between them.
            for begin in range(0, len(data), select.PIPE_BUF):
                if self._can_block and not self._poll.poll(0):
                    raise BlockingIOError  # as os.write would, were it non-blocking
                chunk = data[begin : begin + select.PIPE_BUF]
                written = os.write(self._fd, chunk)
                self._is_torn = chunk[written - 1 : written] != b"\n"
                if written < len(chunk):
                    raise BlockingIOError
        except OSError:
            self._on_loss()

    debug = warning = error = info


def _is_file(fd: int) -> bool:
    """Whether it is a regular file, which is always ready."""
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:  # who has closed standard error gets no lines
        return False


class _Timestamp:
    """ISO 8601 in UTC with milliseconds; the date is formatted once a second."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._second = -1
        self._text = ""

    def __call__(self) -> str:
        milliseconds = int(self._now() * 1000)
        second = milliseconds // 1000
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{milliseconds % 1000:03}Z"


class _JsonLog:
    """JSON without structlog, whose share of a line's cost was half: this line is written for each message."""

    def __init__(self, writer: _LineWriter, timestamp: _Timestamp, *, with_debug: bool) -> None:
        self._write = writer.info
        self._timestamp = timestamp
        self._with_debug = with_debug
        self._templates: dict[tuple[str, ...], str] = {}

    def debug(self, event: str, **keys: object) -> None:
        """Below INFO: written where it is wanted."""
        if self._with_debug:
            self._line("debug", event, keys)

    def info(self, event: str, **keys: object) -> None:
        self._line("info", event, keys)

    def warning(self, event: str, **keys: object) -> None:
        self._line("warning", event, keys)

    def error(self, event: str, **keys: object) -> None:
        self._line("error", event, keys)

    def _line(self, level: str, event: str, keys: dict[str, object]) -> None:
        kind = (level, event, *keys)
        template = self._templates.get(kind) or self._template(kind)
        values = [_ENCODERS.get(type(value), _json)(value) for value in keys.values()]
        self._write(template % (self._timestamp(), *values))

    def _template(self, kind: tuple[str, ...]) -> str:
        """What all lines with this level, event and keys have in common, for the operator %."""
        level, event, *keys = kind
        head = f'{{"timestamp":"\0","level":"{level}","event":{_esc(_text(event))}'
        line = ",".join([head, *[f"{_esc(_key(key))}:\0" for key in keys]]) + "}"
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        template = self._templates[kind] = line.replace("%", "%%").replace("\0", "%s")
        return template


class _PostfixLog:
    """The style `text`."""

    def __init__(
        self, writer: _LineWriter, timestamp: _Timestamp, hostname: str, *, with_debug: bool
    ) -> None:
        self._write = writer.info
        self._timestamp = timestamp
        self._with_debug = with_debug
        self._hostname = hostname
        self._pid = 0

    def debug(self, event: str, **keys: object) -> None:
        if self._with_debug:
            self._line("debug", event, keys)

    def info(self, event: str, **keys: object) -> None:
        self._line("info", event, keys)

    def warning(self, event: str, **keys: object) -> None:
        self._line("warning", event, keys)

    def error(self, event: str, **keys: object) -> None:
        self._line("error", event, keys)

    def _line(self, level: str, event: str, keys: dict[str, object]) -> None:
        if self._pid != (pid := os.getpid()):
            self._pid, self._render = pid, postfix_line(self._hostname, pid)
        plain = {
            _key(key): value if isinstance(value, int | float) else _listed(value)
            for key, value in keys.items()
        }
        self._write(self._render(self._timestamp(), level, _text(event), plain))


def _listed(value: object) -> str | list[str]:
    return [_text(each) for each in value] if isinstance(value, list | tuple) else _shown(value)


def _shown(value: object) -> str:
    return "" if value is None else _text(value)


class _RedactingLog:
    """Takes out of all values what is to be redacted."""

    def __init__(self, log: Log, redaction: Redaction) -> None:
        self._log = log
        self._redaction = redaction

    def debug(self, event: str, **keys: object) -> None:
        self._log.debug(event, **self._redacted(keys))

    def info(self, event: str, **keys: object) -> None:
        self._log.info(event, **self._redacted(keys))

    def warning(self, event: str, **keys: object) -> None:
        self._log.warning(event, **self._redacted(keys))

    def error(self, event: str, **keys: object) -> None:
        self._log.error(event, **self._redacted(keys))

    def _redacted(self, keys: dict[str, object]) -> dict[str, object]:
        shown = {key: value if key in _NEVER_REDACTED else self._value(value) for key, value in keys.items()}
        if "user" in keys:
            shown["user"] = self._redaction.user(_text(keys["user"]))
        if any(key in keys for key in _FREE_TEXTS):
            names = [name for key in _NAMES if key in keys for name in _names(keys[key])]
            shown |= {
                key: self._redaction.about(names, _text(keys[key])) for key in _FREE_TEXTS if keys.get(key)
            }
        return shown

    def _value(self, value: object) -> object:
        match value:
            case None | bool() | int() | float():
                return value
            case list() | tuple():
                return [self._value(each) for each in value]
            case _:
                return self._redaction.text(_text(value))


def _names(value: object) -> list[str]:
    """The addresses of a key; of an entry of `refused` the last word is one."""
    values = value if isinstance(value, list | tuple) else [value]
    return [_text(each).rpartition(" ")[2] for each in values]


def _json(value: object) -> str:
    if isinstance(value, str):  # an enum
        return _esc(str(value))
    if isinstance(value, float) and isfinite(value):
        return repr(value)
    try:
        return _encode(value)
    except (ValueError, RecursionError):  # not a number, or it contains itself
        return _esc(_text(value))


def _json_list(values: list[object]) -> str:
    try:
        return f"[{','.join(map(_esc, values))}]"  # type: ignore[arg-type]  # nearly always, but not always
    except TypeError:
        return _json(values)


_ENCODERS: dict[type, Callable[[Any], str]] = {
    str: _esc,
    int: repr,
    bool: {True: "true", False: "false"}.__getitem__,
    float: lambda value: repr(value) if isfinite(value) else _json(value),
    list: _json_list,
}


def _render_text(timestamp: _Timestamp, style: str, *, colors: bool) -> Callable[[object, str, _Event], str]:
    renderer: Callable[[Any, str, _Event], str] = (
        structlog.processors.LogfmtRenderer(bool_as_flag=False)
        if style == "logfmt"
        else structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False)
    )

    def render(logger: object, level: str, event: _Event) -> str:
        line: dict[str, object] = {"timestamp": timestamp(), "level": level}
        line["event"] = _escape(_text(event.pop("event")))
        for key, value in event.items():
            line[_key(key)] = value if value is None or isinstance(value, int) else _escape(_text(value))
        return renderer(logger, level, line)

    return render


@lru_cache(maxsize=1024)
def _key(key: str) -> str:
    if key.isidentifier() and key.isascii() and key not in _RESERVED:
        return key
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in key) + "_"


def _text(value: object) -> str:
    """Any value as text that may still hold anything."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return value.decode("ascii", "backslashreplace")
    try:
        if isinstance(value, BaseException):
            return f"{type(value).__name__}: {value}"
        return str(value)
    except Exception as exc:  # noqa: BLE001  # a value that cannot be shown must not stop the mail it belongs to
        return f"<{type(value).__name__} that fails with {type(exc).__name__}>"


def _escape(text: str) -> str:
    """Printable text as it is, and anything else so that it can be told from what is printable."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode()
        for char in text
    )


_encode = json.JSONEncoder(default=_text, skipkeys=True, allow_nan=False, separators=(",", ":")).encode
