"""The store in Redis, or what speaks its protocol (Valkey): one server, by Sentinel, or a cluster; 7.0 or newer.

Every key gets its time to live in the same command that sets it. Lua is used for `replace`, `add` and `take` only, on
one key each, sent as it is: a server that was restarted or has taken over knows no scripts.

A server that says READONLY is a replica by now: the connection is given up, so that the next one asks Sentinel, or
the name server, who the master is.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any, assert_never

from redis.asyncio import Connection, Sentinel, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gateway.adapters.store.redis_link import CONNECT_TIMEOUT_S, Link, Reply, packed
from gateway.adapters.store.redis_url import RedisUrl, Topology
from gateway.store import (
    Add,
    Delete,
    Entry,
    Get,
    NotACounterError,
    Operation,
    Page,
    Put,
    PutIfAbsent,
    Replace,
    StoreError,
    Take,
)

# What every recipient costs is packed in one go: half of what sending it takes.
_GET = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n"
_SET = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$2\r\nPX\r\n$%d\r\n%b\r\n"
# NX together with GET: since Redis 7.0
_SET_IF_ABSENT = (
    b"*7\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$2\r\nNX\r\n$3\r\nGET\r\n$2\r\nPX\r\n$%d\r\n%b\r\n"
)

_REPLACE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1"""
_ADD = """
local n = redis.call('INCRBY', KEYS[1], ARGV[1])
if ARGV[3] == '1' or redis.call('PTTL', KEYS[1]) < 0 then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return n"""
# An entry that does not end is none of a bucket.
_TAKE = """
local lacks = redis.call('PTTL', KEYS[1])
local cost, capacity = tonumber(ARGV[1]), tonumber(ARGV[2])
if lacks < 0 then lacks = 0 end
if lacks > capacity then
  lacks = capacity
  redis.call('SET', KEYS[1], '', 'PX', capacity)
end
local after = lacks + cost
if cost > 0 and after > capacity then return after - capacity end
if after > 0 then redis.call('SET', KEYS[1], '', 'PX', after) else redis.call('DEL', KEYS[1]) end
return 0"""

# In this order: some are subclasses of others.
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (AuthenticationError, "auth"),
    (AuthorizationError, "auth"),
    (NoPermissionError, "auth"),
    (BusyLoadingError, "loading"),
    (OutOfMemoryError, "full"),
    (ReadOnlyError, "read_only"),
    (RedisTimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (RedisConnectionError, "connect"),
    (OSError, "connect"),
    (InvalidResponse, "protocol"),
)


