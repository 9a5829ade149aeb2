"""The connection to a Redis server: replies belong to who asked, whatever arrives how."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Connection
from redis.exceptions import ResponseError

from gateway.adapters.store.redis import reason
from gateway.adapters.store.redis_link import Link, packed
from gateway.store import StoreError
from tests.e2e.net import LOOPBACK

GET = packed("GET", "a")


class Scripted:
    """A server that reads whole commands and says what the test wants."""

    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        self.answer = answer
        self.connections = 0
        self.reads: list[int] = []  # commands that came in one piece
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writer = writer
        try:
            while octets := await reader.read(65536):
                commands = [b"*" + each for each in octets.split(b"*")[1:]]
                self.reads.append(len(commands))
                for command in commands:
                    answer = b"+OK\r\n" if b"SETINFO" in command else self.answer(command)
                    if answer is None:
                        return
                    # no reply arrives as a whole
                    for octet in (answer[:3], answer[3:]):
                        writer.write(octet)
                        await asyncio.sleep(0)
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def linked(
    answer: Callable[[bytes], bytes | None], *, timeout_s: float = 5.0
) -> AsyncIterator[tuple[Link, Scripted]]:
    scripted = Scripted(answer)
    server = await asyncio.start_server(scripted.serve, LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    options: dict[str, Any] = {"host": LOOPBACK, "port": port, "protocol": 2, "socket_timeout": None}
    link = Link(lambda: Connection(**options), reason, timeout_s=timeout_s)
    try:
        yield link, scripted
    finally:
        await link.close()
        server.close()
        if scripted.writer is not None:
            scripted.writer.close()


def echo(command: bytes) -> bytes:
    """The key that is asked for."""
    return b"+" + command.split(b"\r\n")[4] + b"\r\n"


async def test_each_reply_is_for_its_question() -> None:
    async with linked(echo) as (link, scripted):
        for _ in range(3):
            waiting = [link.send(packed("GET", f"key{number}")) for number in range(50)]
            assert [await each for each in waiting] == [b"key%d" % number for number in range(50)]

        assert scripted.connections == 1
        # what is asked while many are under way leaves together
        assert max(scripted.reads) > 8


async def test_an_error_is_a_reply_and_breaks_nothing() -> None:
    async with linked(lambda _: b"-ERR no such thing\r\n") as (link, scripted):
        assert isinstance(await link.send(GET), ResponseError)
        assert isinstance(await link.send(GET), ResponseError)
        assert scripted.connections == 1


async def test_what_nobody_asked_for_is_nobodys_reply() -> None:
    async with linked(echo) as (link, scripted):
        assert await link.send(GET) == b"a"
        assert scripted.writer is not None
        scripted.writer.write(b"+stray\r\n")
        for _ in range(20):
            await asyncio.sleep(0)

        assert await link.send(packed("GET", "b")) == b"b"
        assert scripted.connections == 2


async def test_two_replies_to_one_question_end_the_connection() -> None:
    async with linked(lambda command: echo(command) * 2) as (link, scripted):
        for number in range(3):
            assert await link.send(packed("GET", f"k{number}")) == b"k%d" % number

        assert scripted.connections == 3


async def test_a_server_that_closes_answers_nobody() -> None:
    async with linked(lambda _: None) as (link, scripted):
        waiting = [link.send(GET) for _ in range(20)]
        for each in waiting:
            failure = await each
            assert isinstance(failure, StoreError)
            assert failure.reason == "connect"

        assert scripted.connections == 1


async def test_a_server_that_says_nothing_is_given_up() -> None:
    async with linked(lambda _: b"", timeout_s=0.05) as (link, scripted):
        first, second = link.send(GET), link.send(GET)
        for each in (await first, await second):
            assert isinstance(each, StoreError)
            assert each.reason == "timeout"

        scripted.answer = echo
        assert await link.send(GET) == b"a"
        assert scripted.connections == 2


async def test_garbage_is_a_failure_of_all_who_wait() -> None:
    async with linked(lambda _: b"HTTP/1.1 400\r\n") as (link, _):
        for failure in [await each for each in [link.send(GET), link.send(GET)]]:
            assert isinstance(failure, StoreError)
            assert failure.reason == "protocol"


async def test_renewed_in_the_middle_nobody_loses_an_answer() -> None:
    async with linked(echo) as (link, scripted):
        await link.send(GET)
        old = [link.send(packed("GET", f"old{number}")) for number in range(20)]
        link.renew()
        new = link.send(packed("GET", "new"))

        assert [await each for each in old] == [b"old%d" % number for number in range(20)]
        assert await new == b"new"
        assert scripted.connections == 2


@pytest.mark.parametrize("asked", [0, 1, 20])
async def test_closing_answers_all_who_wait(asked: int) -> None:
    async with linked(lambda _: b"") as (link, _):
        waiting = [link.send(GET) for _ in range(asked)]
        await asyncio.sleep(0)
        await link.close()

        for each in waiting:
            assert isinstance(await each, StoreError)
