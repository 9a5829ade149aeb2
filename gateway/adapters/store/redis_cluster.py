"""The store in a Redis Cluster: a shared connection to each master, and the library's table of who has which slot.

A node that says MOVED or ASK is believed for this operation, once; after MOVED, and after a node that could not be
reached, the table is read again before the next one. While a master is down and no replica has taken over, its part
of the keys is out of reach and the others are not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any

from redis.asyncio import Connection, SSLConnection
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.exceptions import AskError, MovedError, ReadOnlyError, RedisClusterException, RedisError

from gateway.adapters.store.redis import (
    answer_of,
    command_of,
    connection_options,
    reason,
    scan_link,
)
from gateway.adapters.store.redis_link import CONNECT_TIMEOUT_S, Link, Reply, packed
from gateway.adapters.store.redis_url import RedisUrl
from gateway.store import Operation, Page, StoreError


class RedisClusterStore:
    """The store of a cluster. `timeout_s` is for one batch of commands to one node."""

    def __init__(self, url: RedisUrl, *, timeout_s: float) -> None:
        self._connection_class = SSLConnection if url.has_tls else Connection
        self._options = connection_options(url)
        self._timeout_s = timeout_s
        # One node that does not answer leaves time to ask another one for the table.
        patience_s = {
            "socket_timeout": CONNECT_TIMEOUT_S / 3,
            "socket_connect_timeout": CONNECT_TIMEOUT_S / 3,
        }
        self._cluster = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in url.hosts],
            require_full_coverage=False,
            ssl=url.has_tls,
            **self._options | patience_s,
        )
        self._links: dict[tuple[str, int], Link] = {}
        self._reading = asyncio.Lock()
        self._is_stale = True

    async def close(self) -> None:
        for link in self._links.values():
            await link.close()
        self._links.clear()
        await self._cluster.aclose()

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        if self._is_stale:
            await self._read_table()
        commands = [command_of(each) for each in operations]
        try:
            nodes = [self._master_of(each.key) for each in operations]
        except RedisClusterException as exc:  # a slot that nobody has
            self._is_stale = True
            raise StoreError("connect", str(exc)) from exc
        waiting = [self._link(node).send(command) for node, command in zip(nodes, commands, strict=True)]
        replies = [await each for each in waiting]
        for place, reply in enumerate(replies):
            if isinstance(reply, MovedError | ReadOnlyError | StoreError):
                self._is_stale = True
            if isinstance(reply, AskError):  # MOVED is a kind of it
                replies[place] = await self._redirected(reply, commands[place])
        return [answer_of(operation, reply) for operation, reply in zip(operations, replies, strict=True)]

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        """Master by master; the cursor names the one that it goes on with."""
        if self._is_stale:
            await self._read_table()
        masters = sorted((node.host, int(node.port)) for node in self._cluster.get_primaries())
        name, _, inner = cursor.partition("|")
        names = [f"{host}:{port}" for host, port in masters]
        place = names.index(name) if name in names else 0
        page = await scan_link(self._link(masters[place]), prefix, inner, limit)
        if page.cursor:
            return Page(page.entries, f"{names[place]}|{page.cursor}")
        return Page(page.entries, f"{names[place + 1]}|" if place + 1 < len(names) else "")

    def _master_of(self, key: str) -> tuple[str, int]:
        node = self._cluster.get_node_from_key(key)
        assert node is not None  # only for replicas it may be None
        return node.host, int(node.port)

    def _link(self, node: tuple[str, int]) -> Link:
        link = self._links.get(node)
        if link is None:
            make = partial(self._connection_class, host=node[0], port=node[1], **self._options)
            link = self._links[node] = Link(make, reason, timeout_s=self._timeout_s)
        return link

    def _redirected(self, error: AskError, command: bytes) -> Awaitable[Reply]:
        link = self._link((error.host, int(error.port)))
        if not isinstance(error, MovedError):
            # https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#ask-redirection
            link.send(packed("ASKING"))
        return link.send(command)

    async def _read_table(self) -> None:
        """Ask the nodes who has which slot; links to nodes that are gone are closed. Raises StoreError."""
        async with self._reading:
            if not self._is_stale:
                return
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    # initialize() reads the table of a client that is closed only
                    await self._cluster.aclose()
                    await self._cluster.initialize()
            except (RedisError, RedisClusterException, OSError) as exc:
                raise StoreError(_why(exc), str(exc)) from exc
            self._is_stale = False
            there = {(node.host, int(node.port)) for node in self._cluster.get_nodes()}
            gone = [self._links.pop(node) for node in self._links.keys() - there]
        for link in gone:
            await link.close()


def _why(exc: BaseException) -> str:
    # no node could be asked: the library's own error for that
    return "connect" if isinstance(exc, RedisClusterException) else reason(exc)
