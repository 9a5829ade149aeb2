"""body: content comes back as it was appended, from memory or from a file without a name, within two budgets."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mail.body import BLOCK_BYTES, Body, Spool, SpoolError

BLOCKS = st.lists(st.binary(max_size=200) | st.integers(0, 3 * BLOCK_BYTES).map(os.urandom), max_size=8)


class FullSpool(Spool):
    """Its files are on a full disk."""

    def open_file(self) -> FileIO:
        return FileIO("/dev/full", "w+")


_OPEN: list[Body] = []


@pytest.fixture(autouse=True)
def _no_file_stays_open() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().close()


def fill(spool: Spool, blocks: list[bytes], *, is_stuffed: bool = True) -> Body:
    body = spool.new(is_stuffed=is_stuffed)
    _OPEN.append(body)
    for block in blocks:
        body.append(block)
    return body


def content(body: Body, start: int = 0) -> bytes:
    return b"".join(body.blocks(start))


# --- what is kept -------------------------------------------------------------------------------------


@given(BLOCKS, st.sampled_from([0, 100, BLOCK_BYTES, 10 * BLOCK_BYTES]), st.data())
def test_gives_back_what_was_appended_from_any_octet_on(
    blocks: list[bytes], memory_bytes: int, data: st.DataObject
) -> None:
    spool = Spool(memory_bytes=memory_bytes)
    body = fill(spool, blocks)
    whole = b"".join(blocks)

    start = data.draw(st.integers(0, len(whole) + 1))
    pieces = list(body.blocks(start))

    assert b"".join(pieces) == whole[start:]
    assert all(0 < len(piece) <= BLOCK_BYTES for piece in pieces)
    assert content(body) == whole, "a second reading"
    assert body.size_bytes == len(whole)
    assert body.is_spilled == (len(whole) > memory_bytes)
    body.close()
    assert spool.used_bytes == 0


@given(BLOCKS, BLOCKS, st.sampled_from([0, 100, 10 * BLOCK_BYTES]))
def test_may_be_read_between_appends(first: list[bytes], second: list[bytes], memory_bytes: int) -> None:
    body = fill(Spool(memory_bytes=memory_bytes), first)
    assert content(body) == b"".join(first)

    for block in second:
        body.append(block)

    assert content(body) == b"".join(first + second)


def test_an_empty_body_has_no_blocks() -> None:
    body = fill(Spool(), [b""])

    assert list(body.blocks()) == []
    assert body.size_bytes == 0


@pytest.mark.parametrize("is_stuffed", [True, False])
def test_knows_whether_it_is_stuffed(is_stuffed: bool) -> None:
    assert Spool().new(is_stuffed=is_stuffed).is_stuffed is is_stuffed


# --- budgets ------------------------------------------------------------------------------------------


def test_one_message_stays_in_memory_up_to_its_limit() -> None:
    spool = Spool(memory_bytes=10)
    body = fill(spool, [b"x" * 10])
    assert (body.is_spilled, spool.used_bytes) == (False, 10)

    body.append(b"x")

    assert (body.is_spilled, spool.used_bytes) == (True, 0)


def test_messages_together_stay_in_memory_up_to_the_workers_limit() -> None:
    spool = Spool(memory_bytes=100, total_bytes=150)
    first, second, third = (fill(spool, []) for _ in range(3))
    first.append(b"1" * 100)
    second.append(b"2" * 50)
    assert not second.is_spilled

    third.append(b"3")

    assert [b.is_spilled for b in (first, second, third)] == [False, False, True]
    assert spool.spilled == 1
    assert spool.used_bytes == 150
    assert [content(b)[:1] for b in (first, second, third)] == [b"1", b"2", b"3"]
    first.close()
    second.append(b"2")
    assert not second.is_spilled, "there is room again"


def test_a_spilled_body_holds_less_than_a_block() -> None:
    spool = Spool(memory_bytes=0)
    body = fill(spool, [])
    most = 0
    for _ in range(300):
        body.append(b"x" * 1000)
        most = max(most, spool.used_bytes)

    assert most < BLOCK_BYTES
    assert content(body) == b"x" * 300_000


def test_memory_is_released_once_for_each_body_that_spills() -> None:
    released: list[bool] = []
    spool = Spool(memory_bytes=10, release=lambda: released.append(True))
    body = fill(spool, [b"x" * 10])
    assert released == []

    for _ in range(3):
        body.append(b"x" * BLOCK_BYTES)

    assert released == [True]


@pytest.mark.parametrize("memory_bytes", [0, 1000], ids=["file", "memory"])
def test_close_gives_up_everything_and_may_be_called_again(memory_bytes: int) -> None:
    spool = Spool(memory_bytes=memory_bytes)
    body, other = fill(spool, [b"x" * 100]), fill(spool, [b"y"])
    other_bytes = 0 if other.is_spilled else 1

    body.close()
    body.close()

    assert spool.used_bytes == other_bytes
    assert not body.is_spilled
    assert list(body.blocks()) == []
    assert body.size_bytes == 100, "the log still wants it"


# --- files --------------------------------------------------------------------------------------------


def test_the_file_has_no_name(tmp_path: Path) -> None:
    body = fill(Spool(str(tmp_path), memory_bytes=0), [b"x"])

    assert body.is_spilled
    assert list(tmp_path.iterdir()) == []
    assert body._file is not None
    assert os.fstat(body._file.fileno()).st_nlink == 0


def test_close_closes_the_file() -> None:
    body = fill(Spool(memory_bytes=0), [b"x"])
    file = body._file
    assert file is not None

    body.close()

    assert file.closed


def test_an_unusable_directory_is_a_spool_error(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "missing"), memory_bytes=0)
    body = spool.new(is_stuffed=True)

    with pytest.raises(SpoolError, match="missing: No such file"):
        body.append(b"x")

    body.close()
    assert spool.used_bytes == 0


def test_a_full_disk_is_a_spool_error_while_content_arrives() -> None:
    spool = FullSpool(memory_bytes=10)
    body = fill(spool, [b"x" * 10])

    with pytest.raises(SpoolError, match="No space left"):
        body.append(b"x")

    body.close()
    assert spool.used_bytes == 0


def test_a_disk_that_fills_up_is_a_spool_error_when_the_rest_is_written_to_be_read() -> None:
    spool = Spool(memory_bytes=0)
    body = fill(spool, [b"x" * BLOCK_BYTES, b"rest"])
    assert body._file is not None
    body._file.close()
    body._file = FullSpool().open_file()

    with pytest.raises(SpoolError, match="No space left"):
        next(body.blocks())

    body.close()
    assert spool.used_bytes == 0


def test_a_write_that_is_taken_in_part_is_gone_on_with(tmp_path: Path) -> None:
    class Hesitant(FileIO):
        def write(self, block: memoryview) -> int:  # type: ignore[override]
            return super().write(block[:1000])

    class HesitantSpool(Spool):
        def open_file(self) -> FileIO:
            return Hesitant(tmp_path / "file", "w+")

    whole = os.urandom(10_500)
    assert content(fill(HesitantSpool(memory_bytes=0), [whole])) == whole


@pytest.fixture
def file_limit() -> Iterator[int]:
    """Files of this process may not grow beyond so many octets."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BLOCK_BYTES, limits[1]))
    yield 2 * BLOCK_BYTES
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_may_not_grow_is_a_spool_error(file_limit: int, tmp_path: Path) -> None:
    spool = Spool(str(tmp_path), memory_bytes=0)
    body = fill(spool, [b"x" * file_limit])

    with pytest.raises(SpoolError, match="File too large"):
        body.append(b"x" * BLOCK_BYTES)

    body.close()
    assert spool.used_bytes == 0


def test_a_file_that_cannot_be_read_is_a_spool_error() -> None:
    body = fill(Spool(memory_bytes=0), [b"x"])
    assert body._file is not None
    body._file.close()
    body._file = FileIO(os.devnull, "w")

    with pytest.raises(SpoolError, match="Bad file descriptor"):
        next(body.blocks())
    body.close()
