"""Routes: which recipients go where, which host of a route is next, what a route is known to take.

Preference: the hosts of the first group that has one which is up; among them the least used, ties in turn. One that is
being probed after trouble comes behind all others that are up, so that not everybody has to find out. When none is
up they are all tried in order of preference: mail would be refused otherwise anyway, and one that was just started
serves at once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterator

from gateway.adapters.relay.connection import Connection
from gateway.adapters.relay.host import Host
from gateway.adapters.relay.opening import NoConnectionError
from gateway.adapters.relay.pool import DismissedError
from gateway.adapters.relay.settings import (
    Identity,
    Protocol,
    RelaySettings,
    RelaySettingsError,
    RouteSettings,
)
from gateway.relaying import Offer
from gateway.services import Instruments
from gateway.session import Session
from gateway.smtp.address import AddressLiteral, Domain

# Domains whose route is remembered; most mail is for few of them.
_MAX_KNOWN = 4096
# DESIGN.md section 6: how long a downstream's 452 4.5.3 counts
_TAUGHT_S = 24 * 3600.0


class Route:
    """Recipients that go the same way. `offer` is None until every host has answered once."""

    def __init__(
        self,
        route: RouteSettings,
        settings: RelaySettings,
        services: Instruments,
        changed: Callable[[], None],
    ) -> None:
        self.name = route.name
        self.verify_recipients = route.verify_recipients
        self.is_lmtp = route.protocol is Protocol.LMTP
        # what a downstream says may depend on the client
        self.is_personal = route.identity in (Identity.XCLIENT, Identity.PROXY_V2)
        self.offer: Offer | None = None
        self.max_size: float = math.inf
        self._groups = tuple(
            tuple(Host(host, route, settings, services, self._host_changed) for host in group)
            for group in route.groups
        )
        self.hosts = tuple(host for group in self._groups for host in group)
        if (
            not all(self._groups)
            or len({host.name for host in self.hosts}) != len(self.hosts)
            or not self.hosts
        ):
            raise RelaySettingsError(f"route {self.name!r} needs hosts, each of them once")
        self._clock = services.clock
        self._changed = changed
        self._turn = 0
        # RFC 2033 4.2: one reply a recipient follows the dot, so an LMTP transaction has one
        self._offered_recipients = int(self.is_lmtp)
        self._taught_recipients = 0
        self._taught_until = 0.0
        # an idle connection to the host whose turn it is, without waiting
        self.take: Callable[[Session], Connection | None] = (
            self.hosts[0].pool.take if len(self.hosts) == 1 else self._take
        )

    # --- connections -----------------------------------------------------------------------------

    async def acquire(
        self, client: Session, deadline: float, *, fresh: bool = False, without: Collection[Host] = ()
    ) -> Connection:
        """A connection to the host whose turn it is, or else to the next one, see Pool.acquire.

        Raises NoConnectionError when none of them, but for those in `without`, can serve before `deadline`.
        """
        tried = set(without)
        failure = NoConnectionError("busy", "there is no other host")
        while (host := self._choose(tried)) is not None:
            try:
                return await host.acquire(client, deadline, fresh=fresh)
            except DismissedError as trouble:
                failure = trouble
            except NoConnectionError as trouble:
                failure = trouble
                tried.add(host)
            if asyncio.get_running_loop().time() >= deadline:
                break
        raise failure

    def has_up(self, without: Collection[Host]) -> bool:
        """Whether a host is up that is none of these."""
        return any(host.is_up and host not in without for host in self.hosts)

    def _take(self, client: Session) -> Connection | None:
        self._turn += 1
        host = self._choose(())
        return None if host is None else host.pool.take(client)

    def _choose(self, tried: Collection[Host]) -> Host | None:
        for fits in (_is_well, _is_up):
            for group in self._groups:
                up = [host for host in group if fits(host) and host not in tried]
                if up:
                    start = self._turn % len(up)
                    return min((*up[start:], *up[:start]), key=_in_use)
        return next((host for host in self.hosts if host not in tried), None)

    # --- what it takes ---------------------------------------------------------------------------

    @property
    def max_recipients(self) -> int:
        """Recipients that one transaction may have, 0 for no limit."""
        if self._taught_recipients and self._clock.monotonic() >= self._taught_until:
            self._taught_recipients = 0
        offered, taught = self._offered_recipients, self._taught_recipients
        return min(offered, taught) if offered and taught else offered or taught

    def teach(self, max_recipients: int) -> None:
        """A downstream took so many recipients and refused the next one, because it was one too many."""
        self._taught_recipients = max_recipients
        self._taught_until = self._clock.monotonic() + _TAUGHT_S

    def state(self) -> dict[str, object]:
        """Its hosts as /readyz shows them."""
        return {"name": self.name, "hosts": [host.state() for host in self.hosts]}

    def _host_changed(self) -> None:
        known = [host.capabilities for host in self.hosts if host.capabilities is not None]
        if not self.is_lmtp:
            # RFC 9422 4: RCPTMAX
            self._offered_recipients = min(
                (each.max_recipients for each in known if each.max_recipients), default=0
            )
        if len(known) == len(self.hosts):
            # any of them may get the message, so all must take it
            self.offer = Offer(
                eightbitmime=all(each.eightbitmime for each in known),
                smtputf8=all(each.smtputf8 for each in known),
                dsn=all(each.dsn for each in known),
                size=min((each.size for each in known if each.size), default=0),
            )
            self.max_size = self.offer.size or math.inf
        self._changed()


def _is_well(host: Host) -> bool:
    return host.is_up and not host.is_suspected


def _is_up(host: Host) -> bool:
    return host.is_up


def _in_use(host: Host) -> int:
    return host.pool.in_use


class Retry:
    """What may follow a connection that was used up before anything of a message was sent.

    One that had been idle is replaced once in any case, since downstreams end idle connections as they like; where it
    hung, by one of another host that is up. After a fresh one only another host that is up is tried. `without` are
    the hosts that are out of the question.
    """

    def __init__(self, route: Route) -> None:
        self.without: set[Host] = set()
        self._route = route
        self._is_begun = False

    def allows(self, used_up: Connection) -> bool:
        """Whether another connection may be tried in the place of this one."""
        host, was_idle = used_up.host, used_up.is_reused and not self._is_begun
        self._is_begun = True
        if not was_idle or (used_up.trouble == "timeout" and self._route.has_up({host})):
            self.without.add(host)
        return was_idle or self._route.has_up(self.without)


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

    def __init__(self, settings: RelaySettings, services: Instruments) -> None:
        self.offer = Offer(eightbitmime=True, smtputf8=False, dsn=False, size=0)
        self.routes: dict[str, Route] = {}
        self._by_domain: dict[str, str] = {}
        for route in settings.routes:
            if route.name in self.routes:
                raise RelaySettingsError(f"route {route.name!r} needs a name of its own")
            self.routes[route.name] = Route(route, settings, services, self._route_changed)
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
            return self._default or next(iter(self._by_domain.values()), None)
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
