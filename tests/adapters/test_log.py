"""log: nothing from outside breaks a line, and no line ever stops the process."""

from __future__ import annotations

import json
import logging
import os
import select
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.log import open_log, take_over_library_logs

STYLES = ("json", "logfmt", "console")
HOSTILE = "\r\n\x00\x1b[31m\x7f\x85\x9b\u2028\u2029\u200e\u202e\u2066\ud800\U000e0001"


class Lines:
    """A log and what it wrote."""

    def __init__(self, style: str, file: FileIO) -> None:
        self.losses = 0
        self._file = file
        self.log = open_log(style, fd=file.fileno(), on_loss=self._lose, now=lambda: 1_800_000_000.0125)

    def _lose(self) -> None:
        self.losses += 1

    def read(self) -> str:
        self._file.seek(0)
        return self._file.read().decode("utf-8")


@contextmanager
def opened(style: str) -> Iterator[Lines]:
    with tempfile.TemporaryFile(buffering=0) as file:
        yield Lines(style, file)


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
    if style == "json":
        assert line.isascii()
        if isinstance(value, str):
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
