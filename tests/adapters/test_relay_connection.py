"""One connection without a socket's peer: its deadlines and what it does with bytes that come at odd times."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from gateway.adapters.relay.connection import Connection
from tests.adapters.relaykit import turns
from tests.fakes import LoopTime


class Wire(asyncio.Transport):
    """Keeps what is written; `sock` is the local end of a pair."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.written = b""
        self.is_over = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True

    def abort(self) -> None:
        self.is_over = True


class World:
    """A connection whose banner was read, with the loop's time in the test's hand."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.time = LoopTime(self.loop)
        self.loop.time = self.time  # type: ignore[method-assign]
        self.far = far
        self.ended: list[Connection] = []
        self.connection = Connection(self.loop, self.ended.append)
        self.wire = Wire(near)
        self.connection.connection_made(self.wire)
        self.connection.data_received(b"220 sink.example.org\r\n")

    def at(self, seconds: float) -> float:
        return self.time() + seconds


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


@pytest.fixture
async def world(ends: tuple[socket.socket, socket.socket]) -> World:
    return World(*ends)


async def test_a_banner_that_came_before_it_was_asked_for_is_there(world: World) -> None:
    assert [reply.code for reply in await world.connection.banner(world.at(10))] == [220]


@pytest.mark.parametrize("said", [b"220 sink\r\n", b"2"])
async def test_a_connection_is_silent_until_something_comes(
    said: bytes, ends: tuple[socket.socket, socket.socket]
) -> None:
    connection = Connection(asyncio.get_running_loop(), lambda _: None)
    connection.connection_made(Wire(ends[0]))
    assert connection.is_silent
    connection.data_received(said)
    assert not connection.is_silent


async def test_a_connection_that_ended_is_not_silent(world: World) -> None:
    connection = Connection(world.loop, lambda _: None)
    connection.connection_made(world.wire)
    connection.eof_received()
    assert not connection.is_silent


async def test_a_first_reply_in_time_brings_the_later_deadline(world: World) -> None:
    exchange = world.connection.exchange(b"MAIL\r\nRCPT\r\n", 2, world.at(10), world.at(60))
    world.time.advance(9)
    world.connection.data_received(b"250 ok\r\n")
    world.time.advance(50)
    await turns(exchange.done)
    assert not exchange.done()
    world.time.advance(1)
    assert [reply.code for reply in await exchange] == [250]
    assert world.connection.trouble == "timeout"


@pytest.mark.parametrize("said", [b"", b"25"])
async def test_without_a_first_reply_the_first_deadline_counts(world: World, said: bytes) -> None:
    exchange = world.connection.exchange(b"MAIL\r\nRCPT\r\n", 2, world.at(10), world.at(60))
    if said:
        world.connection.data_received(said)
    world.time.advance(10)
    assert await exchange == []
    assert world.connection.trouble == "timeout"


async def test_a_deadline_ends_an_exchange_with_what_came(world: World) -> None:
    exchange = world.connection.exchange(b"MAIL\r\nRCPT\r\n", 2, world.at(10))
    world.connection.data_received(b"250 ok\r\n250 o")
    world.time.advance(9.9)
    await turns(exchange.done)
    assert not exchange.done()
    world.time.advance(0.1)
    assert [reply.code for reply in await exchange] == [250]
    assert world.connection.trouble == "timeout"
    assert await world.connection.exchange(b"QUIT\r\n", 1, world.at(10)) == []
    assert world.wire.written == b"MAIL\r\nRCPT\r\n"


async def test_a_later_deadline_counts_from_its_own_begin(world: World) -> None:
    first = world.connection.exchange(b"MAIL\r\n", 1, world.at(10))
    world.connection.data_received(b"250 ok\r\n")
    await first
    world.time.advance(9)
    second = world.connection.exchange(b"RCPT\r\n", 1, world.at(10))
    world.time.advance(9)
    await turns(second.done)
    assert not second.done()
    world.time.advance(1)
    assert await second == []


async def test_an_earlier_deadline_is_not_kept_waiting_by_a_later_one(world: World) -> None:
    first = world.connection.exchange(b".\r\n", 1, world.at(300))
    world.connection.data_received(b"250 ok\r\n")
    await first
    second = world.connection.exchange(b"MAIL\r\n", 1, world.at(1))
    world.time.advance(1)
    assert await second == []


async def test_writing_that_resumes_leaves_the_deadline_of_the_reply(world: World) -> None:
    world.connection.pause_writing()
    final = world.connection.exchange(b"content\r\n.\r\n", 1, world.at(300))
    world.connection.resume_writing()
    world.time.advance(300)
    assert await final == []
    assert world.connection.trouble == "timeout"


async def test_an_idle_connection_ends_at_its_deadline_and_no_later_timer_matters(world: World) -> None:
    world.connection.rest(world.at(30))
    world.time.advance(30)
    await turns(lambda: world.ended)
    assert world.ended == [world.connection]
    world.connection.quit()
    assert world.wire.written == b"QUIT\r\n"


async def test_a_connection_that_woke_does_not_end_by_the_timer_of_its_rest(world: World) -> None:
    world.connection.rest(world.at(30))
    assert world.connection.wake()
    world.time.advance(100)
    await turns(lambda: world.ended or world.connection.trouble)
    assert not world.ended
    assert world.connection.trouble == ""


@pytest.mark.parametrize("said", [b"421 4.4.2 Idle\r\n", b"4"])
async def test_a_peer_that_speaks_while_idle_ends_it(world: World, said: bytes) -> None:
    world.connection.rest(world.at(30))
    world.connection.data_received(said)
    assert world.ended == [world.connection]
    assert not world.connection.wake()


async def test_a_peer_that_closes_while_idle_ends_it(world: World) -> None:
    world.connection.rest(world.at(30))
    world.connection.eof_received()
    world.connection.connection_lost(None)
    assert world.ended == [world.connection]


async def test_bytes_that_the_loop_has_not_read_yet_make_it_useless(world: World) -> None:
    world.connection.rest(world.at(30))
    world.far.send(b"421 bye\r\n")
    assert not world.connection.wake()


async def test_an_end_that_the_loop_has_not_seen_yet_makes_it_useless(world: World) -> None:
    world.connection.rest(world.at(30))
    world.far.close()
    assert not world.connection.wake()


async def test_a_transport_that_is_closing_makes_it_useless(world: World) -> None:
    world.connection.rest(world.at(30))
    world.wire.close()
    assert not world.connection.wake()


async def test_one_reply_too_many_is_met_by_the_next_exchange(world: World) -> None:
    exchange = world.connection.exchange(b"DATA\r\n", 1, world.at(10))
    world.connection.data_received(b"354 go\r\n250 Stored\r\n")
    assert [reply.code for reply in await exchange] == [354]
    assert world.connection.trouble == "protocol"
    world.connection.data_received(b"250 more\r\n")
    assert await world.connection.exchange(b".\r\n", 1, world.at(10)) == []


async def test_an_adopted_exchange_gets_the_reply_whenever_it_came(world: World) -> None:
    early = world.connection.exchange(b".\r\n", 1, world.at(10))
    world.connection.data_received(b"250 Stored\r\n")
    early.cancel()
    assert [reply.code for reply in await world.connection.adopt()] == [250]
    between = world.connection.exchange(b".\r\n", 1, world.at(10))
    between.cancel()
    world.connection.data_received(b"251 Stored\r\n")
    assert [reply.code for reply in await world.connection.adopt()] == [251]
    late = world.connection.exchange(b".\r\n", 1, world.at(10))
    late.cancel()
    adopted = world.connection.adopt()
    world.connection.data_received(b"252 Stored\r\n")
    assert [reply.code for reply in await adopted] == [252]


async def test_content_waits_while_writing_is_paused(world: World) -> None:
    async def stream() -> None:
        assert (
            await world.connection.stream(
                iter([b"a\r\n", b"b\r\n"]), deadline=world.at(60), stall_s=60, last_deadline=world.at(240)
            )
            == []
        )

    world.connection.pause_writing()
    task = asyncio.create_task(stream())
    await turns(task.done)
    assert world.wire.written == b"a\r\n"
    world.connection.resume_writing()
    await task
    assert world.wire.written == b"a\r\nb\r\n"
    assert world.connection.trouble == ""


async def test_content_that_the_peer_does_not_take_ends(world: World) -> None:
    world.connection.pause_writing()
    task = asyncio.create_task(
        world.connection.stream(
            iter([b"a\r\n", b"b\r\n"]), deadline=world.at(1), stall_s=60, last_deadline=world.at(240)
        )
    )
    await turns(task.done)
    world.time.advance(59)
    await turns(task.done)
    assert not task.done()
    world.time.advance(1)
    await task
    assert world.connection.trouble == "timeout"
    assert world.wire.written == b"a\r\n"