class RedisStore:
    """The store of one server, or of the master that Sentinel names. `timeout_s` is for one batch of commands."""

    def __init__(self, url: RedisUrl, *, timeout_s: float) -> None:
        self._sentinel = _sentinel(url) if url.topology is Topology.SENTINEL else None
        if self._sentinel is not None:
            pool = self._sentinel.master_for(url.service, **connection_options(url)).connection_pool
            make = pool.make_connection
        elif url.topology is Topology.UNIX:
            options = {**connection_options(url), "path": url.path}

            def make() -> AbstractConnection:
                return UnixDomainSocketConnection(**options)
        else:
            ((host, port),) = url.hosts
            options = {**connection_options(url), "host": host, "port": port}

            def make() -> AbstractConnection:
                return SSLConnection(**options) if url.has_tls else Connection(**options)

        self._link = Link(make, reason, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._link.close()
        if self._sentinel is not None:
            await self._sentinel.aclose()

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if len(operations) > 1 and all(type(each) is Get for each in operations):
            # one reply to read: what most recipients cost
            values: list[bytes | None] = answered(
                await self._link.send(packed("MGET", *[each.key for each in operations]))
            )
            return values
        waiting = [self._link.send(command_of(each)) for each in operations]
        replies = [await each for each in waiting]
        if any(isinstance(reply, ReadOnlyError) for reply in replies):
            self._link.renew()
        return [answer_of(operation, reply) for operation, reply in zip(operations, replies, strict=True)]

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        return await scan_link(self._link, prefix, cursor, limit)


async def scan_link(link: Link, prefix: str, cursor: str, limit: int) -> Page:
    """A page of one server's entries."""
    found = answered(await link.send(packed("SCAN", cursor or "0", "MATCH", _glob(prefix), "COUNT", limit)))
    following, keys = found
    waiting = [link.send(packed(word, key)) for key in keys for word in ("GET", "PTTL")]
    replies = iter([answered(await each) for each in waiting])
    entries = [
        Entry(key.decode(), value, ttl_ms / 1000)
        for key, value, ttl_ms in zip(keys, replies, replies, strict=True)
        if value is not None and ttl_ms >= 0
    ]
    return Page(tuple(entries), "" if following == b"0" else following.decode())


def command_of(operation: Operation[Any]) -> bytes:
    """The command that does an operation, packed."""
    key = operation.key.encode()
    match operation:
        case Get():
            return _GET % (len(key), key)
        case Put():
            value, ms = operation.value, b"%d" % _ms(operation.ttl_s)
            return _SET % (len(key), key, len(value), value, len(ms), ms)
        case PutIfAbsent():
            value, ms = operation.value, b"%d" % _ms(operation.ttl_s)
            return _SET_IF_ABSENT % (len(key), key, len(value), value, len(ms), ms)
        case Replace():
            return packed("EVAL", _REPLACE, 1, key, operation.old, operation.value, _ms(operation.ttl_s))
        case Add():
            ms, renew = b"%d" % _ms(operation.ttl_s), int(operation.renew)
            return packed("EVAL", _ADD, 1, key, operation.amount, ms, renew)
        case Take():
            capacity_ms = _ms(operation.capacity_s)
            return packed("EVAL", _TAKE, 1, key, round(operation.cost_s * 1000), capacity_ms)
        case Delete():
            return packed("DEL", key)
        case _:
            assert_never(operation)  # type: ignore[arg-type]  # Operation is no union, but these are all


def answer_of(operation: Operation[Any], reply: Reply) -> Any:
    """What the reply to its command means. Raises StoreError and NotACounterError."""
    if isinstance(reply, ResponseError) and isinstance(operation, Add) and _is_no_counter(reply):
        raise NotACounterError
    value = answered(reply)
    match operation:
        case Put():
            return None
        case Replace() | Delete():
            return value == 1
        case Take():
            return value / 1000
        case _:
            return value


def answered(reply: Reply) -> Any:
    """The reply, if it is one. Raises StoreError."""
    if isinstance(reply, StoreError):
        raise reply
    if isinstance(reply, ResponseError):
        raise StoreError(reason(reply), str(reply)) from reply
    return reply


def reason(exc: BaseException) -> str:
    """One word of StoreError's for an exception of the library."""
    fallback = "error" if isinstance(exc, RedisError) else "protocol"
    return next((word for kind, word in _REASONS if isinstance(exc, kind)), fallback)


def connection_options(url: RedisUrl) -> dict[str, Any]:
    """What every connection is made with: no retries, no timers of its own but that for connecting."""
    options: dict[str, Any] = {
        "username": url.username,
        "password": url.password,
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
    }
    if url.topology is Topology.UNIX:
        del options["socket_keepalive"]
    if url.topology is not Topology.CLUSTER:
        options["db"] = url.db
    if url.has_tls:
        options |= tls_options(url)
    return options


def tls_options(url: RedisUrl) -> dict[str, Any]:
    """TLS, with a certificate that is valid for the host."""
    return {
        "ssl_ca_certs": url.ca_file,
        "ssl_certfile": url.cert_file,
        "ssl_keyfile": url.key_file,
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
        "ssl_min_version": ssl.TLSVersion.TLSv1_2,
    }


def _sentinel(url: RedisUrl) -> Sentinel:
    # One sentinel that does not answer leaves time to ask the others.
    timeout_s = CONNECT_TIMEOUT_S / (len(url.hosts) + 1)
    options: dict[str, Any] = {
        "username": url.sentinel_username,
        "password": url.sentinel_password,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
    }
    if url.has_tls:
        options |= {"ssl": True, **tls_options(url)}
    return Sentinel(list(url.hosts), sentinel_kwargs=options, ssl=url.has_tls)  # type: ignore[no-untyped-call]


def _ms(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))


def _glob(prefix: str) -> str:
    """The pattern of keys that begin with this text."""
    return "".join(f"\\{each}" if each in "*?[]^-\\" else each for each in prefix) + "*"


def _is_no_counter(error: ResponseError) -> bool:
    text = str(error)
    return "not an integer" in text or "would overflow" in text
