"""The admin port by aiohttp: the page, /livez, /readyz, /metrics, and /api/v1/ for those who may.

It only asks the supervisor and shows the answers. The supervisor binds the socket and imports this module after it
has forked its workers: aiohttp takes longer to import than everything else together, and no worker needs it.

Health, metrics and the page's own files are for all; the page holds nothing and asks /api/v1/ as everybody does, who
may is guard's matter. What connections may cost is crowd's. Everything is read-only.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Final, Protocol

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from gateway.adapters.admin.crowd import Crowd
from gateway.adapters.admin.guard import Guard
from gateway.decision import FilterError
from gateway.services import Log

# How long a request under way may take when the port is closed.
_SHUTDOWN_S = 1.0
_KEEPALIVE_S = 20.0

_STATIC: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing from elsewhere, nothing inline, in nobody's frame; what is no page may load nothing at all.
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_OTHER_POLICY: Final = "default-src 'none'; frame-ancestors 'none'"
_HEADERS: Final = {
    hdrs.CACHE_CONTROL: "no-store",
    "X-Content-Type-Options": "nosniff",
    hdrs.SERVER: "mxgate",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def _is_no_bad_request(record: logging.LogRecord) -> bool:
    """Whoever reaches the port could write to the log: a request that is none is answered, and that is all."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


_LOGGER: Final = logging.getLogger("gateway.admin")
_LOGGER.addFilter(_is_no_bad_request)


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
    sock: socket.socket,
    supervised: Supervised,
    *,
    token: bytes,
    require_token: bool = False,
    log: Log | None = None,
) -> Callable[[], Awaitable[None]]:
    """Serve on a socket that listens, which is ours from then on; the result closes it.

    No token: loopback only. `require_token`: loopback has to show it too. `log` is told of wrong tokens.
    """
    crowd = Crowd()
    guard = Guard(token, require_token=require_token, log=log)
    application = web.Application(middlewares=[crowd.middleware, _errors_in_json, guard.middleware])
    application.on_response_prepare.append(_add_headers)
    pages = _Pages(supervised)
    for path, (name, content_type) in _STATIC.items():
        application.router.add_get(path, _static(name, content_type))
    application.router.add_get("/livez", pages.livez)
    application.router.add_get("/readyz", pages.readyz)
    application.router.add_get("/metrics", pages.metrics)
    application.router.add_get("/api/v1/status", pages.status)
    application.router.add_get("/api/v1/decisions", pages.decisions)
    application.router.add_get("/api/v1/decisions/{tx}", pages.decision)
    runner = web.AppRunner(
        application,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=_SHUTDOWN_S,
        keepalive_timeout=_KEEPALIVE_S,
        logger=_LOGGER,
    )
    await runner.setup()
    assert runner.server is not None
    server = await asyncio.get_running_loop().create_server(crowd.admit(runner.server), sock=sock)

    async def close() -> None:
        server.close()
        await runner.cleanup()
        crowd.disperse()

    return close


def _static(name: str, content_type: str) -> Handler:
    body = files(__package__).joinpath("static", name).read_bytes()

    async def serve(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return serve


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    is_page = request.path in _STATIC and response.status == 200
    response.headers["Content-Security-Policy"] = _PAGE_POLICY if is_page else _OTHER_POLICY
    response.headers.update(_HEADERS)


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
    return web.Response(text=text, status=status, content_type="application/json")


@web.middleware
async def _errors_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as exc:
        response = _json({"error": exc.reason}, exc.status)
        for name in (hdrs.ALLOW, hdrs.WWW_AUTHENTICATE, hdrs.RETRY_AFTER):
            if name in exc.headers:
                response.headers[name] = exc.headers[name]
        return response
