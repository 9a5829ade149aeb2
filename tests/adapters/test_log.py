"""log: nothing from outside breaks a line, and no line ever stops the process."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.log import open_log, take_over_library_logs
from gateway.redaction import Redaction

STYLES = ("json", "logfmt", "console", "text")
HOSTILE = "\r\n\x00\x1b[31m\x7f\x85\x9b\u2028\u2029\u200e\u202e\u2066\ud800\U000e0001"


class Lines:
    """A log and what it wrote."""

    def __init__(self, style: str, file: FileIO, **given: Any) -> None:
        self.losses = 0
        self._file = file
        self.log = open_log(
            style, fd=file.fileno(), on_loss=self._lose, now=lambda: 1_800_000_000.0125, **given
        )

    def _lose(self) -> None:
        self.losses += 1

    def read(self) -> str:
        self._file.seek(0)
        return self._file.read().decode("utf-8")


@contextmanager
def opened(style: str, **given: Any) -> Iterator[Lines]:
    with tempfile.TemporaryFile(buffering=0) as file:
        yield Lines(style, file, **given)


def test_json() -> None:
    with opened("json") as lines:
        lines.log.info(
            "message.rejected", code=550, reason="spf.fail", ok=True, duration_ms=1.5, mail_from=None
        )
        lines.log.warning(
            "dns.failed", error=TimeoutError("5 s"), question=b"\xff.example.org", rcpts=("a", "b")
        )
        assert lines.read() == (
            '{"timestamp":"2027-01-15T08:00:00.012Z","level":"info","event":"message.rejected",'
            '"code":550,"reason":"spf.fail","ok":true,"duration_ms":1.5,"mail_from":null}\n'
            '{"timestamp":"2027-01-15T08:00:00.012Z","level":"warning","event":"dns.failed",'
            '"error":"TimeoutError: 5 s","question":"\\\\xff.example.org","rcpts":["a","b"]}\n'
        )


def test_logfmt() -> None:
    with opened("logfmt") as lines:
        lines.log.info("message.rejected", code=550, ok=True, mail_from=None, helo='a "b"\n=c')
        assert lines.read() == (
            "timestamp=2027-01-15T08:00:00.012Z level=info event=message.rejected "
            'code=550 ok=true mail_from= helo="a \\"b\\"\\\\n=c"\n'
        )


def test_console() -> None:
    with opened("console") as lines:
        lines.log.error("message.rejected", code=550, helo="mx.example.org")
        assert lines.read() == (
            "2027-01-15T08:00:00.012Z [error    ] message.rejected               code=550 helo=mx.example.org\n"
        )


TRANSACTION: dict[str, Any] = {
    "session": "s",
    "tx": "s-1",
    "stage": "rcpt",
    "policy": "relay_guard",
    "action": "rejected",
    "reason": "relaying_denied",
    "code": 550,
    "enhanced": "5.7.1",
    "text": "Relaying denied",
    "client": "192.0.2.7",
    "helo": "mail.example.net",
    "proto": "ESMTP",
    "mail_from": "you@example.net",
    "rcpts": ["ann@example.com"],
    "rcpt_count": 0,
    "refused": ["550 5.7.1 relay_guard relaying_denied ann@example.com"],
    "route": "main",
    "size_bytes": 2048,
    "duration_ms": 1.5,
    "error": "",
}


def test_text() -> None:
    with opened("text", hostname="mx.example.org") as lines:
        lines.log.info("message.rejected", **TRANSACTION)
        lines.log.info(
            "message.accepted",
            **TRANSACTION | {"code": 250, "enhanced": "2.0.0", "text": "Ok", "policy": "", "rcpt_count": 1},
        )
        lines.log.warning("relay.host_down", host="mta:25", detail="no route = none")
        head = f"2027-01-15T08:00:00.012Z mx.example.org mxgate/{{}}[{os.getpid()}]: "
        refused, accepted, other = lines.read().splitlines()
    assert refused == (
        head.format("smtpd")
        + "NOQUEUE: reject: RCPT from unknown[192.0.2.7]: 550 5.7.1 <ann@example.com>: Relaying denied; "
        "from=<you@example.net> to=<ann@example.com> proto=ESMTP helo=<mail.example.net> id=s-1 size=2048 delay=0.0015 "
        "session=s policy=relay_guard action=rejected reason=relaying_denied "
        'refused="550 5.7.1 relay_guard relaying_denied ann@example.com"'
    )
    assert accepted.startswith(
        head.format("smtpd")
        + "s-1: client=unknown[192.0.2.7], from=<you@example.net>, to=<ann@example.com>, relay=main, size=2048, "
        "nrcpt=1, delay=0.0015, dsn=2.0.0, status=sent (250 2.0.0 Ok), proto=ESMTP helo=<mail.example.net> "
    )
    assert other == head.format("relay") + ('warning: relay.host_down host=mta:25 detail="no route = none"')


def test_text_names_the_recipient_that_was_refused_and_not_those_that_were_taken() -> None:
    with opened("text") as lines:
        lines.log.info("transaction.refused", **TRANSACTION | {"rcpts": ["bob@example.org"], "rcpt_count": 1})
        line = lines.read()
    assert ": 550 5.7.1 <ann@example.com>: Relaying denied; " in line
    assert " to=<ann@example.com> proto=" in line
    assert "bob" not in line


@given(
    text=st.text()
    | st.text(alphabet='<>[]()=;:," \\x\n')
    | st.sampled_from([HOSTILE, "a> to=<b> policy=x", "x; from=<y>", '" policy=x "'])
)
def test_in_text_no_value_makes_a_field(text: str) -> None:
    """Each field stands there once, with the value that it has."""
    hostile = {
        "helo": text,
        "mail_from": text,
        "rcpts": [text],
        "text": text,
        "refused": [text],
        "error": text,
    }
    for event in ("message.rejected", "message.accepted", "transaction.aborted", "session.ended"):
        with opened("text") as lines:
            lines.log.info(event, **TRANSACTION | hostile)
            line = lines.read()
        assert line.count("\n") == 1
        assert line.isascii()
        # without what is in brackets or quotes, and behind the words of the reply
        plain = re.sub(r'<[^<>]*>|"[^"]*"', "", line)
        for field in (" policy=", " reason=", " helo="):
            assert plain.count(field) == 1
        assert plain.count("unknown[") == 1
        assert plain.count(" to=") <= 1


@pytest.mark.parametrize("style", STYLES)
def test_what_is_to_be_redacted_is_in_no_value(style: str) -> None:
    with opened(style, redaction=Redaction(["local_parts", "client_addresses"])) as lines:
        lines.log.info("message.rejected", **TRANSACTION)
        lines.log.error("policy.failed", error=ValueError("ann@example.com"), address=ip_address("192.0.2.7"))
        lines.log.info("relay.host_down", host="10.0.0.5:25")
        lines.log.warning("auth.refused", user="ann")
        read = lines.read()
    assert not re.search(r"ann@|you@|user=ann|192\.0\.2\.7|\"ann\"", read)
    assert read.count("***@example.com") >= 2
    assert "192.0.2.0/24" in read
    assert "10.0.0.5:25" in read  # the operator's own


@pytest.mark.parametrize("style", STYLES)
def test_words_about_somebody_are_redacted_too(style: str) -> None:
    with opened(style, redaction=Redaction(["local_parts"])) as lines:
        told: dict[str, object] = {
            "user": "carl",
            "mail_from": "ann@example.net",
            "rcpts": ["bob@example.org"],
        }
        refused = ["550 5.1.1  downstream dora@example.org"]
        lines.log.info(
            "message.rejected", **told, refused=refused, text="Bob and dora? Not for carl", error="ann"
        )
        lines.log.warning("auth.refused", user="carl")
        read = lines.read()
    assert not re.search("(?i)ann|bob|carl|dora", read)


@pytest.mark.parametrize("style", STYLES)
def test_debug_is_written_where_it_is_wanted(style: str) -> None:
    with opened(style, with_debug=True) as lines:
        lines.log.debug("debug.dialogue", side="client", line="NOOP")
        assert "NOOP" in lines.read()


@pytest.mark.parametrize("style", STYLES)
def test_debug_is_not_written(style: str) -> None:
    with opened(style) as lines:
        lines.log.debug("message.rejected")
        assert lines.read() == ""


@pytest.mark.parametrize("style", STYLES)
@given(
    value=st.text() | st.binary() | st.sampled_from([HOSTILE, "a" + HOSTILE + "b"]), key=st.text(min_size=1)
)
def test_any_text_stays_within_its_line(style: str, value: str | bytes, key: str) -> None:
    with opened(style) as lines:
        lines.log.info(
            "client.greeted", **{"helo": value, f"x{key}": 1, "error": KeyError(value), "rcpts": [value]}
        )
        line = lines.read()
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    if style in ("json", "text"):
        assert line.isascii()
    if style == "json" and isinstance(value, str):
        assert json.loads(line)["helo"] == value


def test_different_values_are_never_written_the_same() -> None:
    with opened("logfmt") as lines:
        lines.log.info("client.greeted", helo="a\nb")
        lines.log.info("client.greeted", helo="a\\nb")
        first, second = lines.read().splitlines()
    assert first != second


@pytest.mark.parametrize("style", STYLES)
def test_the_lines_own_keys_cannot_be_overwritten(style: str) -> None:
    with opened(style) as lines:
        lines.log.info("client.greeted", timestamp="1970", level="none", exc_info=True, stack="x")  # noqa: LOG014
        line = lines.read()
    assert line.count("\n") == 1
    assert "2027-01-15" in line
    assert "level_" in line
    assert "exc_info_" in line


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("style", STYLES)
def test_no_value_makes_it_raise(style: str) -> None:
    endless: list[object] = []
    endless.append(endless)
    with opened(style) as lines:
        lines.log.info(
            "value.odd",
            a=Broken(),
            b=endless,
            c=float("nan"),
            d=[float("inf")],
            e={(1, 2): 3},
            f={"g": Broken()},
        )
        line = lines.read()
    assert "<Broken that fails with RuntimeError>" in line
    if style == "json":
        odd = json.loads(line)
        assert odd["c"] == "nan"
        assert odd["e"] == {}


@pytest.mark.parametrize("style", STYLES)
def test_a_full_disk_only_counts(style: str) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        lines = Lines(style, full)
        lines.log.info("message.rejected")
        lines.log.info("message.rejected")
    assert lines.losses == 2
    lines.log.info("message.rejected")  # its descriptor is closed by now
    assert lines.losses == 3


def test_a_pipe_without_a_reader_only_counts() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        lines = Lines("json", pipe)
        lines.log.info("message.rejected")
    assert lines.losses == 1


def test_a_reader_that_stands_still_costs_lines_but_no_time() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "wb", buffering=0) as pipe:
        lines = Lines("json", pipe)
        logged = 0
        while not lines.losses:
            lines.log.info("message.rejected", helo="x" * 2 * select.PIPE_BUF)
            logged += 1
        arrived = reader.read(1_000_000)
        lines.log.info("message.accepted")
        pipe.close()
        arrived += reader.read()
    complete = [line for line in arrived.splitlines() if line.endswith(b"}")]
    events = [json.loads(line)["event"] for line in complete]
    assert events == ["message.rejected"] * (logged - 1) + ["message.accepted"]
    assert len(arrived.splitlines()) - len(complete) <= 1  # the line that was lost may have begun
    assert lines.losses == 1


def test_library_logs_become_events() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers.clear()  # pytest's own would see them first, and must not be closed
    try:
        with opened("json") as lines:
            take_over_library_logs(lines.log)
            take_over_library_logs(lines.log)
            library = logging.getLogger("asyncio")
            library.info("nothing")
            library.warning("slow by %d s", 5)
            library.warning("slow by %d s", "five")
            try:
                os.environ["A\nB"]
            except KeyError:
                library.exception("failed")
            slow, odd, failed = map(json.loads, lines.read().splitlines())
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert slow["event"] == "library.complained"
    assert (slow["level"], slow["library"], slow["message"]) == ("warning", "asyncio", "slow by 5 s")
    assert odd["message"] == "slow by %d s"
    assert failed["level"] == "error"
    assert "KeyError" in failed["error"]
