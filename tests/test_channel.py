"""channel: frames survive any splitting, malformed ones end it, answers come in time or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import channel as channel_module
from gateway.channel import (
    MAX_FRAME_BYTES,
    Channel,
    ChannelError,
    Drain,
    FrameDecoder,
    Json,
    Message,
    MetricsPush,
    Request,
    Response,
    State,
    channel_sockets,
    decode,
    encode,
    open_channel,
)

json_values: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        State,
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.dictionaries(st.text(), json_values, max_size=3),
    ),
    st.builds(MetricsPush, st.lists(json_values, max_size=3)),
    st.builds(Drain, st.floats(0, 300)),
    st.builds(Request, st.integers(), st.text(), json_values),
    st.builds(Response, st.integers(), json_values, st.text()),
)


@given(st.lists(messages, max_size=4), st.data())
def test_any_split_gives_the_same_messages(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder = FrameDecoder()
    received = [
        decode(body)
        for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for body in decoder.feed(stream[begin:end])
    ]
    assert received == sent


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_a_channel_error(data: bytes) -> None:
    try:
        for body in FrameDecoder().feed(data):
            decode(body)
    except ChannelError:
        pass


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "has no type"),
        (b'{"type": []}', "has no type"),
        (b'{"type": "reload"}', "unknown type 'reload'"),
        (b'{"type": "drain", "now": true}', "drain message with the fields now"),
        (
            b'{"type": "response", "id": true, "result": 1, "error": ""}',
            "response message whose id is a bool",
        ),
    ],
)
def test_a_malformed_message_is_named(body: bytes, error: str) -> None:
    with pytest.raises(ChannelError, match=error):
        decode(body)


def test_a_frame_that_is_too_large_is_neither_sent_nor_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChannelError, match="4294967295 bytes"):
        list(FrameDecoder().feed(b"\xff\xff\xff\xff"))
    monkeypatch.setattr(channel_module, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ChannelError, match="a response message of"):
        encode(Response(1, "x" * 100))
    assert MAX_FRAME_BYTES == 16 * 1024 * 1024


class End:
    """What one end of a channel was told."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.closed: asyncio.Future[ChannelError | None] = asyncio.get_running_loop().create_future()

    async def open(self, sock: socket.socket) -> Channel:
        return await open_channel(sock, on_message=self.messages.put_nowait, on_close=self.closed.set_result)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = channel_sockets()
    yield pair
    for sock in pair:
        sock.close()


Sockets = tuple[socket.socket, socket.socket]


async def test_carries_messages_both_ways_until_one_end_closes(sockets: Sockets) -> None:
    ours, theirs = End(), End()
    supervisor, worker = await ours.open(sockets[0]), await theirs.open(sockets[1])
    state = State(listening=True, draining=False, policies_started=True, detail={"downstream": ["up"]})
    worker.send(state)
    supervisor.send(Drain())
    assert await ours.messages.get() == state
    assert await theirs.messages.get() == Drain()
    supervisor.close()
    assert await theirs.closed is None
    assert await ours.closed is None
    worker.send(state)  # too late, and no error
    with pytest.raises(ChannelError, match="closed"):
        await supervisor.request("status", timeout_s=60)


async def test_answers_reach_who_asked(sockets: Sockets) -> None:
    ours, theirs = End(), End()
    supervisor, worker = await ours.open(sockets[0]), await theirs.open(sockets[1])

    async def answer_in_reverse() -> None:
        requests = [await theirs.messages.get() for _ in range(3)]
        for request in reversed(requests):
            assert isinstance(request, Request)
            error = "unknown request" if request.name == "bad" else ""
            worker.send(Response(request.id, [request.name, request.argument], error))

    async with asyncio.TaskGroup() as group:
        group.create_task(answer_in_reverse())
        first = group.create_task(supervisor.request("status", timeout_s=60))
        second = group.create_task(supervisor.request("decisions", {"last": 5}, timeout_s=60))
        with pytest.raises(ChannelError, match="unknown request"):
            await supervisor.request("bad", timeout_s=60)
    assert first.result() == ["status", None]
    assert second.result() == ["decisions", {"last": 5}]
    assert ours.messages.empty()
    supervisor.close()
    worker.close()
    await ours.closed


async def test_a_request_fails_when_the_answer_is_late_or_the_worker_dies(sockets: Sockets) -> None:
    ours, theirs = End(), End()
    supervisor, worker = await ours.open(sockets[0]), await theirs.open(sockets[1])
    with pytest.raises(ChannelError, match=r"no answer within 0\.01 s"):
        await supervisor.request("status", timeout_s=0.01)
    late = await theirs.messages.get()
    assert isinstance(late, Request)
    worker.send(Response(late.id, "late"))
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(_expect_closed(supervisor))
        await theirs.messages.get()
        worker.close()
        await asked
    assert await ours.closed is None


async def _expect_closed(supervisor: Channel) -> None:
    with pytest.raises(ChannelError, match="the channel was closed"):
        await supervisor.request("status", timeout_s=60)


async def test_a_malformed_frame_closes_the_channel_with_its_error(sockets: Sockets) -> None:
    ours = End()
    await ours.open(sockets[0])
    body = json.dumps({"type": "nonsense"}).encode()
    sockets[1].sendall(struct.pack(">I", len(body)) + body)
    error = await ours.closed
    assert error is not None
    assert "unknown type 'nonsense'" in str(error)


async def test_says_when_the_other_end_does_not_read(sockets: Sockets) -> None:
    ours, theirs = End(), End()
    worker = await theirs.open(sockets[1])
    assert _is_writable(worker)
    while _is_writable(worker):
        worker.send(MetricsPush(["x" * 100_000]))
    sent_last = State(listening=True, draining=True, policies_started=True)
    worker.send(sent_last)
    await ours.open(sockets[0])
    while await ours.messages.get() != sent_last:
        pass
    assert _is_writable(worker)
    worker.close()
    await ours.closed


def _is_writable(channel: Channel) -> bool:
    return channel.is_writable
