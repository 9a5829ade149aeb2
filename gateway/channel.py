"""The channel between the supervisor and one worker: a stream socket pair that carries small messages both ways.

A frame is its length in four bytes, big-endian, and that many bytes of JSON. The worker says how it is (State), what
it counted (MetricsPush) and what it was asked for (Response); the supervisor asks (Request) and says Drain.

For the worker, the end of the channel means that the supervisor died: its `on_close` has to end the worker.
Both ends are ours, so a malformed frame is a bug: the channel is closed, and `on_close` is given the error.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, cast

from gateway.errors import GatewayError

Json: TypeAlias = "Mapping[str, Json] | list[Json] | str | int | float | bool | None"

MAX_FRAME_BYTES = 16 * 1024 * 1024
_HEADER = struct.Struct(">I")
# What may wait to be sent before `is_writable` is false: an end that does not read must not fill our memory.
_MAX_UNSENT_BYTES = 1024 * 1024


class ChannelError(GatewayError):
    """The channel is closed, an answer did not come in time, or a frame or message was malformed."""


@dataclass(frozen=True, slots=True)
class State:
    """Worker to supervisor, at each change: how it is. `detail` is only shown, by /readyz."""

    listening: bool
    draining: bool
    policies_started: bool
    detail: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Places:
    """Worker to supervisor, once: the lines that belong to its policies, as gateway.blocked.Place has them."""

    places: list[Json]


@dataclass(frozen=True, slots=True)
class MetricsPush:
    """Worker to supervisor, each second, empty when nothing changed: a snapshot by adapters/metrics."""

    families: list[Json]


@dataclass(frozen=True, slots=True)
class Drain:
    """Supervisor to worker: accept nothing more, end what is under way, exit.

    Sessions may begin further messages for `patience_s`. A second Drain ends the patience of the first.
    """

    patience_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """Supervisor to worker: a question by name, to be answered by a Response of the same id."""

    id: int
    name: str
    argument: Json = None


@dataclass(frozen=True, slots=True)
class Response:
    """Worker to supervisor: the answer to a Request; `error` is "" unless it could not be answered."""

    id: int
    result: Json = None
    error: str = ""


Message: TypeAlias = State | Places | MetricsPush | Drain | Request | Response

# The word on the wire, the class, and what JSON type each of its fields has (None: any).
_MESSAGES: dict[str, tuple[type[Message], dict[str, type | None]]] = {
    "state": (State, {"listening": bool, "draining": bool, "policies_started": bool, "detail": dict}),
    "places": (Places, {"places": list}),
    "metrics": (MetricsPush, {"families": list}),
    "drain": (Drain, {"patience_s": float}),
    "request": (Request, {"id": int, "name": str, "argument": None}),
    "response": (Response, {"id": int, "result": None, "error": str}),
}
_WORDS = {cls: (word, tuple(fields)) for word, (cls, fields) in _MESSAGES.items()}


def encode(message: Message) -> bytes:
    """One frame. Raises ChannelError when the message is larger than a frame may be."""
    word, names = _WORDS[type(message)]
    body = json.dumps(
        {"type": word} | {name: getattr(message, name) for name in names}, separators=(",", ":")
    )
    if len(body) > MAX_FRAME_BYTES:
        raise ChannelError(
            f"a {word} message of {len(body)} bytes is larger than a frame ({MAX_FRAME_BYTES})"
        )
    return _HEADER.pack(len(body)) + body.encode("ascii")


def decode(body: bytes) -> Message:
    """The message in a frame. Raises ChannelError."""
    try:
        fields = json.loads(body)
    except ValueError as exc:  # UnicodeDecodeError is one too
        raise ChannelError(f"a frame is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise ChannelError("a frame is nested too deeply") from exc
    if not isinstance(fields, dict) or not isinstance(word := fields.pop("type", None), str):
        raise ChannelError("a frame has no type")
    if word not in _MESSAGES:
        raise ChannelError(f"a message of unknown type {word[:40]!r}")
    cls, types = _MESSAGES[word]
    if fields.keys() != types.keys():
        raise ChannelError(f"a {word} message with the fields {', '.join(fields)[:200]}")
    for name, wanted in types.items():
        if wanted is not None and type(fields[name]) is not wanted:
            raise ChannelError(f"a {word} message whose {name} is a {type(fields[name]).__name__}")
    return cls(**fields)


class FrameDecoder:
    """Cuts a stream of bytes into the bodies of its frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete with `data`. Raises ChannelError at a frame that is too large."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                raise ChannelError(f"a frame of {size} bytes; {MAX_FRAME_BYTES} are allowed")
            end = _HEADER.size + size
            if len(self._buffer) < end:
                return
            body = bytes(memoryview(self._buffer)[_HEADER.size : end])
            del self._buffer[:end]
            yield body


class Channel(asyncio.Protocol):
    """One end of a channel; `open_channel` makes it.

    `on_message` is called with each message but responses, which go to who asked; `on_close` once, with None at a plain
    end and with the error otherwise. Neither may raise.
    """

    def __init__(
        self, on_message: Callable[[Message], None], on_close: Callable[[ChannelError | None], None]
    ) -> None:
        self._on_message = on_message
        self._on_close = on_close
        self._frames = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._error: ChannelError | None = None
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[Json]] = {}
        self.is_writable = True

    def send(self, message: Message) -> None:
        """Send, or do nothing when the channel is closed. Raises ChannelError when the message is too large.

        What can be left out is sent only while `is_writable`: it is false while the other end does not read.
        """
        if self._transport is not None:
            self._transport.write(encode(message))

    async def request(self, name: str, argument: Json = None, *, timeout_s: float) -> Json:
        """Ask the worker. Raises ChannelError when it cannot answer, or does not within `timeout_s`."""
        if self._transport is None:
            raise ChannelError("the channel is closed")
        self._last_id += 1
        request = Request(self._last_id, name, argument)
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                self.send(request)
                return await answer
        except TimeoutError as exc:
            raise ChannelError(f"no answer within {timeout_s:g} s") from exc
        finally:
            del self._waiting[request.id]

    def close(self) -> None:
        """Close after what was sent; `on_close` follows."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_MAX_UNSENT_BYTES)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._receive(decode(body))
        except ChannelError as exc:
            self._error = exc
            if self._transport is not None:
                self._transport.abort()

    def _receive(self, message: Message) -> None:
        if not isinstance(message, Response):
            self._on_message(message)
            return
        answer = self._waiting.get(message.id)
        if answer is None or answer.done():  # too late
            return
        if message.error:
            answer.set_exception(ChannelError(message.error))
        else:
            answer.set_result(message.result)

    def pause_writing(self) -> None:
        self.is_writable = False

    def resume_writing(self) -> None:
        self.is_writable = True

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(ChannelError("the channel was closed"))
        # ECONNRESET is how an end that died with unread messages looks: an end like any other.
        self._on_close(self._error)


async def open_channel(
    sock: socket.socket,
    *,
    on_message: Callable[[Message], None],
    on_close: Callable[[ChannelError | None], None],
) -> Channel:
    """Make one end of `channel_sockets` a channel of the running loop; it owns the socket from then on."""
    sock.setblocking(False)
    channel = Channel(on_message, on_close)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: channel, sock)
    return channel


def channel_sockets() -> tuple[socket.socket, socket.socket]:
    """The two sockets of a new channel: the supervisor's and the worker's."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
