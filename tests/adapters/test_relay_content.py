"""Content: bytes, blocks, stuffing, back-pressure, and the budgets for large messages."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.relay.outgoing import pieces, whole
from gateway.smtp.content import unstuff
from gateway.smtp.reply import (
    INTERNAL,
)
from tests.adapters.relaykit import (
    BLOCK,
    PREFIX,
    SHORT_S,
    TROUBLE,
    Generated,
    Mail,
    both_loops,
    relay_to,
    turns,
)
from tests.adapters.sink import RESET, Do, Sink, say
from tests.fakes import LoopTime

# --- large content -----------------------------------------------------------------------------------


@both_loops
async def test_ten_mebibytes_arrive_in_flat_memory() -> None:
    gate = asyncio.Event()
    async with Sink(content_after=100_000, content=[Do(gate=gate)]) as sink, relay_to(sink) as bench:
        content = Generated(160)
        tracemalloc.start()
        try:
            delivery = asyncio.create_task(bench.deliver(content=content))
            await sink.until(lambda sink: sink.content_bytes > 100_000)
            # The sink does not read on: the relay fills the kernel's buffers and waits.
            (connection,) = bench.pool._used
            await turns(lambda: connection._drained)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        asked = content.asked
        assert asked < 160
        await turns(lambda: False)
        assert content.asked == asked
        # the sink's own buffers are in it
        assert peak < 2 * 2**20
        gate.set()
        assert (await delivery).stored
        assert sink.messages[0].wire == PREFIX + BLOCK * (1024 * 160)


@both_loops
async def test_a_downstream_that_takes_nothing_is_a_timeout_without_a_dot() -> None:
    async with (
        Sink(content=Do(gate=asyncio.Event())) as sink,
        relay_to(sink, reply_timeout_s=SHORT_S, deliver_timeout_s=0.5) as bench,
    ):
        delivery = await bench.deliver(content=Generated(400))
        assert (str(delivery.reply), delivery.error) == (TROUBLE, "timeout")
        assert sink.messages == []


class Slow(Generated):
    """Each block takes `block_s` of the loop's time, which stands still otherwise."""

    def __init__(self, blocks: int, time: LoopTime, block_s: float) -> None:
        super().__init__(blocks)
        self._time, self._block_s = time, block_s

    def blocks(self) -> Iterator[bytes]:
        for block in super().blocks():
            self._time.advance(self._block_s)
            yield block


@pytest.mark.parametrize(("block_s", "is_stored"), [(5.0, True), (6.1, False)])
async def test_content_that_keeps_moving_may_exceed_the_budget_but_not_for_ever(
    block_s: float, is_stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    time = LoopTime(loop)
    monkeypatch.setattr(loop, "time", time)
    async with (
        Sink() as sink,
        relay_to(sink, deliver_timeout_s=60.0, deliver_moving_timeout_s=240.0, reply_timeout_s=60.0) as bench,
    ):
        delivery = await bench.deliver(content=Slow(40, time, block_s))
        assert delivery.stored == is_stored
        assert delivery.error == ("" if is_stored else "timeout")
        assert len(sink.messages) == is_stored


@pytest.mark.parametrize(
    ("do", "reply", "error"),
    [
        (say("552 5.3.4 Too big", "hang"), "552 5.3.4 Too big", "refused"),
        (say("250 2.0.0 Stored already", "hang"), TROUBLE, "protocol"),
        (RESET, TROUBLE, "closed"),
    ],
)
@both_loops
async def test_trouble_in_the_middle_of_content_ends_it_without_a_dot(do: Do, reply: str, error: str) -> None:
    async with Sink(content=do, content_after=100_000) as sink, relay_to(sink) as bench:
        delivery = await bench.deliver(content=Generated(400))
        assert (str(delivery.reply), delivery.error) == (reply, error)
        assert sink.messages == []


@both_loops
async def test_cancelled_in_the_middle_of_content_there_is_no_dot() -> None:
    gate = asyncio.Event()
    async with Sink(content=Do(gate=gate)) as sink, relay_to(sink) as bench:
        delivery = asyncio.create_task(bench.deliver(content=Generated(400)))
        await sink.until(lambda sink: sink.content_bytes)
        delivery.cancel()
        await asyncio.wait((delivery,))
        gate.set()
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.messages == []
        assert delivery.cancelled()


class Unreadable(Generated):
    def blocks(self) -> Iterator[bytes]:
        yield BLOCK
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("content", [Unreadable, lambda size: Mail((b"open line",), size=size * 65536)])
@both_loops
async def test_content_that_cannot_be_read_is_our_trouble(size: int, content: Any) -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        made = content(size)
        delivery = await bench.deliver(content=made)
        assert (delivery.reply, delivery.error) == (INTERNAL, "internal")
        await sink.until(lambda sink: not sink.open_peers)
        assert sink.messages == []


@both_loops
async def test_plain_content_is_stuffed() -> None:
    plain = Mail((b".a\r", b"\n.", b"\r\n", b"..\r\n.\r\n"), is_stuffed=False)
    async with Sink() as sink, relay_to(sink) as bench:
        assert (await bench.deliver(content=plain)).stored
        assert (await bench.deliver(content=Mail(plain.pieces, is_stuffed=False, size=10**6))).stored
        for message in sink.messages:
            assert unstuff(message.wire) == PREFIX + b"".join(plain.pieces)
        assert len(sink.messages) == 2


async def test_empty_content_is_a_message_too() -> None:
    async with Sink() as sink, relay_to(sink) as bench:
        assert (await bench.deliver(content=Mail((), b""))).stored
        assert (await bench.deliver(content=Mail((), b"", size=10**6))).stored
        assert [message.wire for message in sink.messages] == [b"", b""]


@given(st.lists(st.lists(st.sampled_from([b".", b"\r\n", b"\r\n.", b"x", b"\r"])).map(b"".join)))
def test_whole_and_pieces_are_the_same_and_end_with_one_dot(blocks: list[bytes]) -> None:
    body = b"".join(blocks)
    content = Mail((*blocks, b"\r\n"), is_stuffed=False)
    wire = whole(content)
    assert wire == b"".join(pieces(content)) + b".\r\n"
    assert unstuff(wire[:-3]) == PREFIX + body + b"\r\n"
    assert wire.find(b"\r\n.\r\n") == len(wire) - 5
