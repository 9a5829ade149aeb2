"""admin: it shows what the supervisor says, and nothing to those who may not see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.adapters.admin import crowd, guard, serve_admin
from gateway.adapters.admin.guard import _is_loopback
from gateway.decision import parse_query
from gateway.decision.filters import NAMES
from gateway.testing import FakeLog


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
async def served(
    supervised: FakeSupervisor,
    token: bytes = b"",
    *,
    require_token: bool = False,
    log: FakeLog | None = None,
) -> AsyncIterator[tuple[str, int]]:
    sock = socket.create_server(("127.0.0.1", 0))
    address = sock.getsockname()
    close = await serve_admin(sock, supervised, token=token, require_token=require_token, log=log)
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
        ("GET /page.py", 404, "Not Found"),
        ("GET /../guard.py", 404, "Not Found"),
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
        ("%0d%0a=1", f"unknown filter '\\r\\n'; there are {', '.join(NAMES)}"),
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
        (["Host: localhost", "X-Real-IP: 192.0.2.1"], False),
        (["Host: localhost", "Via: 1.1 proxy"], False),
        (["Host: localhost.example.org"], False),
        (["Host: localhost@rebound.example.org"], False),
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
    monkeypatch.setattr(guard, "_is_loopback", lambda _: False)
    async with served(FakeSupervisor(), token) as address:
        answer = await ask(address, f"GET {path}", *([] if shown is None else [f"Authorization: {shown}"]))
        if is_allowed:
            assert answer.status == (404 if path.endswith("nothing") else 200)
        else:
            assert (answer.status, answer.json()) == (401, {"error": "Unauthorized"})
            assert answer.headers["www-authenticate"].startswith("Bearer")
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


async def test_a_proxy_that_speaks_http_1_0_is_no_user_of_this_machine() -> None:
    """As nginx does with nothing but proxy_pass; it also puts the address of this port into Host."""
    async with served(FakeSupervisor(), b"secret") as address:
        request = b"GET /api/v1/status HTTP/1.0\r\nHost: 127.0.0.1:9464\r\n\r\n"
        assert (await exchange(address, request)).startswith(b"HTTP/1.0 401 ")


async def test_loopback_may_be_made_to_show_the_token() -> None:
    async with served(FakeSupervisor(), b"secret", require_token=True) as address:
        assert (await ask(address, "GET /api/v1/status")).status == 401
        assert (await ask(address, "GET /api/v1/status", "Authorization: Bearer secret")).status == 200
        assert (await ask(address, "GET /readyz")).status == 200


async def test_who_shows_wrong_tokens_is_not_listened_to_for_a_while() -> None:
    log = FakeLog()
    wrong, right = "Authorization: Bearer wrong", "Authorization: Bearer secret"
    async with served(FakeSupervisor(), b"secret", require_token=True, log=log) as address:
        for _ in range(guard.MAX_FAILURES):
            # no token is no guess
            assert (await ask(address, "GET /api/v1/status")).status == 401
            assert (await ask(address, "GET /api/v1/status", wrong)).status == 401
        for shown in (wrong, right):
            answer = await ask(address, "GET /api/v1/status", shown)
            assert (answer.status, answer.json()) == (429, {"error": "Too Many Requests"})
            assert 0 < int(answer.headers["retry-after"]) <= guard.PERIOD_S + 1
        assert (await ask(address, "GET /livez")).status == 200
    assert [line.event for line in log.lines] == ["admin.refused"] * guard.MAX_FAILURES
    assert "wrong" not in str(log.lines)


async def test_wrong_tokens_are_forgotten_after_a_while_and_counted_for_each_network() -> None:
    now = 0.0
    gate = guard.Guard(b"secret", require_token=True, monotonic=lambda: now)

    async def shown(token: str, remote: str) -> int:
        request = make_mocked_request("GET", "/api/v1/status", {"Authorization": f"Bearer {token}"})
        request = request.clone(remote=remote)
        try:
            answer = await gate.middleware(request, lambda _: asyncio.sleep(0, web.Response()))
        except web.HTTPException as exc:
            return exc.status
        return answer.status

    for _ in range(guard.MAX_FAILURES):
        assert await shown("wrong", "2001:db8::1") == 401
    assert await shown("secret", "2001:db8::2") == 429  # the same client's
    assert await shown("secret", "2001:db8:0:1::1") == 200
    now = guard.PERIOD_S
    assert await shown("secret", "2001:db8::1") == 200
    for number in range(3000):  # its memory has an end
        await shown("wrong", f"198.51.{number // 250}.{number % 250}")
    assert len(gate._failures) <= 1000


# --- the page ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml; charset=utf-8"),
    ],
)
async def test_the_page_is_for_all_and_may_load_nothing_from_elsewhere(path: str, content_type: str) -> None:
    async with served(FakeSupervisor(), b"secret", require_token=True) as address:
        answer = await ask(address, f"GET {path}")
    assert (answer.status, answer.headers["content-type"]) == (200, content_type)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    # no address of elsewhere, nothing inline
    links = re.findall(rb"https?://[^\"' ]+", answer.body)
    assert links == ([b"http://www.w3.org/2000/svg"] if path == "/icon.svg" else [])
    assert not re.search(
        rb"<script>|<style|style=|onclick|innerHTML|insertAdjacent|document.write", answer.body
    )


async def test_answers_that_are_no_page_may_load_nothing() -> None:
    async with served(FakeSupervisor(kept=[{"tx": "<script>alert(1)</script>"}])) as address:
        for path in ("/api/v1/decisions", "/readyz", "/nothing<script>"):
            answer = await ask(address, f"GET {path}")
            assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-type"].startswith("application/json")


# --- what hostile clients may cost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 100_000 + b"\r\n",
        b"x" * 1_000_000,
    ],
)
async def test_a_request_without_end_is_refused_or_cut(request_: bytes) -> None:
    async with served(FakeSupervisor()) as address:
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await exchange(address, request_)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
        assert (await ask(address, "GET /livez")).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE", "BREW"])
@pytest.mark.parametrize("path", ["/", "/livez", "/metrics", "/api/v1/status"])
async def test_only_get_and_head_are_answered(method: str, path: str) -> None:
    async with served(FakeSupervisor()) as address:
        answer = await exchange(
            address, f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert re.match(rb"HTTP/1\.[01] 4\d\d ", answer)
        assert b"TRACE" not in answer.partition(b"\r\n\r\n")[2]


async def test_who_asks_for_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowloris: a header that never ends."""
    monkeypatch.setattr(crowd, "REQUEST_S", 0.05)
    async with served(FakeSupervisor()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET / HTTP/1.1\r\nHost: local")
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()


async def test_of_too_many_connections_the_longest_idle_goes_and_the_next_is_served() -> None:
    async with served(FakeSupervisor()) as address, contextlib.AsyncExitStack() as stack:
        idle = []
        for _ in range(crowd.MAX_CONNECTIONS + 20):
            reader, writer = await asyncio.open_connection(*address)
            stack.callback(writer.close)
            idle.append(reader)
        assert (await ask(address, "GET /livez")).status == 200
        async with asyncio.timeout(5):
            for reader in idle[:20]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""


async def test_requests_that_come_faster_than_they_are_answered_have_a_bound() -> None:
    """Pipelining without end would be memory without end."""

    class Slow(FakeSupervisor):
        async def status(self) -> Mapping[str, object]:
            await asyncio.sleep(3600)
            raise AssertionError

    async with served(Slow()) as address:
        reader, writer = await asyncio.open_connection(*address)
        request, written = b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000, 0
        # it is cut, or nobody reads it any more
        with contextlib.suppress(ConnectionError, TimeoutError):
            while not reader.at_eof():
                writer.write(request)
                async with asyncio.timeout(1):
                    await writer.drain()
                written += len(request)
                assert written < 64 * 1024 * 1024
        writer.transport.abort()
        assert (await ask(address, "GET /livez")).status == 200


async def test_what_is_no_request_makes_no_lines_of_log(caplog: pytest.LogCaptureFixture) -> None:
    async with served(FakeSupervisor()) as address:
        for garbage in (b"x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
            assert (await exchange(address, garbage)).startswith(b"HTTP/1.")
    assert caplog.records == []


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
