"""What the arrivals of clients tell when they are seen together: a balancer that hides them.

Pure: the listener tells of each connection, and what time it is. Nothing here refuses anybody or logs anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from ipaddress import IPv4Address, IPv6Address, ip_network

Address = IPv4Address | IPv6Address

# Addresses that no client out of the Internet has, but a balancer, a node or a bridge of containers.
_PRIVATE_NETWORKS = tuple(
    ip_network(network)
    for network in (
        "10.0.0.0/8",  # RFC 1918
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # RFC 6598: shared address space
        "169.254.0.0/16",  # RFC 3927: link-local
        "fc00::/7",  # RFC 4193: unique local
        "fe80::/10",  # RFC 4291 2.5.6: link-local
    )
)


class Origin(Enum):
    """Where an address can belong to."""

    PUBLIC = auto()
    PRIVATE = auto()
    LOOPBACK = auto()


# A member that is asked of its class costs ten times what a name of the module does.
_PUBLIC, _LOOPBACK = Origin.PUBLIC, Origin.LOOPBACK

_WINDOW = 1000
_ENOUGH = 100
_BEGIN_SHARE, _END_SHARE = 0.9, 0.8
_SILENCE_S = 86_400.0


def origin_of(client: Address) -> Origin:
    """Where this address can belong to."""
    if client.is_loopback:
        return Origin.LOOPBACK
    return Origin.PRIVATE if any(client in network for network in _PRIVATE_NETWORKS) else Origin.PUBLIC


class SourceWatch:
    """Watches whether most clients come from one private address: then it is a balancer's, and hides them.

    `hidden_by` is that address while at least 90 % of the last 1000 clients (of at least 100) came from it; it stays
    until they are less than 80 %, so that nothing flutters, or until none has come from it for a day. Clients at
    loopback addresses are not counted; those whose address a balancer told must not be told of here.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._recent: deque[Address | None] = deque()  # None: a public address
        self._counts: dict[Address, int] = {}
        self._last_seen_s = 0.0  # from hidden_by
        self.hidden_by: Address | None = None

    @property
    def share(self) -> float:
        """The part of the recent clients that came from the commonest private address, 0 to 1; 0 before 100 came."""
        if len(self._recent) < _ENOUGH:
            return 0.0
        return max(self._counts.values(), default=0) / len(self._recent)

    def saw(self, client: Address, origin: Origin) -> None:
        """A client came whose address is that of its socket; `origin` is `origin_of` it, which is dear."""
        if origin is _LOOPBACK:
            return
        recent, counts = self._recent, self._counts
        if len(recent) == _WINDOW and (gone := recent.popleft()) is not None:
            counts[gone] -= 1
            if not counts[gone]:
                del counts[gone]
        if origin is _PUBLIC:
            recent.append(None)
        else:
            recent.append(client)
            counts[client] = counts.get(client, 0) + 1
            # its share is the only one that grew
            if len(recent) >= _ENOUGH and counts[client] >= _BEGIN_SHARE * len(recent):
                self.hidden_by = client
        if self.hidden_by is None:
            return
        if client == self.hidden_by:
            self._last_seen_s = self._monotonic()
        elif counts.get(self.hidden_by, 0) < _END_SHARE * len(recent):
            self.hidden_by = None

    def look(self) -> Address | None:
        """`hidden_by` as of now: call it from time to time, so that silence ends it too."""
        if self.hidden_by is not None and self._monotonic() - self._last_seen_s > _SILENCE_S:
            self.hidden_by = None
        return self.hidden_by
