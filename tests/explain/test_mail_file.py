"""mail_file: what a file holds is what a client would have sent."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.explain.mail_file import MailFile
from gateway.mail.body import BLOCK_BYTES
from gateway.smtp.content import Fault


def read(octets: bytes, *, max_bytes: int = 1_000_000) -> tuple[bytes, Fault | None]:
    file = MailFile(BytesIO(octets), max_bytes=max_bytes, max_line_bytes=1000)
    blocks = list(file.blocks())
    assert all(len(block) <= BLOCK_BYTES for block in blocks)
    return b"".join(blocks), file.fault


@pytest.mark.parametrize(
    ("octets", "content"),
    [
        (b"A: b\n\nc\n", b"A: b\r\n\r\nc\r\n"),
        (b"A: b\r\n\r\nc\r\n", b"A: b\r\n\r\nc\r\n"),
        (b"A: b\n\nc", b"A: b\r\n\r\nc\r\n"),
        (b"A: b\n\nc\r\nd\n", b"A: b\r\n\r\nc\r\nd\r\n"),
        (b"From x@y Mon Jan  1\nA: b\n\n.\n", b"A: b\r\n\r\n.\r\n"),
        (b"From x@y Mon Jan  1\r\nA: b\r\n", b"A: b\r\n"),
        (b"From: x\n\n", b"From: x\r\n\r\n"),
        (b"\n", b"\r\n"),
        (b"", b""),
    ],
)
def test_a_mail_file_is_read_as_one(octets: bytes, content: bytes) -> None:
    assert read(octets) == (content, None)


@pytest.mark.parametrize(
    ("octets", "fault"),
    [
        (b"A: b\r\n\r\na\nb\r\n", Fault.LINE_END),
        (b"A: b\n\na\rb\n", Fault.LINE_END),
        (b"A: b\n\nc\r", Fault.LINE_END),
        (b"A: b\n\n\0\n", Fault.LINE_END),
        (b"A: b\n\n" + b"x" * 1001 + b"\n", Fault.LONG_LINE),
        (b"A: b\n\n" + b"x\n" * 600_000, Fault.TOO_BIG),
    ],
)
def test_what_a_session_would_refuse_has_its_fault(octets: bytes, fault: Fault) -> None:
    assert read(octets)[1] is fault


@given(st.integers(0, 4), st.integers(0, 4), st.binary(max_size=40))
def test_no_cut_between_blocks_changes_anything(before: int, at: int, text: bytes) -> None:
    filler = (b"x" * 70 + b"\n") * (BLOCK_BYTES // 71)
    lines = text.replace(b"\r", b"").replace(b"\0", b"").replace(b"\n", b"\r\n"[at % 2 :])
    octets = b"A: b\n" + filler + b"y" * (BLOCK_BYTES - 5 - len(filler) - before) + lines
    expected = octets.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    if not expected.endswith(b"\r\n"):
        expected += b"\r\n"
    assert read(octets) == (expected, None)


def test_a_large_file_is_read_block_by_block() -> None:
    class Endless:
        def read(self, size: int) -> bytes:
            return b"x\n" * (size // 2)

    file = MailFile(Endless(), max_bytes=1_000_000, max_line_bytes=1000)  # type: ignore[arg-type]  # it reads
    assert sum(map(len, file.blocks())) < 1_000_001
    assert file.fault is Fault.TOO_BIG
