"""Who may ask /api/v1/: loopback, where the operator has not forbidden it, and who shows the token.

Loopback is who asks for an address or `localhost` himself. A page in a browser on this machine that had a name of its
own resolve to 127.0.0.1 (DNS rebinding) shows that name in `Host`; a proxy on this machine shows itself by one of the
fields that proxies add, or by HTTP/1.0, which is what nginx speaks unless it is told otherwise. A proxy that shows
nothing cannot be told from a user: for that there is `admin.trust_loopback = false`.

The token comes in `Authorization: Bearer ...` only: no cookie that a browser would add by itself, nothing in a URL.
Who shows wrong ones is not listened to for a while.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler

if TYPE_CHECKING:
    from gateway.services import Log

# RFC 7239 4, RFC 9110 7.6.3, and what else proxies add.
_OF_PROXIES: Final = (
    hdrs.FORWARDED,
    hdrs.VIA,
    hdrs.X_FORWARDED_FOR,
    hdrs.X_FORWARDED_HOST,
    hdrs.X_FORWARDED_PROTO,
    "X-Forwarded-Server",
    "X-Real-IP",
    "CF-Connecting-IP",
    "True-Client-IP",
)
MAX_FAILURES: Final = 10
PERIOD_S: Final = 60.0
# Addresses that are remembered for their wrong tokens; beyond it the oldest is forgotten.
_MAX_ADDRESSES: Final = 1000


class Guard:
    """The middleware, and its memory of wrong tokens."""

    def __init__(
        self,
        token: bytes,
        *,
        require_token: bool = False,
        log: Log | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected = b"Bearer " + token if token else b""
        self._require_token = require_token
        self._log = log
        self._monotonic = monotonic
        self._failures: OrderedDict[str, list[float]] = OrderedDict()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/api/") and not self._is_at_home(request):
            self._check(request)
        return await handler(request)

    def _is_at_home(self, request: web.Request) -> bool:
        return not self._require_token and _is_loopback(request.remote) and _is_direct(request)

    def _check(self, request: web.Request) -> None:
        """Raise unless the request shows the token."""
        given = request.headers.get(hdrs.AUTHORIZATION)
        if given is None:
            raise web.HTTPUnauthorized(headers={hdrs.WWW_AUTHENTICATE: "Bearer"})
        address = _who(request.remote)
        failures = [at for at in self._failures.get(address, ()) if self._monotonic() - at < PERIOD_S]
        if len(failures) >= MAX_FAILURES:
            wait_s = PERIOD_S - (self._monotonic() - failures[0])
            raise web.HTTPTooManyRequests(headers={hdrs.RETRY_AFTER: str(int(wait_s) + 1)})
        # aiohttp decodes a header's bytes so that they come back like this.
        shown = given.encode("utf-8", "surrogateescape")
        if self._expected and hmac.compare_digest(shown, self._expected):
            return
        self._failures[address] = [*failures, self._monotonic()]
        self._failures.move_to_end(address)
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)
        if self._log is not None:
            self._log.warning("admin.refused", client=request.remote or "", failures=len(failures) + 1)
        raise web.HTTPUnauthorized(headers={hdrs.WWW_AUTHENTICATE: 'Bearer error="invalid_token"'})


def _is_direct(request: web.Request) -> bool:
    """Whether it is no page of a browser on this machine (DNS rebinding), nor somebody's whom a local proxy brings."""
    if request.version < HttpVersion11 or any(name in request.headers for name in _OF_PROXIES):
        return False
    hosts = request.headers.getall(hdrs.HOST, ())
    if len(hosts) != 1:
        return False
    host = hosts[0].lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return True


def _is_loopback(remote: str | None) -> bool:
    address = _address(remote)
    return address is not None and address.is_loopback


def _who(remote: str | None) -> str:
    """What failures are counted by: an IPv4 address, or the /64 that one client has."""
    address = _address(remote)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


def _address(remote: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return None
    # how a socket for both families shows 127.0.0.1
    return getattr(address, "ipv4_mapped", None) or address
