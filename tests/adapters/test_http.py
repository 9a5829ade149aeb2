"""The HTTP client of policies: against real sockets, whose other end does what it likes."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.adapters import http
from gateway.adapters.http import MAX_CONNECTIONS, HttpClient
from gateway.services import HttpError, HttpResponse
from gateway.testing import FakeServices

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Colour: red\r\n\r\nok"
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Service:
    """A server that plays `peer` on each connection. `heads` are the requests' heads, `bodies` what came behind."""

    def __init__(self, peer: Peer | None = None) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.met = asyncio.Event()  # a connection was made
        self.url = ""
        self.peer = peer or self.answers(OK)

    def answers(self, *answers: bytes, close: bool = False) -> Peer:
        """Each request with the next of these, the last one again and again."""

        async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            at = 0
            while await self.read(reader):
                writer.write(answers[min(at, len(answers) - 1)])
                await writer.drain()
                at += 1
                if close:
                    return

        return peer

    async def read(self, reader: asyncio.StreamReader) -> bool:
        """One request."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        self.heads.append(head)
        lower = head.lower()
        body = b""
        if b"content-length: " in lower:
            body = await reader.readexactly(int(lower.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        elif b"chunked" in lower:
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        self.bodies.append(body)
        return True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.met.set()
        try:
            await self.peer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def running(service: Service, tls: ssl.SSLContext | None = None) -> AsyncIterator[Service]:
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    service.url = f"{'https' if tls else 'http'}://localhost:{port}/x?y=1"
    try:
        yield service
    finally:
        server.close()


@pytest.fixture
def services() -> FakeServices:
    return FakeServices()


@pytest.fixture
async def client(services: FakeServices) -> AsyncIterator[HttpClient]:
    made = HttpClient("says", 5.0, services)
    yield made
    await made.close()


async def test_asks_and_gives_back_status_headers_and_content(
    client: HttpClient, services: FakeServices
) -> None:
    async with running(Service()) as service:
        got = await client.request(
            "POST", service.url, content=b"hello", headers=[("X-Rcpt", "a"), ("X-Rcpt", "b")]
        )
    assert (got.status, got.content, got.headers["x-colour"]) == (200, b"ok", "red")
    (head,) = service.heads
    assert head.startswith(b"POST /x?y=1 HTTP/1.1\r\n")
    assert head.count(b"\r\nX-Rcpt: ") == 2
    assert service.bodies == [b"hello"]
    assert services.metrics["mxgate_http_requests_total", "says", "answered"] == 1
    assert len(services.metrics.observed["mxgate_http_duration_seconds", "says"]) == 1


async def test_content_is_streamed_in_chunks_or_with_the_length_that_is_given(client: HttpClient) -> None:
    blocks = [b"a" * 65_536, b"b" * 10, b"c" * 70_000]
    async with running(Service()) as service:
        await client.request("POST", service.url, content=lambda: blocks)
        length = str(sum(map(len, blocks)))
        await client.request(
            "POST", service.url, content=lambda: blocks, headers=[("Content-Length", length)]
        )
    assert [b"chunked" in head for head in service.heads] == [True, False]
    assert service.bodies == [b"".join(blocks)] * 2
    assert service.connections == 1, "the connection is used again"


async def test_a_unix_socket(client: HttpClient, tmp_path: Path) -> None:
    service = Service()
    path = str(tmp_path / "s")
    async with await asyncio.start_unix_server(service.serve, path):
        got = await client.request("GET", "http://rspamd/ping", socket=path)
    assert got.content == b"ok"
    assert b"Host: rspamd\r\n" in service.heads[0]


async def test_a_status_of_any_kind_is_an_answer_and_a_redirect_is_not_followed(client: HttpClient) -> None:
    moved = b"HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\nContent-Length: 0\r\n\r\n"
    async with running(Service()) as service:
        service.peer = service.answers(moved, b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
        assert (await client.request("GET", service.url)).status == 302
        assert (await client.request("GET", service.url)).status == 500


async def test_no_proxy_of_the_environment(client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with running(Service()) as service:
        assert (await client.request("GET", service.url)).content == b"ok"


async def test_a_connection_that_was_kept_and_died_costs_nothing(client: HttpClient) -> None:
    async with running(Service()) as service:
        service.peer = service.answers(OK, close=True)
        for _ in range(5):
            assert (await client.request("POST", service.url, content=lambda: [b"x" * 100])).status == 200
    assert service.bodies[-1] == b"x" * 100


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(0.02)
        if reader.at_eof():
            return


@pytest.mark.parametrize("peer", [hang, drip])
async def test_who_hangs_or_drips_is_given_up_at_the_deadline(
    client: HttpClient, services: FakeServices, peer: Peer
) -> None:
    async with running(Service(peer)) as service:
        with pytest.raises(HttpError) as caught:
            await client.request("GET", service.url, timeout_s=0.2)
        assert caught.value.reason == "timeout"
        assert services.metrics["mxgate_http_requests_total", "says", "timeout"] == 1


async def test_no_request_takes_longer_than_its_policy_may(services: FakeServices) -> None:
    client = HttpClient("says", 0.1, services)
    async with running(Service(hang)) as service:
        with pytest.raises(HttpError, match="timeout"):
            await client.request("GET", service.url, timeout_s=60)
    await client.close()


def endless(head: bytes, block: bytes, written: list[int]) -> Peer:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        # 5 GB: nobody waits for the end of it
        for _ in range(5 * 2**30 // len(block)):
            writer.write(block)
            written.append(len(block))
            await writer.drain()

    return peer


@pytest.mark.parametrize(
    ("head", "block", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5368709120\r\n\r\n", b"x" * 65_536, "too_large"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536, "too_large"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"8\r\nxxxxxxxx\r\n" * 5000, "too_large"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n" * 5000, "protocol"),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"x" * 65_536, "protocol"),
        (b"HTTP/1.1 200 ", b"x" * 65_536, "protocol"),
    ],
)
async def test_what_has_no_end_is_given_up_soon(
    client: HttpClient, head: bytes, block: bytes, reason: str
) -> None:
    written: list[int] = []
    async with running(Service(endless(head, block, written))) as service:
        with pytest.raises(HttpError) as caught:
            await client.request("GET", service.url, max_bytes=100_000)
    assert caught.value.reason == reason
    assert sum(written) < 64 * 2**20


@pytest.mark.parametrize(
    ("answer", "reasons"),
    [
        (b"", {"closed"}),
        (b"HTTP/1.1 200", {"closed", "protocol"}),
        (b"SSH-2.0-x\r\n", {"protocol"}),
        (b"220 mx ESMTP\r\n\r\n", {"protocol"}),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", {"protocol"}),
        (b"\x16\x03\x01\x00\xff" * 50, {"protocol"}),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nxx", {"closed"}),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", {"protocol"}),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n", {"closed", "protocol"}),
    ],
)
async def test_garbage_and_a_half_answer_are_errors_of_the_service(
    client: HttpClient, answer: bytes, reasons: set[str]
) -> None:
    async with running(Service()) as service:
        service.peer = service.answers(answer, close=True)
        with pytest.raises(HttpError) as caught:
            await client.request("GET", service.url)
    assert caught.value.reason in reasons


async def test_who_does_not_take_the_connection_is_given_up_before_the_deadline(
    client: HttpClient, services: FakeServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        address = listening.getsockname()
        # what is in the queue of accept is all that the kernel takes
        queued = [socket.create_connection(address)]
        with pytest.raises(HttpError, match="timeout"):
            await client.request("GET", f"http://127.0.0.1:{address[1]}/")
        for each in queued:
            each.close()


async def test_nobody_there_no_such_socket_and_no_such_host(client: HttpClient, tmp_path: Path) -> None:
    async with running(Service()) as service:
        url = service.url
    for asked, path in ((url, ""), ("http://x/", str(tmp_path / "none")), ("http://no.such.invalid/", "")):
        with pytest.raises(HttpError) as caught:
            await client.request("GET", asked, socket=path)
        assert caught.value.reason == "connect", asked


async def test_the_log_gets_no_secret_of_a_url(client: HttpClient) -> None:
    async with running(Service()) as service:
        port = service.url.split(":")[2].split("/")[0]
    with pytest.raises(HttpError) as caught:
        await client.request("GET", f"http://me:s3cret@127.0.0.1:{port}/x?token=s3cret")
    assert str(caught.value).startswith(f"connect: http://127.0.0.1:{port}/x: ")
    assert "s3cret" not in str(caught.value)


async def test_a_certificate_is_verified(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with running(Service(), context) as service:
        client = HttpClient("says", 5.0, services)
        with pytest.raises(HttpError) as caught:
            await client.request("GET", service.url)
        await client.close()
    assert caught.value.reason == "tls"


async def test_an_answer_before_the_content_was_sent_is_taken(client: HttpClient) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        await writer.drain()
        await reader.read()

    async with running(Service(peer)) as service:
        got = await client.request("POST", service.url, content=lambda: (b"x" * 65_536 for _ in range(100)))
    assert (got.status, got.content) == (413, b"big")


async def test_connections_are_bounded_and_those_who_wait_have_their_turn(client: HttpClient) -> None:
    gate, full = asyncio.Event(), asyncio.Event()
    service = Service()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await service.read(reader):
            if len(service.heads) == MAX_CONNECTIONS:
                full.set()
            await gate.wait()
            writer.write(OK)

    service.peer = peer
    async with running(service):
        asking = [
            asyncio.ensure_future(client.request("GET", service.url)) for _ in range(MAX_CONNECTIONS + 20)
        ]
        await full.wait()
        assert service.connections == MAX_CONNECTIONS
        gate.set()
        got: list[HttpResponse] = await asyncio.gather(*asking)
    assert {each.status for each in got} == {200}
    assert service.connections == MAX_CONNECTIONS


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "a\nb", "a\0"])
async def test_a_header_that_would_be_two_is_not_sent(client: HttpClient, value: str) -> None:
    async with running(Service()) as service:
        with pytest.raises(ValueError, match=r"[Nn]ewline|null|header"):
            await client.request("GET", service.url, headers=[("X-Helo", value)])
    assert service.heads == []


async def test_text_beyond_ascii_goes_as_utf_8(client: HttpClient) -> None:
    async with running(Service()) as service:
        await client.request("GET", service.url, headers=[("X-From", "jörg@bücher.example")])
    assert "X-From: jörg@bücher.example\r\n".encode() in service.heads[0]


async def test_who_goes_away_leaves_nothing_behind(client: HttpClient) -> None:
    async with running(Service(hang)) as service:
        asking = asyncio.ensure_future(
            client.request("POST", service.url, content=lambda: [b"x" * 10_000_000])
        )
        await service.met.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await client.close()


PIECES = st.sampled_from(
    (
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 204 \r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        *(b"Content-Length: 2\r\n", b"Content-Length: 99999999999999999999\r\n"),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Encoding: gzip\r\n",
            b"Set-Cookie: a=b; Expires=x\r\n",
        ),
        *(b"Location: http://[x/\r\n", b"Connection: upgrade\r\nUpgrade: h2c\r\n", b"X-A: \xff\r\n"),
        *(b"\r\n", b"\n", b"\0", b"2\r\nok\r\n0\r\n\r\n", b"ok", b" folded\r\n", b":\r\n", b"-1\r\n"),
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES | st.binary(max_size=20), max_size=8).map(b"".join))
def test_any_octets_are_an_answer_or_the_one_error(octets: bytes) -> None:
    async def check() -> None:
        client = HttpClient("says", 10.0, FakeServices())
        async with running(Service()) as service:
            service.peer = service.answers(octets, close=True)
            try:
                got = await client.request("GET", service.url, max_bytes=1000)
            except HttpError:
                return
            finally:
                await client.close()
            assert len(got.content) <= 1000

    asyncio.run(check())
