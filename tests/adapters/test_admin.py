"""admin: it shows what the supervisor says, and nothing to those who may not see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.adapters import admin
from gateway.adapters.admin import serve_admin
from gateway.adapters.admin.guard import _is_loopback
from gateway.decision import parse_query


@dataclass
class FakeSupervisor:
    """What the admin port is told."""

    dead: tuple[str, ...] = ()
    unready: tuple[str, ...] = ()
    accepted: list[str] = field(default_factory=list)
    queries: list[dict[str, str]] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def not_live(self) -> tuple[str, ...]:
        return self.dead

    def not_ready(self) -> tuple[str, ...]:
        return self.unready

    def state(self) -> Mapping[str, object]:
        host = {"host": "mta:25", "up": False, "in_use": 0, "idle": 0, "last_error": "\u2028<b>"}
        relay = {"routes": [{"name": "route1", "hosts": [host]}]}
        return {"listening": True, "workers": [{"worker": 1, "detail": {"relay": relay}}]}

    def metrics(self, accept: str) -> tuple[bytes, str]:
        self.accepted.append(accept)
        return b"mxgate_workers 1.0\n", "text/plain; version=0.0.4; charset=utf-8"

    async def status(self) -> Mapping[str, object]:
        return {"version": "0.1.0"}

    async def decisions(self, query: Mapping[str, str]) -> Mapping[str, object]:
        self.queries.append(dict(query))
        parse_query(query)
        return {"decisions": self.kept, "truncated": False, "errors": self.errors}


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> object:
        assert self.headers["content-type"] == "application/json; charset=utf-8"
        return json.loads(self.body)


@contextlib.asynccontextmanager
async def served(supervised: FakeSupervisor, token: bytes = b"") -> AsyncIterator[tuple[str, int]]:
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    close = await serve_admin(sock, supervised, token=token)
    try:
        yield address
    finally:
        await close()


async def ask(address: tuple[str, int], request: str, *headers: str) -> Answer:
    if not any(header.startswith("Host:") for header in headers):
        headers = ("Host: localhost", *headers)
    lines = [f"{request} HTTP/1.1", "Connection: close", *headers, "", ""]
    raw = await exchange(address, "\r\n".join(lines).encode("utf-8", "surrogateescape"))
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    split = (line.split(": ", 1) for line in fields)
    return Answer(int(status.split()[1]), {name.lower(): value for name, value in split}, body)


async def exchange(address: tuple[str, int], request: bytes, *, ends: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(request)
        if ends:
            writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_health_is_200_or_503_with_the_reasons() -> None:
    supervised = FakeSupervisor()
    async with served(supervised) as address:
        answer = await ask(address, "GET /livez")
        assert (answer.status, answer.json()) == (200, {"live": True, "reasons": []})
        answer = await ask(address, "GET /readyz")
        assert (answer.status, answer.json()) == (
            200,
            {"ready": True, "reasons": []} | dict(supervised.state()),
        )
        assert answer.headers["cache-control"] == "no-store"
        supervised.dead = ("worker 1: nothing heard for 10 s",)
        supervised.unready = ("draining", "worker 1: not running")
        answer = await ask(address, "GET /livez")
        assert (answer.status, answer.json()) == (503, {"live": False, "reasons": list(supervised.dead)})
        answer = await ask(address, "GET /readyz")
        assert answer.status == 503
        assert answer.json() == {"ready": False, "reasons": list(supervised.unready)} | dict(
            supervised.state()
        )
        answer = await ask(address, "HEAD /readyz")
        assert (answer.status, answer.body) == (503, b"")


async def test_metrics_come_in_the_format_that_was_asked_for() -> None:
    supervised = FakeSupervisor()
    async with served(supervised) as address:
        answer = await ask(address, "GET /metrics", "Accept: text/plain;q=0.5", "Accept: */*;q=0.1")
        assert (answer.status, answer.body) == (200, b"mxgate_workers 1.0\n")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        await ask(address, "GET /metrics")
    assert supervised.accepted == ["text/plain;q=0.5,*/*;q=0.1", ""]


@pytest.mark.parametrize(
    ("request_line", "status", "error"),
    [
        ("GET /", 404, "Not Found"),
        ("GET /etc/passwd", 404, "Not Found"),
        ("GET /api/v1/nothing", 404, "Not Found"),
        ("POST /readyz", 405, "Method Not Allowed"),
        ("DELETE /api/v1/status", 405, "Method Not Allowed"),
    ],
)
async def test_errors_are_json(request_line: str, status: int, error: str) -> None:
    async with served(FakeSupervisor()) as address:
        answer = await ask(address, request_line)
        assert (answer.status, answer.json()) == (status, {"error": error})
        assert (status == 405) == ("allow" in answer.headers)


async def test_loopback_needs_no_token() -> None:
    async with served(FakeSupervisor(), b"secret") as address:
        answer = await ask(address, "GET /api/v1/status")
        assert (answer.status, answer.json()) == (200, {"version": "0.1.0"})


async def test_decisions_are_asked_for_by_the_filters_of_the_query() -> None:
    supervised = FakeSupervisor(kept=[{"tx": "s-1", "helo": "\u2028\x1b<b>"}])
    async with served(supervised) as address:
        answer = await ask(address, "GET /api/v1/decisions?rcpt=ann%2Bx%40example.org&limit=5")
        assert answer.status == 200
        assert answer.json() == {"decisions": supervised.kept, "truncated": False, "errors": []}
        assert answer.body.isascii()
        assert b"\x1b" not in answer.body
        assert (await ask(address, "GET /api/v1/decisions")).status == 200
    assert supervised.queries == [{"rcpt": "ann+x@example.org", "limit": "5"}, {}]


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("limit=0", "limit '0' is not in 1..1000"),
        ("limit=1&limit=2", "a filter stands twice"),
        ("%0d%0a=1", "unknown filter '\\r\\n'; there are tx, rcpt, sender, client, action, policy, limit"),
        ("client=%ff", "client '\\ufffd' is no address and no network"),
    ],
)
async def test_a_bad_query_is_told(query: str, error: str) -> None:
    async with served(FakeSupervisor()) as address:
        answer = await ask(address, f"GET /api/v1/decisions?{query}")
        assert (answer.status, answer.json()) == (400, {"error": error})


async def test_one_decision_has_its_own_address() -> None:
    supervised = FakeSupervisor(kept=[{"tx": "s-1", "action": "rejected"}])
    async with served(supervised) as address:
        answer = await ask(address, "GET /api/v1/decisions/s-1")
        assert (answer.status, answer.json()) == (200, supervised.kept[0])
        assert supervised.queries == [{"tx": "s-1", "limit": "1"}]
        answer = await ask(address, "GET /api/v1/decisions/s")  # a session's: they have no one address
        assert answer.status == 404
        supervised.kept = []
        answer = await ask(address, "GET /api/v1/decisions/s-1")
        assert answer.json() == {"error": "no decision about this transaction is kept (any more)"}
        supervised.errors = ["no answer"]
        answer = await ask(address, "GET /api/v1/decisions/s-1")
        assert answer.json() == {"error": "not every worker answered", "errors": ["no answer"]}
        assert answer.status == 503
        assert (await ask(address, f"GET /api/v1/decisions/{'x' * 300}")).status == 400


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        (["Host: 127.0.0.1:9464"], True),
        (["Host: [::1]:9464"], True),
        (["Host: LOCALHOST"], True),
        (["Host: rebound.example.org:9464"], False),
        (["Host: 127.0.0.1.example.org"], False),
        (["Host: "], False),
        (["Host: localhost", "X-Forwarded-For: 192.0.2.1"], False),
        (["Host: localhost", "Forwarded: for=192.0.2.1"], False),
        (["Host: rebound.example.org", "Authorization: Bearer secret"], True),
    ],
)
async def test_loopback_is_who_asks_directly(headers: list[str], is_allowed: bool) -> None:
    async with served(FakeSupervisor(), b"secret") as address:
        answer = await ask(address, "GET /api/v1/decisions", *headers)
        assert answer.status == (200 if is_allowed else 401)


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/status",
        "/api/v1/nothing",
        "/%61pi/v1/status",
        "/api/v1/decisions",
        "/api/v1/decisions/s-nothing",
    ],
)
@pytest.mark.parametrize(
    ("token", "shown", "is_allowed"),
    [
        (b"secret", "Bearer secret", True),
        (b"secret", "Bearer secre", False),
        (b"secret", "Bearer secret2", False),
        (b"secret", "secret", False),
        (b"secret", "Basic secret", False),
        (b"secret", "Bearer \udcff\udcfe", False),
        (b"\xff\xfe", "Bearer \udcff\udcfe", True),
        (b"secret", None, False),
        (b"", None, False),
        (b"", "Bearer ", False),
        (b"", "Bearer", False),
    ],
)
async def test_others_must_show_the_token(
    monkeypatch: pytest.MonkeyPatch, path: str, token: bytes, shown: str | None, is_allowed: bool
) -> None:
    monkeypatch.setattr(admin, "_is_loopback", lambda _: False)
    async with served(FakeSupervisor(), token) as address:
        answer = await ask(address, f"GET {path}", *([] if shown is None else [f"Authorization: {shown}"]))
        if is_allowed:
            assert answer.status == (404 if path.endswith("nothing") else 200)
        else:
            assert (answer.status, answer.json()) == (401, {"error": "Unauthorized"})
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await ask(address, "GET /livez")).status == 200


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("2001:db8::1", False),
        ("fe80::1%eth0", False),
        ("", False),
        (None, False),
        ("localhost", False),
    ],
)
def test_knows_loopback(remote: str | None, expected: bool) -> None:
    assert _is_loopback(remote) is expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(
    garbage=st.binary(max_size=300)
    | st.sampled_from([b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"\0"])
)
def test_garbage_harms_nobody(garbage: bytes) -> None:
    async def main() -> None:
        async with served(FakeSupervisor()) as address:
            with contextlib.suppress(ConnectionError):
                await exchange(address, garbage, ends=True)
            assert (await ask(address, "GET /livez")).status == 200

    asyncio.run(main())
