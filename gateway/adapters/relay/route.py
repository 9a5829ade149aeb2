"""Routes and their hosts: which recipients go where, what is known of each downstream, what is counted.

A route has one host for now; `Route.take` and `Route.acquire` are where failover and health will choose among several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.opening import Opener
from gateway.adapters.relay.pool import Pool, PoolMetrics
from gateway.adapters.relay.settings import (
    HostSettings,
    RelaySettings,
    RelaySettingsError,
    RouteSettings,
)
from gateway.relaying import Offer
from gateway.services import Clock, Counter, Metrics
from gateway.smtp.address import AddressLiteral, Domain
from gateway.smtp.client import Capabilities

# Tokens of gateway.relaying.Delivery that are trouble, and the delivery whose client was gone.
_ERRORS = (
    "partial",
    "smtputf8",
    "connect",
    "tls",
    "banner",
    "ehlo",
    "busy",
    "timeout",
    "closed",
    "protocol",
    "final_lost",
    "internal",
    "orphan",
)

# Domains whose route is remembered; most mail is for few of them.
_MAX_KNOWN = 4096


class RouteMetrics:
    """The children of the relay's metric families that belong to one route."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        connections = metrics.gauges(
            "mxgate_relay_connections", "Connections to downstreams", ("route", "state")
        )
        errors = metrics.counters(
            "mxgate_relay_errors_total", "Trouble of the relay by kind", ("route", "error")
        )
        durations = metrics.histograms(
            "mxgate_relay_duration_seconds",
            "Time of the relay's steps: connect, verify, deliver (up to the dot), final (from dot to reply)",
            ("route", "step"),
        )
        self.pool = PoolMetrics(
            in_use=connections.labels(route, "in_use"),
            idle=connections.labels(route, "idle"),
            connect_s=durations.labels(route, "connect"),
        )
        self.verify_s = durations.labels(route, "verify")
        self.deliver_s = durations.labels(route, "deliver")
        self.final_s = durations.labels(route, "final")
        self.errors: dict[str, Counter] = {error: errors.labels(route, error) for error in _ERRORS}


class Host:
    """One downstream: its pool, and what it offered at its last EHLO (None before the first).

    `changed` is called when that is something else than before.
    """

    def __init__(
        self,
        host: HostSettings,
        settings: RelaySettings,
        clock: Clock,
        metrics: PoolMetrics,
        changed: Callable[[], None],
    ) -> None:
        self.capabilities: Capabilities | None = None
        self.pool = Pool(Opener(host, settings), settings, clock, metrics, self._learn)
        self._changed = changed

    def _learn(self, connection: Connection) -> None:
        if connection.capabilities != self.capabilities:
            self.capabilities = connection.capabilities
            self._changed()


class Route:
    """Recipients that go the same way. `offer` is None until every host has answered once."""

    def __init__(
        self,
        route: RouteSettings,
        settings: RelaySettings,
        clock: Clock,
        metrics: RouteMetrics,
        changed: Callable[[], None],
    ) -> None:
        self.name = route.name
        self.verify_recipients = route.verify_recipients
        self.metrics = metrics
        self.offer: Offer | None = None
        self._changed = changed
        self.hosts = tuple(
            Host(host, settings, clock, metrics.pool, self._host_changed) for host in route.hosts
        )
        # an idle connection to one of its hosts, without waiting
        self.take = self.hosts[0].pool.take

    async def acquire(self, deadline: float, *, fresh: bool = False) -> Connection:
        """A connection to one of its hosts, see Pool.acquire; here failover will choose. Raises NoConnectionError."""
        return await self.hosts[0].pool.acquire(deadline, fresh=fresh)

    def _host_changed(self) -> None:
        known = [host.capabilities for host in self.hosts if host.capabilities is not None]
        if len(known) == len(self.hosts):
            # any of them may get the message, so all must take it
            self.offer = Offer(
                eightbitmime=all(each.eightbitmime for each in known),
                smtputf8=all(each.smtputf8 for each in known),
                dsn=all(each.dsn for each in known),
                size=min((each.size for each in known if each.size), default=0),
            )
        self._changed()


class _Found(dict["Domain | AddressLiteral | None", "Route | None"]):
    """The route by a mailbox's domain, None when no route takes it; what was found is remembered."""

    def __init__(self, find: Callable[[Domain | AddressLiteral | None], Route | None]) -> None:
        self._find = find

    def __missing__(self, domain: Domain | AddressLiteral | None) -> Route | None:
        if len(self) >= _MAX_KNOWN:
            self.clear()
        route = self[domain] = self._find(domain)
        return route


class RouteTable:
    """All routes by recipient, and their common offer."""

    def __init__(self, settings: RelaySettings, clock: Clock, metrics: Metrics) -> None:
        self.offer = Offer(eightbitmime=True, smtputf8=False, dsn=False, size=0)
        self.routes: dict[str, Route] = {}
        self._by_domain: dict[str, str] = {}
        for route in settings.routes:
            if len(route.hosts) != 1 or route.name in self.routes:
                raise RelaySettingsError(f"route {route.name!r} needs a name of its own and exactly one host")
            self.routes[route.name] = Route(
                route, settings, clock, RouteMetrics(metrics, route.name), self._route_changed
            )
            for domain in route.domains:
                self._by_domain.setdefault(domain, route.name)
        if not self.routes:
            raise RelaySettingsError("there is no route")
        self._default = self._by_domain.get("*")
        self.of_domain = _Found(self._find)

    def _find(self, domain: Domain | AddressLiteral | None) -> Route | None:
        """The route of the domain itself, or of its closest parent written as ".parent", or of "*"."""
        name = self._name(domain)
        return None if name is None else self.routes[name]

    def _name(self, domain: Domain | AddressLiteral | None) -> str | None:
        if domain is None:
            # RFC 5321 4.5.1: every server takes mail for <postmaster>
            return self._default or next(iter(self.routes))
        if not isinstance(domain, Domain):
            return self._default
        name = self._by_domain.get(domain)
        # "a.b.c" -> ".b.c" -> ".c"
        _, dot, parent = domain.partition(".")
        while dot and name is None:
            name = self._by_domain.get(dot + parent)
            _, dot, parent = parent.partition(".")
        return name or self._default

    def hosts(self) -> Iterator[Host]:
        """Every host of every route."""
        for route in self.routes.values():
            yield from route.hosts

    def _route_changed(self) -> None:
        known = [route.offer for route in self.routes.values() if route.offer is not None]
        is_complete = len(known) == len(self.routes)
        # DESIGN.md section 6: DSN and SMTPUTF8 only when all offer them, 8BITMIME unless one is known to lack it,
        # SIZE the largest of any route: what is too big for one is refused at RCPT, when the route is known.
        self.offer = Offer(
            eightbitmime=all(each.eightbitmime for each in known),
            smtputf8=is_complete and all(each.smtputf8 for each in known),
            dsn=is_complete and all(each.dsn for each in known),
            size=max(each.size for each in known) if is_complete and all(each.size for each in known) else 0,
        )
