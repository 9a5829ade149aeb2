"""DATA and BDAT decoding: the same result for every split of the stream, and only CRLF.CRLF ends content."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.smtp.content import BdatDecoder, DataDecoder, Fault, stuff, unstuff

# pieces that meet in every way around line ends and dots
PIECES = st.lists(
    st.sampled_from([b"\r\n", b"\r", b"\n", b".", b"..", b"\0", b"a", b"bc ", b"\xff", b"x" * 40]),
    max_size=30,
).map(b"".join)
LEGAL_LINES = st.lists(
    st.sampled_from([b"", b".", b"..", b".a", b"a.", b"text", b"\xc3\xa4", b"x" * 50]), max_size=20
).map(lambda lines: b"".join(line + b"\r\n" for line in lines))


def decode(decoder: DataDecoder | BdatDecoder, chunks: list[bytes]) -> tuple[bytes, bytes | None]:
    """Everything that the decoder kept, and what stood behind the end (None: no end)."""
    kept, rest = b"", None
    for chunk in chunks:
        if rest is not None:
            rest += chunk
            continue
        block, rest = decoder.feed(chunk)
        assert not block.endswith(b"\r")
        kept += block
    return kept, rest


def splits(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({c % (len(data) + 1) for c in cuts})
    edges = [0, *at, len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def data_decoder(**changes: Any) -> DataDecoder:
    return DataDecoder(**{"max_bytes": 10_000, "max_line_bytes": 998} | changes)


@given(PIECES, st.lists(st.integers(0, 400), max_size=12), st.booleans())
def test_any_split_gives_the_same(data: bytes, cuts: list[int], allow_bare_lf: bool) -> None:
    data += b"\r\n.\r\nQUIT\r\n"
    whole = data_decoder(allow_bare_lf=allow_bare_lf)
    parts = data_decoder(allow_bare_lf=allow_bare_lf)

    kept, rest = decode(whole, [data])
    kept_parts, rest_parts = decode(parts, splits(data, cuts))

    assert rest == rest_parts
    assert whole.fault == parts.fault
    if whole.fault is None:
        assert kept == kept_parts


@given(LEGAL_LINES, st.lists(st.integers(0, 400), max_size=12))
def test_legal_content_is_kept_as_it_came(plain: bytes, cuts: list[int]) -> None:
    wire = stuff(plain) + b".\r\n"
    decoder = data_decoder()

    kept, rest = decode(decoder, splits(wire, cuts))

    assert (unstuff(kept), rest, decoder.fault) == (plain, b"", None)


@given(PIECES)
def test_nothing_but_crlf_dot_crlf_ends(data: bytes) -> None:
    decoder = data_decoder()

    _, rest = decode(decoder, [data])

    ended = data.startswith(b".\r\n") or b"\r\n.\r\n" in data
    assert (rest is not None) == ended


@given(PIECES)
def test_bare_line_ends_and_nul_are_always_a_fault(data: bytes) -> None:
    data = b"x" + data.replace(b"\r\n.", b"\r\n..") + b"x\r\n"
    decoder = data_decoder()

    kept, _ = decode(decoder, [data + b".\r\n"])

    stripped = data.replace(b"\r\n", b"")
    is_bad = any(c in stripped for c in b"\r\n\0")
    assert (decoder.fault is Fault.LINE_END) == is_bad
    assert is_bad or kept == data


@given(PIECES, st.lists(st.integers(0, 400), max_size=8))
def test_normalised_content_holds_no_look_alike(data: bytes, cuts: list[int]) -> None:
    data = data.replace(b"\0", b"") + b"\r\n.\r\n"
    decoder = data_decoder(allow_bare_lf=True)

    kept, _ = decode(decoder, splits(data, cuts))

    if decoder.fault is None:
        stripped = kept.replace(b"\r\n", b"")
        assert b"\r" not in stripped
        assert b"\n" not in stripped
        assert not kept.startswith(b".\r\n")
        assert b"\r\n.\r\n" not in kept
    else:
        assert decoder.fault is Fault.LINE_END


@pytest.mark.parametrize(
    "look_alike", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\r\n\0.\r\n"]
)
def test_look_alikes_are_content_and_a_fault(look_alike: bytes) -> None:
    decoder = data_decoder()

    _, rest = decode(decoder, [b"a" + look_alike + b"MAIL FROM:<x@y.example>\r\n.\r\nNOOP\r\n"])

    assert rest == b"NOOP\r\n"
    assert decoder.fault is Fault.LINE_END
    assert decoder.fault.closes


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("cut", [1, 100, 8192, 8193, 8194])
def test_longest_line(extra: int, cut: int) -> None:
    wire = b"s\r\n" + b"x" * (8192 + extra) + b"\r\nend\r\n.\r\n"
    decoder = DataDecoder(max_bytes=100_000, max_line_bytes=8192)

    chunks = [wire[i : i + cut] for i in range(0, len(wire), cut)]
    decode(decoder, chunks)

    assert decoder.fault is (Fault.LONG_LINE if extra else None)


@given(st.lists(st.integers(0, 60), max_size=30), st.lists(st.integers(0, 2000), max_size=20))
def test_long_lines_are_found_at_any_split(lengths: list[int], cuts: list[int]) -> None:
    wire = b"".join(b"x" * n + b"\r\n" for n in lengths) + b".\r\n"
    decoder = DataDecoder(max_bytes=100_000, max_line_bytes=40)

    decode(decoder, splits(wire, cuts))

    assert (decoder.fault is Fault.LONG_LINE) == any(n > 40 for n in lengths)


def test_too_much_is_dropped_and_given_up_after_as_much_again() -> None:
    decoder = DataDecoder(max_bytes=1000, max_line_bytes=998)
    line = b"x" * 98 + b"\r\n"

    kept = b"".join(decoder.feed(line)[0] for _ in range(11))
    assert len(kept) == 1000
    assert decoder.fault is Fault.TOO_BIG
    assert not decoder.is_hopeless

    for _ in range(11):
        decoder.feed(line)
    assert decoder.is_hopeless


@given(
    LEGAL_LINES,
    st.lists(st.integers(0, 100), min_size=1, max_size=5),
    st.lists(st.integers(0, 400), max_size=8),
)
def test_bdat_keeps_chunks_as_they_came(plain: bytes, sizes: list[int], cuts: list[int]) -> None:
    decoder = BdatDecoder(max_bytes=10_000, max_line_bytes=998)
    kept, left = b"", plain
    for size in [*sizes, len(plain)]:
        chunk, left = left[:size], left[size:]
        decoder.begin_chunk(len(chunk))
        blocks, rest = decode(decoder, splits(chunk, cuts))
        assert rest == b""
        kept += blocks
    kept += decoder.finish()

    assert (kept, decoder.fault) == (plain, None)


def test_bdat_without_a_final_line_end_gets_one() -> None:
    decoder = BdatDecoder(max_bytes=100, max_line_bytes=998)
    decoder.begin_chunk(3)

    block, rest = decoder.feed(b"abcNOOP\r\n")

    assert (block + decoder.finish(), rest) == (b"abc\r\n", b"NOOP\r\n")


@pytest.mark.parametrize("chunk", [b"a\rb", b"a\nb", b"a\0b", b"ab\r"])
def test_bdat_has_the_same_line_ends(chunk: bytes) -> None:
    decoder = BdatDecoder(max_bytes=100, max_line_bytes=998)
    decoder.begin_chunk(len(chunk))

    decoder.feed(chunk)
    decoder.finish()

    assert decoder.fault is Fault.LINE_END


def test_bdat_announced_too_big_is_a_fault_before_it_comes() -> None:
    decoder = BdatDecoder(max_bytes=100, max_line_bytes=998)

    decoder.begin_chunk(101)

    assert decoder.fault is Fault.TOO_BIG
    assert decoder.feed(b"x" * 101) == (b"", b"")


@given(st.lists(st.sampled_from([b".", b"a", b"\r\n"]), max_size=20).map(lambda p: b"".join(p) + b"\r\n"))
def test_unstuff_undoes_stuff(plain: bytes) -> None:
    assert unstuff(stuff(plain)) == plain
    assert b"\r\n.\r\n" not in b"\r\n" + stuff(plain)
