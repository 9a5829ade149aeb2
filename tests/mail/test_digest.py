"""Body digests: the same as a plain reading of RFC 6376 3.4 gives, however the body is cut, in linear time."""

from __future__ import annotations

import re
import time
import tracemalloc
from collections.abc import Sequence
from hashlib import sha256

import dkim.canonicalization  # type: ignore[import-untyped]  # it has no annotations
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.mail.digest import BodyDigest, BodyDigests, Canonicalization

SIMPLE, RELAXED = Canonicalization
MIB = 1024 * 1024
BLOCK = 65536

PIECES = st.lists(
    st.sampled_from(
        [b"a", b"bc", b".", b" ", b"  ", b"\t", b"\r\n", b"\r\n\r\n", b"\r", b"\n", b"\x0b", b"\xff"]
    ),
    max_size=20,
)
LENGTHS = st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=4)


def simple(body: bytes) -> bytes:
    """RFC 6376 3.4.3, word by word."""
    while body.endswith(b"\r\n"):
        body = body[:-2]
    return body + b"\r\n"


def relaxed(body: bytes) -> bytes:
    """RFC 6376 3.4.4, word by word."""
    lines = [re.sub(rb"[ \t]+", b" ", line).rstrip(b" ") for line in body.split(b"\r\n")]
    while lines and not lines[-1]:
        lines.pop()
    return b"".join([line + b"\r\n" for line in lines])


def digests_of(blocks: Sequence[bytes], *wanted: tuple[Canonicalization, int | None]) -> BodyDigests:
    digests = BodyDigests()
    for canonicalization, length in wanted:
        digests.want(canonicalization, length)
    for block in blocks:
        digests.block(block)
    digests.end()
    return digests


def digest_of(body: bytes, canonicalization: Canonicalization, length: int | None = None) -> BodyDigest:
    blocks = [body[at : at + BLOCK] for at in range(0, len(body), BLOCK)]
    return digests_of(blocks, (canonicalization, length)).get(canonicalization, length)


def hashed(text: bytes) -> BodyDigest:
    return BodyDigest(sha256(text).digest(), len(text))


@given(PIECES, LENGTHS)
@example([b"a", b"\r\n", b"\r"], [None])
@example([b" "] * 3, [None])
@example([b"\r\n"] * 4, [None, 0, 1, 2, 3])
def test_digest_is_that_of_the_canonical_body_wherever_it_is_cut(
    pieces: list[bytes], lengths: list[int | None]
) -> None:
    body = b"".join(pieces)
    wanted = [(mode, length) for mode in Canonicalization for length in lengths]
    octets = [body[at : at + 1] for at in range(len(body))]
    for blocks in (pieces, [body], octets):
        digests = digests_of(blocks, *wanted)
        for mode, canonical in ((SIMPLE, simple(body)), (RELAXED, relaxed(body))):
            for length in lengths:
                expected = sha256(canonical if length is None else canonical[:length]).digest()
                assert digests.get(mode, length) == BodyDigest(expected, len(canonical))


@given(st.lists(st.sampled_from([b"a", b" ", b"\t", b"\r\n"]), max_size=30).map(b"".join))
def test_digest_is_that_of_dkimpy(body: bytes) -> None:
    body += b"\r\n"
    assert digest_of(body, SIMPLE) == hashed(dkim.canonicalization.Simple.canonicalize_body(body))
    assert digest_of(body, RELAXED) == hashed(dkim.canonicalization.Relaxed.canonicalize_body(body))


@pytest.mark.parametrize(
    ("body", "mode", "canonical"),
    [
        (b"", SIMPLE, b"\r\n"),
        (b"", RELAXED, b""),
        (b"\r\n\r\n", SIMPLE, b"\r\n"),
        (b"\r\n\r\n", RELAXED, b""),
        (b" \t\r\n \r\n", RELAXED, b""),
        (b"a", SIMPLE, b"a\r\n"),
        (b"a", RELAXED, b"a\r\n"),
        (b"a \t b\t \r\n\r\n", RELAXED, b"a b\r\n"),
        (b" C \r\nD \t E\r\n\r\n\r\n", RELAXED, b" C\r\nD E\r\n"),  # RFC 6376 3.4.5
        (b" C \r\nD \t E\r\n\r\n\r\n", SIMPLE, b" C \r\nD \t E\r\n"),
        (b"\r\n" * 20_000 + b"x\r\n", SIMPLE, b"\r\n" * 20_000 + b"x\r\n"),
    ],
)
def test_canonical_body(body: bytes, mode: Canonicalization, canonical: bytes) -> None:
    assert digest_of(body, mode) == hashed(canonical)


def test_body_that_is_shorter_than_asked_for_is_hashed_whole() -> None:
    assert digest_of(b"abc\r\n", SIMPLE, 99) == hashed(b"abc\r\n")


def test_nothing_is_to_be_had_that_was_not_wanted_in_time() -> None:
    assert not BodyDigests().is_wanted
    digests = BodyDigests()
    digests.want(SIMPLE)
    assert digests.is_wanted
    with pytest.raises(LookupError):
        digests.get(SIMPLE)
    digests.block(b"a")
    digests.want(RELAXED)
    digests.end()
    assert digests.get(SIMPLE) == hashed(b"a\r\n")
    with pytest.raises(LookupError):
        digests.get(RELAXED)


def test_recorded_digests_are_had_without_the_body() -> None:
    finished = digests_of([b"ab\r\n"], (SIMPLE, None), (RELAXED, 1)).finished
    assert dict(finished) == {
        (SIMPLE, None): hashed(b"ab\r\n"),
        (RELAXED, 1): BodyDigest(sha256(b"a").digest(), 4),
    }
    recorded = BodyDigests.recorded(finished)
    recorded.want(RELAXED, 1)
    assert not recorded.is_wanted
    assert recorded.get(RELAXED, 1) == finished[RELAXED, 1]
    with pytest.raises(LookupError):
        recorded.get(SIMPLE, 1)


HOSTILE = {
    "spaces": b" " * BLOCK,
    "tabs": b"\t" * BLOCK,
    "line ends": b"\r\n" * (BLOCK // 2),
    "spaces and line ends": b" \r\n" * (BLOCK // 3),
    "double spaces": b"a  " * (BLOCK // 3),
    "bare CR": b"\r" * BLOCK,
}


@pytest.mark.parametrize("mode", Canonicalization)
@pytest.mark.parametrize("block", HOSTILE.values(), ids=HOSTILE)
def test_time_is_linear_and_memory_constant(mode: Canonicalization, block: bytes) -> None:
    def cpu_s(blocks: int) -> float:
        digests = BodyDigests()
        digests.want(mode)
        begun = time.process_time()
        for _ in range(blocks):
            digests.block(block)
        digests.block(b"x")
        digests.end()
        return time.process_time() - begun

    # 16 times the octets; a quadratic way would need 256 times the time
    assert min(cpu_s(48), cpu_s(48)) < 16 * 4 * max(min(cpu_s(3) for _ in range(3)), 1e-4)
    tracemalloc.start()
    try:
        cpu_s(16)
        assert tracemalloc.get_traced_memory()[1] < 8 * BLOCK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("mode", Canonicalization)
def test_line_of_200_kb_of_spaces_costs_no_more_than_text(mode: Canonicalization) -> None:
    assert digest_of(b"a" + b" " * 200_000 + b"\r\n", mode).size_bytes == (3 if mode is RELAXED else 200_003)
