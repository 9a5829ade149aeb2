"""The admin port by aiohttp: /livez, /readyz, /metrics, and /api/v1/ for those who may.

It only asks the supervisor and shows the answers. The supervisor binds the socket and imports this module after it
has forked its workers: aiohttp takes longer to import than everything else together, and no worker needs it.

/api/v1/ answers loopback, and others who show the token (`Authorization: Bearer ...`). Health and metrics are for all.
Loopback is who asks for an address or `localhost` himself: no page in a browser there, and nobody behind a proxy there.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from gateway.decision import FilterError

# How long a request under way may take when the port is closed.
_SHUTDOWN_S = 1.0
# RFC 7239 4, and what was there before it.
_OF_PROXIES = (hdrs.FORWARDED, hdrs.X_FORWARDED_FOR)


class Supervised(Protocol):
    """What the admin port asks."""

    def not_live(self) -> tuple[str, ...]:
        """Why the gateway should be started anew; empty while its loops turn."""

    def not_ready(self) -> tuple[str, ...]:
        """Why it should get no mail now; empty while it should."""

    def state(self) -> Mapping[str, object]:
        """What /readyz shows beside that, in JSON's types."""

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that an Accept header asks for, and its content type."""

    async def status(self) -> Mapping[str, object]:
        """What /api/v1/status shows, in JSON's types."""

    async def decisions(self, query: Mapping[str, str]) -> Mapping[str, object]:
        """What /api/v1/decisions shows, in JSON's types: `decisions`, `truncated`, `errors`. Raises FilterError."""


async def serve_admin(
    sock: socket.socket, supervised: Supervised, *, token: bytes
) -> Callable[[], Awaitable[None]]:
    """Serve on a socket that listens, which is ours from then on; the result closes it. No token: loopback only."""
    application = web.Application(middlewares=[_errors_in_json, _guard(token)])
    pages = _Pages(supervised)
    application.router.add_get("/livez", pages.livez)
    application.router.add_get("/readyz", pages.readyz)
    application.router.add_get("/metrics", pages.metrics)
    application.router.add_get("/api/v1/status", pages.status)
    application.router.add_get("/api/v1/decisions", pages.decisions)
    application.router.add_get("/api/v1/decisions/{tx}", pages.decision)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    return runner.cleanup


class _Pages:
    def __init__(self, supervised: Supervised) -> None:
        self._supervised = supervised

    async def livez(self, _: web.Request) -> web.Response:
        reasons = self._supervised.not_live()
        return _json({"live": not reasons, "reasons": reasons}, 503 if reasons else 200)

    async def readyz(self, _: web.Request) -> web.Response:
        reasons = self._supervised.not_ready()
        body = {"ready": not reasons, "reasons": reasons, **self._supervised.state()}
        return _json(body, 503 if reasons else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        # A header that is repeated is a list that goes on (RFC 9110 5.3).
        body, content_type = self._supervised.metrics(",".join(request.headers.getall(hdrs.ACCEPT, ())))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    async def status(self, _: web.Request) -> web.Response:
        return _json(await self._supervised.status())

    async def decisions(self, request: web.Request) -> web.Response:
        query = request.query
        if len(query) != len(set(query)):
            return _json({"error": "a filter stands twice"}, 400)
        try:
            return _json(await self._supervised.decisions(dict(query)))
        except FilterError as exc:
            return _json({"error": str(exc)}, 400)

    async def decision(self, request: web.Request) -> web.Response:
        tx = request.match_info["tx"]
        try:
            answer = await self._supervised.decisions({"tx": tx, "limit": "1"})
        except FilterError as exc:
            return _json({"error": str(exc)}, 400)
        match answer:
            case {"decisions": [dict(decision)]} if decision.get("tx") == tx:
                return _json(decision)
            case {"errors": [_, *_] as errors}:
                return _json({"error": "not every worker answered", "errors": errors}, 503)
        return _json({"error": "no decision about this transaction is kept (any more)"}, 404)


def _json(body: Mapping[str, object], status: int = 200) -> web.Response:
    text = json.dumps(body, indent=2) + "\n"
    return web.Response(
        text=text, status=status, content_type="application/json", headers={hdrs.CACHE_CONTROL: "no-store"}
    )


@web.middleware
async def _errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as exc:
        response = _json({"error": exc.reason}, exc.status)
        for name in (hdrs.ALLOW, hdrs.WWW_AUTHENTICATE):
            if name in exc.headers:
                response.headers[name] = exc.headers[name]
        return response


def _guard(token: bytes) -> Middleware:
    expected = b"Bearer " + token

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/api/") and not (_is_loopback(request.remote) and _is_direct(request)):
            # aiohttp decodes a header's bytes so that they come back like this.
            shown = request.headers.get(hdrs.AUTHORIZATION, "").encode("utf-8", "surrogateescape")
            if not token or not hmac.compare_digest(shown, expected):
                raise web.HTTPUnauthorized(headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
        return await handler(request)

    return guard


def _is_direct(request: web.Request) -> bool:
    """Whether it is no page of a browser on this machine (DNS rebinding), nor somebody's whom a local proxy brings."""
    if any(name in request.headers for name in _OF_PROXIES):
        return False
    host = request.host.lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def _is_loopback(remote: str | None) -> bool:
    try:
        address = ipaddress.ip_address(remote or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # how a socket for both families shows 127.0.0.1
    return (mapped or address).is_loopback
