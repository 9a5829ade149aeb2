"""HTTP for callouts of policies (gateway.services.Http), by aiohttp, which is loaded only where a policy needs it.

What a service does cannot hurt: an answer is bounded in size, in its header too, and everything in time; there are no
redirects, cookies, proxies of the environment, netrc, or decompression. Certificates are verified against the
system's, or those of SSL_CERT_FILE. A connection that was kept may be dead by now: what fails so is sent once more on a
new one.

Each policy has connections of its own, so that a service that hangs holds up nobody else. Names are resolved by the
system, as those of downstreams are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import aiohttp

from gateway.services import HttpError, HttpResponse, Instruments, Metrics

MAX_CONNECTIONS = 64
"""Of one policy in one worker to all its services; who comes later waits, within his time."""
CONNECT_S = 5.0
"""For a connection, and less where a request has less in all."""
_KEEP_S = 15.0
_MAX_HEADER_BYTES = 8190
_MAX_HEADERS = 128
# In this order: some are subclasses of others.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (TimeoutError, "timeout"),
    (aiohttp.ClientSSLError, "tls"),
    (aiohttp.ClientConnectorError, "connect"),
    (aiohttp.ServerDisconnectedError, "closed"),
    (aiohttp.ClientOSError, "closed"),
    (aiohttp.ClientPayloadError, "closed"),
    (aiohttp.ClientError, "protocol"),
    (OSError, "closed"),
)
_OUTCOMES = ("answered", "connect", "tls", "timeout", "closed", "too_large", "protocol")


class HttpMetrics:
    """What is counted about callouts."""

    def __init__(self, metrics: Metrics, policy: str) -> None:
        requests = metrics.counters(
            "mxgate_http_requests_total", "Requests of policies, by how they ended", ("policy", "outcome")
        )
        self.requests = {outcome: requests.labels(policy, outcome) for outcome in _OUTCOMES}
        self.duration = metrics.histograms(
            "mxgate_http_duration_seconds", "From a request of a policy to the end of its answer", ("policy",)
        ).labels(policy)


class HttpClient:
    """The Http of one policy; `limit_s` is the most that a request takes. Made before the loop runs, closed in it."""

    def __init__(self, policy: str, limit_s: float, instruments: Instruments) -> None:
        self._limit_s = limit_s
        self._clock = instruments.clock.monotonic
        self._metrics = HttpMetrics(instruments.metrics, policy)
        # by the Unix socket, "" for those of the network
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    async def request(
        self,
        method: str,
        url: str,
        *,
        content: bytes | Callable[[], Iterable[bytes]] = b"",
        headers: Sequence[tuple[str, str]] = (),
        socket: str = "",
        timeout_s: float | None = None,
        max_bytes: int = 65_536,
    ) -> HttpResponse:
        limit_s = self._limit_s if timeout_s is None else min(timeout_s, self._limit_s)
        begun = self._clock()
        try:
            async with asyncio.timeout(limit_s):
                response = await self._asked(self._session(socket), method, url, content, headers, max_bytes)
        except HttpError as exc:
            self._metrics.requests[exc.reason].inc()
            raise
        except (aiohttp.ClientError, OSError) as exc:
            if isinstance(exc, aiohttp.InvalidURL):
                raise ValueError(f"{_shown(url)!r} is no URL") from exc
            reason = next(word for kind, word in _REASONS if isinstance(exc, kind))
            self._metrics.requests[reason].inc()
            raise HttpError(reason, f"{_shown(url)}: {str(exc)[:200] or type(exc).__name__}") from exc
        self._metrics.requests["answered"].inc()
        self._metrics.duration.observe(self._clock() - begun)
        return response

    async def _asked(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: str,
        content: bytes | Callable[[], Iterable[bytes]],
        headers: Sequence[tuple[str, str]],
        max_bytes: int,
    ) -> HttpResponse:
        for is_last in (False, True):
            data = content if isinstance(content, bytes) else _streamed(content)
            try:
                async with session.request(
                    method, url, data=data, headers=headers, allow_redirects=False
                ) as got:
                    return HttpResponse(got.status, await _bounded(got, max_bytes), _headers(got))
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # nothing of an answer has come: most often a connection that was kept and had died
                if is_last:
                    raise
        raise AssertionError("unreachable")

    def _session(self, socket: str) -> aiohttp.ClientSession:
        session = self._sessions.get(socket)
        if session is None:
            connector: aiohttp.BaseConnector
            if socket:
                connector = aiohttp.UnixConnector(socket, limit=MAX_CONNECTIONS, keepalive_timeout=_KEEP_S)
            else:
                connector = aiohttp.TCPConnector(
                    limit=MAX_CONNECTIONS, keepalive_timeout=_KEEP_S, resolver=aiohttp.ThreadedResolver()
                )
            session = self._sessions[socket] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                trust_env=False,
                auto_decompress=False,
                headers={"User-Agent": "mxgate", "Accept-Encoding": "identity"},
                max_line_size=_MAX_HEADER_BYTES,
                max_field_size=_MAX_HEADER_BYTES,
                max_headers=_MAX_HEADERS,
            )
        return session


def _shown(url: str) -> str:
    """A URL for the log: without a user, a password, and what is asked."""
    where = url.partition("?")[0]
    scheme, _, rest = where.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


async def _streamed(content: Callable[[], Iterable[bytes]]) -> AsyncIterator[bytes]:
    for block in content():
        yield block
        # a service that takes all at once is no reason for the others to wait
        await asyncio.sleep(0)


async def _bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The content. Raises HttpError for more than `max_bytes`, and then the connection is closed."""
    blocks = []
    left = max_bytes
    async for block in response.content.iter_any():
        left -= len(block)
        if left < 0:
            response.close()
            raise HttpError(
                "too_large", f"{_shown(str(response.url))}: an answer of more than {max_bytes} octets"
            )
        blocks.append(block)
    return b"".join(blocks)


def _headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}
